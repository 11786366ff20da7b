"""Reading a store: ``open_store(path)`` gives a StoreReader, ``reader[rows]`` a TeacherBatch.

Memory: a batch of P positions with K entries at most takes 13 P K bytes a teacher, its tensors up
to 8 P K more, decoding a row as much as the row, and the memory of batches that are gone is kept
for the next (96 arrays at most); ``batches`` holds ``ahead + workers`` batches. Open shards take
their index and the frequency order each (some 0.3 MB), 64 of them at most.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .buffers import Buffers
from .codec import decode_order
from .errors import ResourceError, StoreError
from .layout import ROW_ARRAYS
from .packing import Rows
from .padded import TeacherSupport, side_by_side
from .place import load, shown
from .shards import ShardFile
from .sources import source_numbers
from .store import Store, load_tokenizer_content
from .support import Support, decode_row

Key = TypeVar("Key")
Made = TypeVar("Made")

_OPEN_SHARDS = 64  # of a part each, with up to five files


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
        self._buffers = Buffers()

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
        teachers = tuple(
            side_by_side(
                [self.read_support(name, int(row)) for row in index],
                self.store.teachers[name],
                self.temperatures,
                int(self.manifest["seq_len"]),
                self._buffers,
            )
            for name in self.store.teachers
        )
        for teacher in teachers:  # nothing stored at a label: the teacher was skipped there
            labels[(teacher.ids_PK[:, 0] < 0).reshape(labels.shape)] = -100
        return TeacherBatch(batch, batch.positions(), labels, batch.gold_labels(), teachers)

    def batches(
        self, rows: Iterable[Sequence[int] | np.ndarray], workers: int = 1, ahead: int = 2
    ) -> Iterator[TeacherBatch]:
        """Batches of the given row numbers, in this order, read by threads beforehand.

        At most ``ahead + workers`` batches wait or are being made; what a batch holds does not
        depend on workers. One is fastest where files are in the page cache: numpy holds the
        interpreter's lock for half of its time, and two threads in it pass the lock to and fro 90
        times a row (2026-11: 640 k tokens/s with one, 480 k with two, 1.1 M in two processes).
        """
        return read_ahead(self.__getitem__, rows, workers, ahead)

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
            planes = {array: files[array].read(within) for array in ("count", "fields")}
            kinds = [kind for kind in ("certain", "sampled") if kind in files]
            totals = planes["count"].reshape(len(kinds), -1).sum(1, dtype=np.int64)
            for array, total in zip(kinds, totals, strict=True):
                planes[array] = files[array].read(within, int(total))
            return decode_row(
                planes, self.store.teachers[name], self.manifest["temperatures"], order, row
            )

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the store's sources, in order; none of a store from before they were kept."""
        return tuple(source["name"] for source in self.manifest.get("sources", ()))

    def source_numbers(self, rows: Rows) -> np.ndarray:
        """Which of ``source_names`` each token of some rows is from, int64 [B, L], also as a label
        of the position before it; -1 is padding. StoreError where rows and manifest differ."""
        return source_numbers(self.manifest, rows.documents)

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


def read_ahead(
    make: Callable[[Key], Made], keys: Iterable[Key], workers: int, ahead: int = 2
) -> Generator[Made]:
    """What ``make`` gives for each key, in order, made by threads beforehand; see
    StoreReader.batches. Without workers it is made when asked for."""
    if workers < 1:
        yield from (make(key) for key in keys)
        return
    waiting: deque[Future[Made]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="store-reader")
    try:
        for key in keys:
            waiting.append(pool.submit(make, key))
            if len(waiting) >= ahead + workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also when the consumer stops early
        for future in waiting:
            future.cancel()
        pool.shutdown(wait=True)


@contextlib.contextmanager
def _named(store: Store, part: str, row: int) -> Iterator[None]:
    """Say in a StoreError which row could not be read, and what to do."""
    try:
        yield
    except ResourceError:  # nothing is wrong with the store
        raise
    except (StoreError, OSError, ValueError, RuntimeError) as error:
        raise StoreError(
            f"{store.path}: {part}: row {row} cannot be read: {error}",
            f"logitcache verify {store.path}; logitcache repair {store.path}",
        ) from None


def open_store(path: str | Path) -> StoreReader:
    """Open a complete store for reading, a folder or an s3:// or gs:// URL. StoreError if it is
    none, of another version, or incomplete."""
    store = load(path)
    path = shown(path)
    if not store.teachers:
        raise StoreError(f"{path}: no teacher in it yet", "run its build command again")
    for name in store.unfinished():
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
