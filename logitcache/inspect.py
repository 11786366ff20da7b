"""``logitcache inspect``: where the two teachers of a store disagree, and what the gate does then.

Every position that is trained on falls in a cell of a histogram over (JS, confidence of teacher 1,
gold label), whose edges contain the thresholds: shares of the strategies follow from it exactly, at
the thresholds given and at every other edge. JS and confidence come from the eager gate
(``logitcache_kernels.distill_reference``).

Memory: a batch of BATCH_TOKENS tokens as the reader holds it, and what the gate makes of some
hundred positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from logitcache_kernels import STRATEGY_NAMES, DistillSpec, SparseTeacher
from logitcache_kernels.distill_reference import (
    confidence_reference,
    gate_reference,
    usable_gold,
)

from .errors import Interrupted, UsageError
from .reader import StoreReader, TeacherBatch

# Legend: P positions, G teachers, J and C cells along JS and confidence, 2 without and with gold.
BATCH_TOKENS = 4096
MOST_POSITIONS = 1 << 18  # of a store, looked at by default
MOST_ROWS = 64  # on a page
_GATE_ENTRIES = 1 << 22  # of positions x kept entries in one call of the gate
_EXTREMES = 16  # positions in the list of the largest JS

Report = Callable[[int, int], None]
"""Called as report(rows done, rows) after each batch."""


class Extreme(NamedTuple):
    """A position with a large JS, its token and the next one."""

    js: float
    row: int
    position: int
    tokens: tuple[int, int]


@dataclass
class Measured:
    """What was found in some rows of a store.

    counts_JC2: positions in each cell. Cell j along JS holds js_edges[j] <= JS < js_edges[j + 1]
    (the last one all above), cell c along confidence confidence_edges[c - 1] < conf <=
    confidence_edges[c]. So BLENDED at threshold js_edges[k] are the cells j < k, and surer than
    confidence_edges[k] are c > k; ``inspect_page.split_by_strategy`` does this, and the page's
    script. mean_js_row: of each row in rows, NaN without positions.
    extremes: positions with the largest JS, largest first, each pair of tokens once.
    """

    spec: DistillSpec
    rows: np.ndarray
    store_rows: int
    js_edges: np.ndarray
    confidence_edges: np.ndarray
    counts_JC2: np.ndarray
    mean_js_row: np.ndarray
    strategies: np.ndarray  # positions of each strategy, as the gate itself decided
    sum_js: float = 0.0
    sum_confidence: list[float] = field(default_factory=list)  # of each teacher
    same_top1: int = 0
    extremes: list[Extreme] = field(default_factory=list)

    @property
    def positions(self) -> int:
        return int(self.counts_JC2.sum())

    @property
    def gold_positions(self) -> int:
        return int(self.counts_JC2[:, :, 1].sum())


def edges_with(step: float, *extra: float) -> np.ndarray:
    """0 to 1 in steps, and other values among them: float32, as the gate compares."""
    grid = np.arange(round(1 / step) + 1) / round(1 / step)
    return np.unique(np.concatenate([grid, extra]).astype(np.float32))


@dataclass(frozen=True)
class Positions:
    """The positions of a batch that are trained on: where they are (indices into its P), and what
    the gate says of them."""

    at_P: np.ndarray
    gold_P: np.ndarray
    js_P: np.ndarray
    confidence_GP: np.ndarray  # of each teacher
    strategy_P: np.ndarray
    top1_GP: np.ndarray  # likeliest token of each teacher


def gate_positions(batch: TeacherBatch, spec: DistillSpec, vocab_size: int) -> Positions:
    """Run the eager gate on the trained positions of a batch."""
    labels_P = torch.from_numpy(batch.labels).flatten()
    gold_P = usable_gold(labels_P, torch.from_numpy(batch.gold).flatten(), None, vocab_size)
    (at_P,) = (labels_P != -100).nonzero(as_tuple=True)
    teachers = [teacher.sparse_teacher(1.0) for teacher in batch.teachers]
    width = sum(teacher.ids_RK.shape[1] for teacher in teachers)
    parts: list[tuple[torch.Tensor, ...]] = []
    for part in at_P.split(max(_GATE_ENTRIES // (width * 64), 16)):
        chosen = [SparseTeacher._make(_take(x, part) for x in teacher) for teacher in teachers]
        gate_of, size_of = _renumber(chosen, vocab_size)
        gate = gate_reference(gate_of, labels_P[part], spec, size_of, gold_P[part])
        confidence_GP = torch.stack(
            [confidence_reference(t, spec.confidence, size_of) for t in gate_of]
        )
        top1_GP = torch.stack([t.ids_RK.gather(1, t.logp_RK.argmax(1, True))[:, 0] for t in chosen])
        parts.append((gate.js_R, confidence_GP, gate.strategy_R, top1_GP))
    joined = [torch.cat(part, dim=-1).numpy() for part in zip(*parts, strict=True)]
    return Positions(at_P.numpy(), gold_P[at_P].numpy(), *joined)


def _take(values: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor | None:
    return None if values is None else values[part]


def _renumber(
    teachers: Sequence[SparseTeacher], vocab_size: int
) -> tuple[list[SparseTeacher], int]:
    """The same teachers over the ids that some of them keep alone, and how many these are.

    The gate looks at which ids are equal, not at what they are; its dense tables are then as wide
    as needed, not as the vocabulary. Entropies are scaled so that 1 - H / log V stays as it is.
    """
    shapes = [teacher.ids_RK.shape for teacher in teachers]
    flat = torch.cat([teacher.ids_RK.flatten() for teacher in teachers])
    flat = torch.where((flat >= 0) & (flat < vocab_size), flat, -1)
    ids, places = torch.unique(torch.cat([flat, flat.new_tensor([-1])]), return_inverse=True)
    size = max(len(ids) - 1, 2)
    scale = float(np.log(size) / np.log(max(vocab_size, 2)))
    sizes = [shape.numel() for shape in shapes]
    renumbered = []
    for teacher, shape, part in zip(teachers, shapes, places[:-1].split(sizes), strict=True):
        assert teacher.entropy_R is not None
        renumbered.append(
            teacher._replace(
                ids_RK=(part.reshape(shape) - 1).int(), entropy_R=teacher.entropy_R * scale
            )
        )
    return renumbered, size


def measure(
    reader: StoreReader,
    spec: DistillSpec,
    *,
    sample: int | None = None,
    seed: int = 0,
    report: Report = lambda *_: None,
    stop: Callable[[], bool] = lambda: False,
) -> Measured:
    """Look at all rows of a store, or at ``sample`` rows drawn with ``seed`` (by default as many as
    hold MOST_POSITIONS tokens).

    StoreError if the store is damaged, Interrupted when stop() says so.
    """
    seq_len, num_rows = int(reader.manifest["seq_len"]), len(reader)
    most = max(MOST_POSITIONS // seq_len, 1) if sample is None else sample
    rows = np.arange(num_rows)
    if most < num_rows:
        rows = np.sort(np.random.default_rng(seed).choice(num_rows, most, replace=False))
    js_edges = edges_with(0.005, spec.js_threshold)
    confidence_edges = edges_with(0.01, spec.confidence_threshold)
    found = Measured(
        spec,
        rows,
        num_rows,
        js_edges,
        confidence_edges,
        np.zeros((len(js_edges), len(confidence_edges) + 1, 2), np.int64),
        np.full(len(rows), np.nan),
        np.zeros(len(STRATEGY_NAMES), np.int64),
        sum_confidence=[0.0] * len(reader.store.teachers),
    )
    per_batch = max(BATCH_TOKENS // seq_len, 1)
    batches = [rows[at : at + per_batch] for at in range(0, len(rows), per_batch)]
    done = 0
    for index, batch in zip(batches, reader.batches(batches), strict=True):
        if stop():
            raise Interrupted("stopped; nothing was written", "run the same command again")
        new = gate_positions(batch, spec, int(reader.manifest["vocab_size"]))
        _add(found, index, done, new, batch)
        done += len(index)
        report(done, len(rows))
    return found


def _add(
    found: Measured, index: np.ndarray, done: int, new: Positions, batch: TeacherBatch
) -> None:
    """Count a batch, whose rows are index, after ``done`` rows."""
    j_P = np.searchsorted(found.js_edges, new.js_P, side="right") - 1
    c_P = np.searchsorted(found.confidence_edges, new.confidence_GP[0], side="left")
    np.add.at(found.counts_JC2, (j_P, c_P, new.gold_P.astype(int)), 1)
    found.strategies += np.bincount(new.strategy_P, minlength=len(STRATEGY_NAMES))
    found.sum_js += float(new.js_P.sum(dtype=np.float64))
    for teacher, values_P in enumerate(new.confidence_GP):
        found.sum_confidence[teacher] += float(values_P.sum(dtype=np.float64))
    found.same_top1 += int((new.top1_GP[0] == new.top1_GP[-1]).sum())
    row_P, position_P = np.divmod(new.at_P, batch.labels.shape[1])
    totals = np.bincount(row_P, minlength=len(index))
    sums = np.bincount(row_P, new.js_P, minlength=len(index))
    has = totals > 0
    found.mean_js_row[done : done + len(index)][has] = sums[has] / totals[has]
    _keep_extremes(found, index, new.js_P, row_P, position_P, batch)


def _keep_extremes(
    found: Measured,
    index: np.ndarray,
    js_P: np.ndarray,
    row_P: np.ndarray,
    position_P: np.ndarray,
    batch: TeacherBatch,
) -> None:
    """Keep the positions with the largest JS of all batches so far, each pair of tokens once."""
    best: dict[tuple[int, int], Extreme] = {entry.tokens: entry for entry in found.extremes}
    least = found.extremes[-1].js if len(found.extremes) == _EXTREMES else -1.0
    for i in np.argsort(-js_P, kind="stable"):
        if js_P[i] <= least:
            break
        row, at = int(row_P[i]), int(position_P[i])
        first, second = (int(batch.rows.tokens[row, at + step]) for step in (0, 1))
        new = Extreme(float(js_P[i]), int(index[row]), at, (first, second))
        if new.tokens not in best or best[new.tokens].js < new.js:
            best[new.tokens] = new
        if len(best) >= 2 * _EXTREMES:
            break
    order = sorted(best.values(), key=lambda entry: (-entry.js, entry.row, entry.position))
    found.extremes = order[:_EXTREMES]


def rows_to_show(found: Measured, number: int) -> list[int]:
    """The rows with the largest mean JS among those that were looked at, largest first."""
    order = np.argsort(-np.nan_to_num(found.mean_js_row, nan=-1.0), kind="stable")
    return [int(found.rows[i]) for i in order[:number] if not np.isnan(found.mean_js_row[i])]


def parse_rows(text: str, num_rows: int) -> list[int]:
    """Row numbers like 0,4,7-9, each once, in this order. UsageError for others."""
    rows: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"--rows {text}: expected numbers like 0,4,7-9, found {part!r}")
        start, stop = int(first), int(last or first)
        if not start <= stop < num_rows:
            raise UsageError(f"--rows {text}: expected rows from 0 to {num_rows - 1}, found {part}")
        rows += range(start, min(stop + 1, start + MOST_ROWS + 1))
    rows = list(dict.fromkeys(rows))
    if len(rows) > MOST_ROWS:
        raise UsageError(f"--rows {text}: expected at most {MOST_ROWS} rows on a page")
    return rows


def figures(found: Measured, info: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a measurement as one JSON document. info: of ``describe_store``."""
    spec, positions = found.spec, max(found.positions, 1)
    names = [teacher["name"] for teacher in info["teachers"]]
    by_js = found.counts_JC2.sum((1, 2))
    by_confidence = found.counts_JC2.sum((0, 2))
    return {
        "rows": found.store_rows,
        "rows_measured": len(found.rows),
        "positions": found.positions,
        "gold_positions": found.gold_positions,
        "js_threshold": spec.js_threshold,
        "confidence_threshold": spec.confidence_threshold,
        "confidence": spec.confidence,
        "shares": {
            name: int(count) / positions
            for name, count in zip(STRATEGY_NAMES, found.strategies, strict=True)
        },
        "mean_js": found.sum_js / positions if len(names) == 2 else None,
        "same_top1": found.same_top1 / positions if len(names) == 2 else None,
        "mean_confidence": {
            name: total / positions for name, total in zip(names, found.sum_confidence, strict=True)
        },
        "js_histogram": {"edges": _plain(found.js_edges), "counts": by_js.tolist()},
        "confidence_histogram": {
            "edges": _plain(found.confidence_edges),
            "counts": by_confidence.tolist(),
        },
        "bytes": info["bytes"],
        "teachers": [
            {
                key: teacher[key]
                for key in ("name", "bytes_per_token", "mean_support", "mass_covered")
            }
            for teacher in info["teachers"]
        ],
    }


def _plain(edges: np.ndarray) -> list[float]:
    """Edges as the decimals that they were made of."""
    return [float(f"{edge:.7g}") for edge in edges]
