"""``logitcache verify --rescore N``: do the teachers still say what is stored?

N rows drawn by a seed go through each teacher again. Three differences are set side by side, each
between a fresh run A and

    store         what the store holds
    quantisation  A itself, encoded and decoded again: what storing costs on these very rows
    noise         a second run B of the same rows in batches of another composition, and for low
                  precision also in float32: what the arithmetic leaves open

A store that this teacher wrote from this text has store = quantisation where nothing is noisy. Of
the distribution that is KL(A || other) over the entries that are stored for certain and one bucket
for the rest. P positions, K entries.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitcache_kernels import capture

from .causal_lm import (
    Head,
    check_model,
    choose_device,
    choose_dtype,
    hidden_states,
    load_causal_lm,
    model_identity,
)
from .differences import Rescored, Rescoring, by_id, kl, unlike
from .errors import Interrupted, UsageError
from .fetch import fetch
from .packed_attention import longest_segment, segment_bounds, use_varlen
from .packing import Rows
from .padded import TeacherSupport, side_by_side
from .reader import StoreReader
from .repair import recorded_settings
from .store import Store
from .support import decode_row, encode_row, support_of
from .teacher import BATCH_TOKENS, capture_options

# Logits of one chunk, of which several copies exist here.
_CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**27}
Report = Callable[[int, int], None]
"""Called as report(rows done, rows) after each batch."""


def teacher_folders(store: Store, given: Mapping[str, Path | None]) -> dict[str, Path]:
    """The folder of each teacher: the given one, else that of the run record beside the store.

    UsageError where none is known, or where it holds another model than the store says.
    """
    recorded = recorded_settings(store.path)
    folders = {}
    for name in given:
        if given[name] is not None and name not in store.teachers:
            raise UsageError(f"--{name}: {store.path} has no {name}", "leave it out")
    for name, attributes in store.teachers.items():
        folder = given.get(name) or recorded.get(name)
        if folder is None or not Path(folder).is_dir():
            where = "no run record names it" if folder is None else f"{folder} is not there"
            raise UsageError(f"{store.path}: folder of {name}: {where}", f"give --{name} DIR")
        folders[name] = Path(folder)
        found, wanted = model_identity(folders[name]), attributes["model"]
        for key, value in wanted.items():
            if found.get(key) != value:
                raise UsageError(
                    f"{folder}: not the model that {store.path} has as {name}: {key}: expected "
                    f"{str(value)[:16]}..., found {str(found.get(key))[:16]}...",
                    f"give --{name} the folder that the store was built with",
                )
    return folders


def rescore_drawn(
    store: Store,
    folders: Mapping[str, Path],
    count: int,
    seed: int,
    *,
    report: Report = lambda *_: None,
    stop: Callable[[], bool] = lambda: False,
) -> Rescoring:
    """Rescore ``count`` rows that the seed draws, or all there are."""
    num_rows = int(store.manifest["rows"])
    drawn = np.random.default_rng(seed).choice(num_rows, min(count, num_rows), replace=False)
    rows = np.sort(drawn)
    teachers = rescore(store, folders, rows, report=report, stop=stop)
    return Rescoring(store.path, rows.tolist(), seed, teachers)


def rescore(
    store: Store,
    folders: Mapping[str, Path],
    rows: np.ndarray,
    *,
    report: Report = lambda *_: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Rescored]:
    """Run the teachers on these rows again, one after the other, and compare.

    Raises Interrupted when stop says so between batches; StoreError for what cannot be read.
    """
    reader = StoreReader(store)
    results = []
    for name, folder in folders.items():
        run = _Run(reader, name, folder)
        done = 0
        for index in _batches(reader, rows, run.device):
            if stop():
                raise Interrupted("rescoring stopped", "run the same command again")
            run.compare(index)
            done += len(index)
            report(done, len(rows))
        results.append(run.result)
        del run  # its model, before the next one is loaded
    return results


def _batches(reader: StoreReader, rows: np.ndarray, device: torch.device) -> list[np.ndarray]:
    size = max(BATCH_TOKENS[device.type] // int(reader.manifest["seq_len"]), 2)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class _Run:
    """One teacher's model, and what was found with it so far."""

    def __init__(self, reader: StoreReader, name: str, folder: Path):
        self.reader, self.name = reader, name
        self.attributes = reader.store.teachers[name]
        self.device = choose_device("auto")
        dtype = choose_dtype(self.attributes.get("dtype", "auto"), self.device)
        self.model = load_causal_lm(folder, dtype, self.device)
        use_varlen(self.model)
        check_model(self.model, folder)
        # The same weights: what differs is the arithmetic.
        self.exact = None if dtype == torch.float32 else copy.deepcopy(self.model).float()
        self.result = Rescored(name, folder, str(dtype).removeprefix("torch."), str(self.device))

    def compare(self, index: np.ndarray) -> None:
        """Add a batch of rows to the result."""
        rows = self.reader.read_rows(index)
        at_row, at_token = np.nonzero(rows.labels() != -100)
        if not len(at_row):  # pieces of documents of which nothing is trained on
            return
        position = at_row * rows.tokens.shape[1] + at_token
        place = list(self.reader.store.teachers).index(self.name)
        stored = _certain(self.reader[index].teachers[place], position)
        together = [list(range(len(index)))]
        # One by one, or twice side by side where there is but one.
        apart = [[n] if len(index) > 1 else [n, n] for n in range(len(index))]
        first = self._forward(self.model, rows, index, together, stored)
        others = [self._forward(self.model, rows, index, apart, stored)]
        if self.exact is not None:
            others.append(self._forward(self.exact, rows, index, apart, stored))
        again = _certain(self._stored_again(first.captured, index, at_row, at_token), position)

        has_P = stored.ids_PK[:, 0] >= 0
        both_P = has_P & first.kept_P & np.all([o.kept_P for o in others], axis=0)
        result = self.result
        result.unlike_positions += int((has_P != first.kept_P).sum())
        result.positions += int(both_P.sum())
        kls = {
            "store": kl(first.logp_PK, stored.logp_PK, stored.tail_P),
            "quantisation": kl(by_id(first.captured)[1], again.logp_PK, again.tail_P),
            "noise": np.max([kl(first.logp_PK, o.logp_PK, None) for o in others], axis=0),
        }
        for against, kl_P in kls.items():
            result.add(against, "kl", kl_P[both_P])
        for number, row in enumerate(index.tolist()):
            own_P = both_P & (at_row == number)
            if own_P.any():
                result.rows[row] = {k: float(kl_P[own_P].mean()) for k, kl_P in kls.items()}
        for key, name in (("entropy", "entropy"), ("top1", "top1_logp"), ("gold", "gold_logp")):
            exact_P = first.captured[key]
            noise = [np.abs(exact_P - other.captured[key]) for other in others]
            result.add("store", name, np.abs(exact_P - stored.fields[key])[both_P])
            result.add("quantisation", name, np.abs(exact_P - again.fields[key])[both_P])
            result.add("noise", name, np.max(noise, axis=0)[both_P])
        ids_PK = by_id(first.captured)[0]
        supports = result.supports
        supports["store"] += int(unlike(ids_PK, stored.ids_PK)[both_P].sum())
        noisy = [unlike(ids_PK, by_id(other.captured)[0]) for other in others]
        supports["noise"] += int(np.any(noisy, axis=0)[both_P].sum())

    @torch.inference_mode()
    def _forward(
        self, model: Any, rows: Rows, index: np.ndarray, batches: list[list[int]], stored: _Certain
    ) -> _Fresh:
        """Run these batches of rows; what is new at each row's labelled positions, in order."""
        head, labels, positions = Head.of(model), rows.labels(), rows.positions()
        hidden, lengths = [], rows.lengths()
        for batch in batches:
            length = int(lengths[batch].max())
            tokens = torch.from_numpy(rows.tokens[batch, :length].astype(np.int64))
            where = positions[batch, :length]
            bounds = segment_bounds(where)
            hidden_BLD = hidden_states(
                model,
                tokens.to(self.device),
                torch.from_numpy(where).to(self.device),
                torch.from_numpy(bounds).to(self.device),
                longest_segment(bounds),
            )
            for number, row in enumerate(dict.fromkeys(batch)):
                at = torch.from_numpy(np.flatnonzero(labels[row, :length] != -100))
                hidden.append(hidden_BLD[number, at.to(self.device)])
        hidden_PD = torch.cat(hidden)
        at_row, at_token = np.nonzero(labels != -100)
        labels_P = torch.from_numpy(labels[at_row, at_token]).to(self.device)
        number = index[at_row] * labels.shape[1] + at_token  # decides what is drawn
        numbers_P = torch.from_numpy(number).to(self.device)
        ids_PK = torch.from_numpy(stored.ids_PK.astype(np.int64)).to(self.device)
        vocab_size = int(self.reader.manifest["vocab_size"])
        chunk = max(_CHUNK_ELEMENTS[self.device.type] // head.weight_VD.shape[0], 16)
        parts, logps = [], []
        for start in range(0, len(hidden_PD), chunk):
            part = slice(start, start + chunk)
            logits = head.logits(hidden_PD[part])[:, :vocab_size]
            captured = capture(
                logits,
                labels_R=labels_P[part],
                num_tokens=vocab_size,
                temperatures=self.reader.manifest["temperatures"],
                position_ids_R=numbers_P[part],
                **capture_options(self.attributes),
            )
            parts.append(captured)
            logp_RV = logits.float().log_softmax(-1)
            kept_RK = logp_RV.gather(-1, ids_PK[part].clamp_min(0))
            logps.append(kept_RK.masked_fill(ids_PK[part] < 0, -torch.inf).cpu().numpy())
        joined = fetch(parts)
        return _Fresh(joined, joined["count"] >= 0, np.concatenate(logps))

    def _stored_again(
        self,
        captured: Mapping[str, np.ndarray],
        index: np.ndarray,
        at_row: np.ndarray,
        at_token: np.ndarray,
    ) -> TeacherSupport:
        """A capture as a store of it would give it back."""
        manifest = self.reader.manifest
        grid, seq_len = manifest["temperatures"], int(manifest["seq_len"])
        order = np.arange(manifest["vocab_size"], dtype=np.uint32)
        supports = []
        for number, row in enumerate(index.tolist()):
            own = {key: values[at_row == number] for key, values in captured.items()}
            support = support_of(own, at_token[at_row == number], seq_len, self.attributes)
            planes = encode_row(support, self.attributes, grid, order, row)
            supports.append(decode_row(planes, self.attributes, grid, order, row))
        return side_by_side(supports, self.attributes, self.reader.temperatures, seq_len)


@dataclass(frozen=True)
class _Fresh:
    """A run: its capture, where that is finite, and logp at the entries stored for certain."""

    captured: dict[str, np.ndarray]
    kept_P: np.ndarray
    logp_PK: np.ndarray


@dataclass(frozen=True)
class _Certain:
    """What is stored for certain, ids rising, -1 and -inf behind them; mass of the tail."""

    ids_PK: np.ndarray
    logp_PK: np.ndarray
    tail_P: np.ndarray
    fields: dict[str, np.ndarray]


def _certain(teacher: TeacherSupport, position: np.ndarray) -> _Certain:
    ids_PK, logp_PK = teacher.ids_PK[position], teacher.logp_PK[position]
    certain_PK = ids_PK >= 0
    if teacher.inclusion_PK is not None:
        certain_PK &= teacher.inclusion_PK[position] >= 1
    found = by_id({"ids": ids_PK, "logp": logp_PK, "certain": certain_PK})
    fields = {
        "entropy": teacher.entropy_P[position],
        "top1": teacher.top1_logp_P[position],
        "gold": teacher.gold_logp_P[position],
    }
    one = teacher.temperatures.index(1.0)
    return _Certain(*found, np.exp(teacher.tail_PT[position, one].astype(np.float64)), fields)
