"""Reading a store: ``open_store(path)`` gives a StoreReader, ``reader[rows]`` a TeacherBatch.

Memory: a batch of P positions with K entries at most takes 13 P K bytes a teacher, decoding a row
as much again; ``batches`` holds ``ahead + workers`` batches. Open shards take their index and the
frequency order each (some 0.3 MB), 64 of them at most.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .codec import decode_order, dither_gain
from .errors import StoreError
from .layout import ROW_ARRAYS, TEACHERS
from .packing import Rows
from .shards import ShardFile
from .store import Store, load_store, load_tokenizer_content
from .support import Support, decode_row

if TYPE_CHECKING:
    from logitcache_kernels import SparseTeacher

# An entry that was drawn stays one whatever rounding does to its probability.
_MOST_INCLUSION = np.float32(1 - 2**-20)
_OPEN_SHARDS = 64  # of a part each, with up to five files


@dataclass(frozen=True)
class TeacherSupport:
    """One teacher at P positions, decoded. Shapes: K entries, T grid points.

    ids_PK: int32, -1 padding. logp_PK: float32, normalised so that certain entries and tail add up
    to 1. inclusion_PK: float32, 1 = certain; None for top-k supports. flat_PK: bool, sampled
    entries whose inclusion is p / threshold, not p^S / threshold; None for top-k supports. tail_PT,
    entropy_P, top1_logp_P, gold_logp_P: float32. A position without anything stored has ids -1,
    logp -inf and tail -inf.
    """

    ids_PK: np.ndarray
    logp_PK: np.ndarray
    inclusion_PK: np.ndarray | None
    flat_PK: np.ndarray | None
    tail_PT: np.ndarray
    entropy_P: np.ndarray
    top1_logp_P: np.ndarray
    gold_logp_P: np.ndarray
    temperatures: tuple[float, ...]
    sample_temperature: float
    precision: str

    def sparse_teacher(self, temperature: float) -> SparseTeacher:
        """The support as tensors with the log-partition at this temperature.

        The estimate p^T / inclusion of sampled entries has no bias from rounding: see ``codec``.
        """
        import torch

        from logitcache_kernels import SparseTeacher, log_partition

        logp_PK, inclusion_PK = self.logp_PK, self.inclusion_PK
        certain_PK = self.ids_PK >= 0
        if inclusion_PK is not None:
            certain_PK &= inclusion_PK >= 1
            logp_PK, inclusion_PK = self._weighted(temperature, certain_PK)
        certain = torch.from_numpy(certain_PK)
        partition_P = log_partition(
            torch.from_numpy(self.logp_PK),
            certain,
            torch.from_numpy(self.tail_PT),
            temperature,
            self.temperatures,
        )
        partition_P = torch.where(certain.any(-1), partition_P, 0.0)
        return SparseTeacher(
            torch.from_numpy(self.ids_PK),
            torch.from_numpy(logp_PK),
            partition_P,
            torch.from_numpy(self.entropy_P),
            None if inclusion_PK is None else torch.from_numpy(inclusion_PK),
        )

    def _weighted(
        self, temperature: float, certain_PK: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """logp and inclusion such that p^T / inclusion is the unbiased weight, and inclusion below
        1: where it would not be, logp gives way."""
        assert self.inclusion_PK is not None
        assert self.flat_PK is not None
        tempered = dither_gain(1 / temperature - 1 / self.sample_temperature, self.precision)
        flat = dither_gain(1 / temperature - 1, self.precision)
        gain_PK = np.where(self.flat_PK, np.float32(flat), np.float32(tempered))
        sampled_PK = (self.ids_PK >= 0) & ~certain_PK
        raised_PK = np.where(sampled_PK, self.inclusion_PK * gain_PK, self.inclusion_PK)
        over_PK = sampled_PK & (raised_PK > _MOST_INCLUSION)
        logp_PK = self.logp_PK
        if over_PK.any():
            logp_PK = logp_PK.copy()
            logp_PK[over_PK] -= temperature * np.log(raised_PK[over_PK])
            raised_PK[over_PK] = _MOST_INCLUSION
        return logp_PK, raised_PK.astype(np.float32)


@dataclass(frozen=True)
class TeacherBatch:
    """B rows with their teachers. Position p = b * L + l of a teacher's arrays is token l of row b.

    labels: int64 [B, L], next tokens, -100 where nothing is trained on (also where a teacher was
    skipped). gold: bool [B, L], which labels are gold. positions: int64 [B, L], position ids,
    restarting per segment.
    """

    rows: Rows
    positions: np.ndarray
    labels: np.ndarray
    gold: np.ndarray
    teachers: tuple[TeacherSupport, ...]


class _OpenShards:
    """Shards that are open, the 64 used last. Any thread may ask."""

    def __init__(self, store: Store):
        self._store = store
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[str, int], tuple[dict[str, ShardFile], np.ndarray]] = (
            OrderedDict()
        )

    def get(self, part: str, shard: int) -> tuple[dict[str, ShardFile], np.ndarray]:
        """A shard's files by array, and a teacher's frequency order (empty for rows)."""
        key = (part, shard)
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
        files = self._store.open_shard(part, shard)
        order = np.zeros(0, np.uint32)
        if "order" in files:
            order = decode_order(files["order"].read(0, self._store.manifest["vocab_size"]))
        with self._lock:
            self._open[key] = files, order
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return files, order


class StoreReader:
    """Random access to a complete store. StoreError if something is missing or fails its
    checksum."""

    def __init__(self, store: Store):
        self.store = store
        self.manifest = store.manifest
        self.temperatures = tuple(float(t) for t in self.manifest["temperatures"])
        self._shards = _OpenShards(store)

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> TeacherBatch:
        if isinstance(rows, slice):
            index = np.arange(*rows.indices(len(self)))
        else:
            index = np.atleast_1d(np.asarray(rows, dtype=np.int64))
        if len(index) and not -len(self) <= index.min() <= index.max() < len(self):
            raise IndexError(f"rows: expected numbers below {len(self)}, found {index.tolist()}")
        index = index % len(self)
        batch = self.read_rows(index)
        labels = batch.labels()
        teachers = tuple(self._teacher(name, index) for name in self.store.teachers)
        for teacher in teachers:  # nothing stored at a label: the teacher was skipped there
            labels[(teacher.ids_PK[:, 0] < 0).reshape(labels.shape)] = -100
        return TeacherBatch(batch, batch.positions(), labels, batch.gold_labels(), teachers)

    def batches(
        self, rows: Iterable[Sequence[int] | np.ndarray], workers: int = 2, ahead: int = 2
    ) -> Iterator[TeacherBatch]:
        """Batches of the given row numbers, in this order, read by threads beforehand.

        At most ``ahead + workers`` batches wait or are being made; what a batch holds does not
        depend on workers.
        """
        if workers < 1:
            yield from (self[index] for index in rows)
            return
        waiting: deque[Future[TeacherBatch]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="store-reader")
        try:
            for index in rows:
                waiting.append(pool.submit(self.__getitem__, index))
                if len(waiting) >= ahead + workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # also when the consumer stops early
            for future in waiting:
                future.cancel()
            pool.shutdown(wait=True)

    def read_rows(self, index: np.ndarray) -> Rows:
        """The rows alone, without teachers."""
        length = int(self.manifest["seq_len"])
        parts = {
            name: [self.read_row_array(name, int(row)) for row in index] for name in ROW_ARRAYS
        }
        empty = np.zeros((0, length))
        return Rows(
            *(
                np.stack(parts[name]) if parts[name] else empty.astype(dtype)
                for name, dtype in ROW_ARRAYS.items()
            )
        )

    def read_row_array(self, name: str, row: int) -> np.ndarray:
        """One array of one row, [L]. StoreError if it is damaged."""
        shard, within = divmod(row, self.manifest["shard_rows"])
        with _named(self.store, "rows", row):
            files, _ = self._shards.get("rows", shard)
            return files[name].read(within, int(self.manifest["seq_len"]))[0]

    def read_support(self, name: str, row: int) -> Support:
        """One teacher on one row, decoded, not padded. StoreError if it is damaged."""
        shard, within = divmod(row, self.manifest["shard_rows"])
        with _named(self.store, name, row):
            files, order = self._shards.get(name, shard)
            length = self.manifest["seq_len"]
            planes = {array: files[array].read(within, length) for array in ("count", "fields")}
            totals = planes["count"].sum(1, dtype=np.int64)
            for array, total in zip(("certain", "sampled"), totals, strict=False):
                planes[array] = files[array].read(within, int(total))
            return decode_row(
                planes, self.store.teachers[name], self.manifest["temperatures"], order, row
            )

    @cached_property
    def tokenizer_content(self) -> dict[str, Any]:
        return load_tokenizer_content(self.store.path)

    @property
    def max_temperature(self) -> float:
        """The largest temperature that training may use: sampled supports lose accuracy beyond
        theirs."""
        limits = [max(self.temperatures)]
        for attributes in self.store.teachers.values():
            if attributes["estimator"] == "sampled":
                limits.append(float(attributes["sample_temperature"]))
        return min(limits)

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["store"])  # type: ignore[misc]

    def _teacher(self, name: str, index: np.ndarray) -> TeacherSupport:
        """Rows side by side, as wide as the widest position."""
        supports = [self.read_support(name, int(row)) for row in index]
        attributes, length = self.store.teachers[name], int(self.manifest["seq_len"])
        totals = [
            s.certain.count_P + (0 if s.sampled is None else s.sampled.count_P) for s in supports
        ]
        width = max([1, *(int(total.max(initial=0)) for total in totals)])
        shape = (len(supports) * length, width)
        sampled = attributes["estimator"] == "sampled"
        ids_PK = np.full(shape, -1, np.int32)
        logp_PK = np.full(shape, -np.inf, np.float32)
        inclusion_PK = np.zeros(shape, np.float32) if sampled else None
        flat_PK = np.zeros(shape, bool) if sampled else None
        for number, support in enumerate(supports):
            part = slice(number * length, (number + 1) * length)
            ids, logp = ids_PK[part].reshape(-1), logp_PK[part].reshape(-1)
            at = np.arange(length) * width
            places = _places(at, support.certain.count_P)
            ids[places] = support.certain.ids
            logp[places] = support.certain.logp
            if support.sampled is None:
                continue
            assert inclusion_PK is not None
            assert flat_PK is not None
            inclusion, flat = inclusion_PK[part].reshape(-1), flat_PK[part].reshape(-1)
            inclusion[places] = 1.0
            places = _places(at + support.certain.count_P, support.sampled.count_P)
            ids[places] = support.sampled.ids
            logp[places] = support.sampled.logp
            flat[places] = support.sampled.flat
            inclusion[places] = self._inclusion(attributes, support)
        fields = [support.fields for support in supports]
        grid = np.zeros((0, len(self.temperatures)), np.float32)

        def joined(name: str) -> np.ndarray:
            parts = [getattr(each, name) for each in fields]
            return np.concatenate(parts) if parts else np.zeros(0, np.float32)

        return TeacherSupport(
            ids_PK,
            logp_PK,
            inclusion_PK,
            flat_PK,
            joined("tail_PT") if fields else grid,
            joined("entropy_P"),
            joined("top1_P"),
            joined("gold_P"),
            self.temperatures,
            float(attributes.get("sample_temperature", 1.0)),
            attributes["precision"],
        )

    def _inclusion(self, attributes: dict[str, Any], support: Support) -> np.ndarray:
        """With what probability each sampled entry was kept, float32 [E], below 1."""
        temperature = np.float32(attributes["sample_temperature"])
        certain, sampled = support.certain, support.sampled
        assert sampled is not None
        assert sampled.flat is not None
        total_P = np.exp(self._tail(support.fields.tail_PT, float(temperature)))
        has = certain.count_P > 0
        if len(certain.logp):
            starts = (certain.count_P.cumsum() - certain.count_P)[has]
            total_P[has] += np.add.reduceat(np.exp(certain.logp / temperature), starts)
        partition_P = np.log(total_P, where=has, out=np.zeros_like(total_P))
        tempered = sampled.logp / temperature - np.repeat(partition_P, sampled.count_P)
        inclusion = np.exp(np.where(sampled.flat, sampled.logp, tempered))
        return np.minimum(inclusion / np.float32(attributes["threshold"]), _MOST_INCLUSION)

    def _tail(self, tail_PT: np.ndarray, temperature: float) -> np.ndarray:
        """G(temperature), which need not be on the grid."""
        if temperature in self.temperatures:
            return tail_PT[:, self.temperatures.index(temperature)]
        from logitcache_kernels.log_partition import spline_weights

        weights = spline_weights(temperature, self.temperatures).numpy().astype(np.float32)
        empty_P = np.atleast_1d(np.isneginf(tail_PT).any(1))
        tail_P = np.where(empty_P[:, None], 0, tail_PT) @ weights
        tail_P[empty_P] = -np.inf
        return tail_P


def _places(starts_P: np.ndarray, count_P: np.ndarray) -> np.ndarray:
    """Where each entry goes: starts_P[p], starts_P[p] + 1, ... for the count_P[p] of position p."""
    before_P = count_P.cumsum() - count_P
    return np.arange(int(count_P.sum())) + np.repeat(starts_P - before_P, count_P)


@contextlib.contextmanager
def _named(store: Store, part: str, row: int) -> Iterator[None]:
    """Say in a StoreError which row could not be read, and what to do."""
    try:
        yield
    except (StoreError, OSError, ValueError, RuntimeError) as error:
        raise StoreError(
            f"{store.path}: {part}: row {row} cannot be read: {error}",
            f"logitcache verify {store.path}; logitcache repair {store.path}",
        ) from None


def open_store(path: str | Path) -> StoreReader:
    """Open a complete store for reading. StoreError if it is none, of another version, or
    incomplete."""
    store = load_store(Path(path))
    if not store.teachers:
        raise StoreError(f"{path}: no teacher in it yet", "run its build command again")
    for name in TEACHERS:
        if name not in store.teachers and (
            (store.path / name).exists() or store.commit_path(name, 0).exists()
        ):
            raise StoreError(
                f"{path}: incomplete: {name} is there, its record {store.commit_path(name)} is not",
                "run its build command again",
            )
    for part in ("rows", *store.teachers):
        missing = store.missing(part)
        if missing:
            raise StoreError(
                f"{path}: incomplete: {part}: {len(missing)} of {len(store.ranges)} "
                "shards are missing or damaged "
                f"(first: shard {missing[0]})",
                "run its build command again to make the missing ones",
            )
    return StoreReader(store)
