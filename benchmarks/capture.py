"""Capture: time over reading the logits once (R * V * itemsize bytes at the copy's bandwidth)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from logitcache_kernels import capture

from .common import KEPT, ROWS, VOCABULARIES, Bench, Record, largest_error
from .inputs import teacher_logits

_MOST_BYTES = 2**33  # of logits; the largest shapes of the grid are 8 GiB
_CHECKED_ROWS = 64


def run(bench: Bench) -> list[Record]:
    """Time capture in its modes, torch.topk and an eager capture by torch's own operations."""
    shapes = [(8192, 151936), (8192, 49152), (8192, 32000), (4096, 262144)]
    kept: tuple[int, ...] = (64,)
    texts: tuple[str, ...] = ("web",)
    if not bench.quick:
        shapes = [(rows, vocab) for vocab in VOCABULARIES for rows in ROWS]
        kept, texts = KEPT, ("web", "chat")
    records = []
    for num_rows, vocab in shapes:
        if num_rows * vocab * 2 > _MOST_BYTES:
            continue
        for text in texts:
            records += _measure(bench, num_rows, vocab, text, kept)
            torch.cuda.empty_cache()
    return records


def _measure(
    bench: Bench, num_rows: int, vocab: int, text: str, kept: tuple[int, ...]
) -> list[Record]:
    logits_RV = teacher_logits(num_rows, vocab, text, seed=vocab, device=bench.device)
    positions_R = torch.arange(num_rows, device=bench.device)
    labels_R = torch.randint(0, vocab, (num_rows,), device=bench.device)
    common = {"labels_R": labels_R, "position_ids_R": positions_R}
    modes: dict[str, dict[str, Any]] = {"sampled": {"estimator": "sampled"}}
    for k in kept:
        modes[f"topk {k}"] = {"estimator": "topk", "top_k": k, "min_prob": 0.0}

    def call(options: dict[str, Any], impl: str = "triton") -> Callable[[], object]:
        return lambda: capture(logits_RV, **options, **common, impl=impl)

    functions = {name: call(options) for name, options in modes.items()}
    for k in kept:
        functions[f"torch.topk {k}"] = lambda k=k: torch.topk(logits_RV, k, dim=-1)
    timings = bench.time(functions)
    peers = {name: timing for name, timing in timings.items() if name.startswith("torch")}
    if num_rows <= 8192:  # eager holds several fp32 copies
        small = Bench(bench.device, rounds=5)
        eager = {"torch eager": lambda: _eager(logits_RV, kept[0])}
        peers.update(small.time(eager))
    records = []
    for name, options in modes.items():
        mine = {
            other: timing
            for other, timing in peers.items()
            if not other.startswith("torch.topk")
            or name == "sampled"
            or other.endswith(f" {options['top_k']}")
        }
        if name == "sampled":
            mine["own topk 64"] = timings["topk 64"]
        records.append(
            Record(
                suite="capture",
                name="capture",
                shape={"R": num_rows, "V": vocab, "K": options.get("top_k", 256)},
                options={"mode": name.split()[0], "text": text},
                timing=timings[name],
                floor="read once",
                floor_ms=bench.copy_ms(num_rows * vocab * logits_RV.element_size()),
                peak_bytes=bench.peak_bytes(functions[name]),
                error=_error(logits_RV, options),
                peers=mine,
            )
        )
    return records


def _error(logits_RV: torch.Tensor, options: dict[str, Any]) -> dict[str, float]:
    """Largest error of the statistics on some rows, and the share of rows with another support."""
    part_RV = logits_RV[:_CHECKED_ROWS]
    found = capture(part_RV, **options, impl="triton")
    expected = capture(part_RV.double(), **options, impl="eager")
    return {
        "entropy": largest_error(found.entropy_R, expected.entropy_R),
        "tail_log_partition": largest_error(
            found.tail_log_partition_RT, expected.tail_log_partition_RT
        ),
        "top1_logp": largest_error(found.top1_logp_R, expected.top1_logp_R),
        "rows_with_another_support": float(
            (found.ids_RK != expected.ids_RK).any(-1).double().mean()
        ),
    }


def _eager(logits_RV: torch.Tensor, k: int) -> object:
    """The same statistics by torch's operations, in slices of 1024 rows to fit."""
    results = []
    for start in range(0, len(logits_RV), 1024):
        logp_RV = torch.log_softmax(logits_RV[start : start + 1024].float(), dim=-1)
        entropy_R = -(logp_RV.exp() * logp_RV).sum(-1)
        partitions = [torch.logsumexp(logp_RV / t, -1) for t in (0.5, 1.5, 2.0, 3.0, 4.0)]
        results.append((logp_RV.topk(k), entropy_R, partitions))
    return results
