"""How far what a store gives back is from the teacher: KL, effective sample size, bias.

Shape suffixes: P probed positions, K entries, V vocabulary. KL is in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitcache import StoreReader
from logitcache.causal_lm import Head, hidden_states, load_causal_lm
from logitcache.fetch import fetch
from logitcache.padded import side_by_side
from logitcache.support import decode_row, encode_row, support_of
from logitcache_kernels import capture

RSKD_DRAWS = 50
_CHUNK = 64


@dataclass(frozen=True)
class Probe:
    """Exact distributions at P positions: which (row, token), and their logp, float32 [P, V]."""

    rows: np.ndarray
    tokens: np.ndarray
    logp_PV: torch.Tensor

    @cached_property
    def prior_V(self) -> torch.Tensor:
        """What stands for a tail's shape, the same for us and for the peers: the mean of
        min(p, 0.002)."""
        parts = [part.exp().clamp_max(2e-3).sum(0) for part in self.logp_PV.split(_CHUNK)]
        total: torch.Tensor = torch.stack(parts).sum(0) + 1e-9
        return total / total.sum()


@torch.inference_mode()
def probe(teacher: Path, reader: StoreReader, most: int) -> Probe:
    """Run the teacher over the first rows, at most ``most`` positions, evenly spaced."""
    model = load_causal_lm(teacher, torch.float32, torch.device("cpu"))
    head, length = Head.of(model), reader.manifest["seq_len"]
    number = min(len(reader), max(most * 4 // length, 1))
    rows = reader.read_rows(np.arange(number))
    labels, vocab_size = rows.labels(), reader.manifest["vocab_size"]
    at_row, at_token = np.nonzero(labels != -100)
    picked = np.linspace(0, len(at_row) - 1, min(most, len(at_row))).astype(int)
    at_row, at_token = at_row[picked], at_token[picked]
    logp = []
    for row in range(number):
        hidden = hidden_states(
            model,
            torch.from_numpy(rows.tokens[[row]].astype(np.int64)),
            torch.from_numpy(rows.positions()[[row]]),
        )[0]
        for tokens in torch.from_numpy(at_token[at_row == row]).split(_CHUNK):
            logits = head.logits(hidden[tokens])[:, :vocab_size].float()
            logp.append(logits - logits.logsumexp(-1, keepdim=True))
    return Probe(at_row, at_token, torch.cat(logp))


def kl_of_store(probed: Probe, reader: StoreReader) -> dict[str, float]:
    """Give "kl_quantised" (over certain entries and the tail as one) and "kl_full" (tail by the
    prior)."""
    quantised: list[float] = []
    full: list[float] = []
    for ids, logp, certain, exact_V in _positions(probed, reader):
        ids, found = ids[certain], torch.from_numpy(logp[certain].astype(np.float64))
        exact = exact_V[ids].double()
        tail = max(float(1 - exact.exp().sum()), 1e-12)
        left = max(float(1 - found.exp().sum()), 1e-12)
        value = float((exact.exp() * (exact - found)).sum()) + tail * np.log(tail / left)
        quantised.append(value)
        full.append(_kl_full(exact_V, ids, found, probed.prior_V))
    return {"kl_quantised": float(np.mean(quantised)), "kl_full": float(np.mean(full))}


def kl_of_top_k(probed: Probe, k: int, dtype: torch.dtype = torch.float32) -> float:
    """KL of the k largest entries, kept in a dtype, and the tail by the prior."""
    prior, values = probed.prior_V, []
    for exact_V in probed.logp_PV:
        kept, ids = exact_V.topk(k)
        kept = kept.to(dtype).double()
        kept -= torch.clamp_min(kept.logsumexp(0), 0)  # rounding may give more than 1
        values.append(_kl_full(exact_V, ids, kept, prior))
    return float(np.mean(values))


def _kl_full(exact_V: torch.Tensor, ids: Any, found: torch.Tensor, prior_V: torch.Tensor) -> float:
    exact_V = exact_V.double()
    shape = prior_V.double().clone()
    shape[ids] = 0
    tail = torch.clamp_min(1 - found.exp().sum(), 1e-7)
    q = shape / shape.sum() * tail
    q[ids] = found.exp()
    return float((exact_V.exp() * (exact_V - q.clamp_min(1e-30).log())).sum())


def effective_draws(probed: Probe, reader: StoreReader) -> float:
    """Of a sampled store at T = 1: how many draws of Random Sampling KD are as exact.

    E[1 - sum p^2] / E|p - q|^2; one draw has 1.
    """
    ideal = error = 0.0
    length = reader.manifest["seq_len"]
    for row in np.unique(probed.rows):
        sparse = reader[int(row)].teachers[0].sparse_teacher(1.0)
        for number in np.flatnonzero(probed.rows == row):
            p = probed.logp_PV[number].double().exp()
            at = int(probed.tokens[number]) % length
            kept = sparse.ids_RK[at] >= 0
            ids = sparse.ids_RK[at][kept].long()
            q = torch.zeros_like(p)
            assert sparse.inclusion_RK is not None
            q[ids] = sparse.logp_RK[at][kept].double().exp() / sparse.inclusion_RK[at][kept]
            ideal += float(1 - (p * p).sum())
            error += float(((p - q) ** 2).sum())
    return ideal / error


def rskd_bytes(probed: Probe) -> float:
    """Bytes of Random Sampling KD: 24 bits for each of the distinct ids among 50 draws."""
    unique = [
        (1 - (1 - part.double().exp()) ** RSKD_DRAWS).sum(1) for part in probed.logp_PV.split(64)
    ]
    return 3 * float(torch.cat(unique).mean())


def bias_of_sampling(draws: int = 1 << 20, vocab_size: int = 512) -> dict[str, float]:
    """Standard errors between the mean sampled mass and the exact one, at three temperatures.

    Distributions of random scales, each drawn 256 times: captured, encoded, decoded.
    """
    attributes = {
        "estimator": "sampled",
        "precision": "standard",
        "min_prob": 0.005,
        "threshold": 0.05,
        "sample_temperature": 2.0,
        "max_entries": 255,
        "seed": 1,
    }
    grid = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    length = 2048
    random = torch.Generator().manual_seed(0)
    base = torch.randn(draws // 256, vocab_size, generator=random)
    spread = base * (torch.rand(draws // 256, 1, generator=random) * 3 + 1.5)
    differences: dict[float, list[np.ndarray]] = {1.0: [], 1.5: [], 2.0: []}
    order = np.arange(vocab_size, dtype=np.uint32)
    for row in range(draws // length):
        logits = spread[torch.arange(row * length, (row + 1) * length) % len(spread)]
        captured = capture(
            logits, position_ids_R=torch.arange(length) + row * length, seed=1, impl="eager"
        )
        support = support_of(fetch([captured]), np.arange(length), length, attributes)
        planes = encode_row(support, attributes, grid, order, row)
        decoded = decode_row(planes, attributes, grid, order, row)
        teacher = side_by_side([decoded], attributes, tuple(grid), length)
        for temperature, found in differences.items():
            sparse = teacher.sparse_teacher(temperature)
            assert sparse.inclusion_RK is not None
            there = sparse.ids_RK >= 0
            certain = there & (sparse.inclusion_RK >= 1)
            weight = (sparse.logp_RK / temperature - sparse.log_partition_R[:, None]).exp()
            weight = weight / sparse.inclusion_RK.clamp_min(1e-9)
            mass = torch.where(there & ~certain, weight, 0.0).sum(1)
            p = (logits / temperature).softmax(-1)
            exact = 1 - torch.where(certain, p.gather(1, sparse.ids_RK.clamp_min(0).long()), 0).sum(
                1
            )
            found.append((mass - exact).double().numpy())
    result = {}
    for temperature, parts in differences.items():
        whole = np.concatenate(parts)
        result[f"T = {temperature:g}"] = float(whole.mean() / (whole.std() / len(whole) ** 0.5))
    return result


def _positions(probed: Probe, reader: StoreReader) -> Any:
    """Of each probed position what the store gives back: ids, logp, certain; and the exact logp."""
    for row in np.unique(probed.rows):
        teacher = reader[int(row)].teachers[0]
        for number in np.flatnonzero(probed.rows == row):
            at = int(probed.tokens[number])
            kept = teacher.ids_PK[at] >= 0
            certain = (
                np.ones(kept.sum(), bool)
                if teacher.inclusion_PK is None
                else teacher.inclusion_PK[at][kept] >= 1
            )
            ids = teacher.ids_PK[at][kept].astype(np.int64)
            yield ids, teacher.logp_PK[at][kept], certain, probed.logp_PV[number]
