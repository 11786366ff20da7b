"""Reading a store: ``open_store(path)`` gives a StoreReader, ``reader[rows]`` a TeacherBatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .codec import Entries, decode, num_gap_planes, unpack_entropy, unpack_logp, unpack_partition
from .errors import StoreError
from .packing import Rows
from .store import (
    ROW_ARRAYS,
    STATISTICS,
    TEACHERS,
    Store,
    load_store,
    load_tokenizer_content,
    read_id_of_rank,
)

if TYPE_CHECKING:
    from logitcache_kernels import SparseTeacher

# An entry that was drawn stays one whatever rounding does to its probability.
_MOST_INCLUSION = np.float32(1 - 2**-20)


@dataclass(frozen=True)
class TeacherSupport:
    """One teacher at P positions, decoded. Shapes: K entries, T grid points.

    ids_PK: int32, -1 padding. logp_PK: float32, normalised so that certain entries and tail add up
    to 1. inclusion_PK: float32, 1 = certain; None for top-k supports. tail_PT, entropy_P,
    top1_logp_P, gold_logp_P: float32. A position without anything stored has ids -1, logp -inf and
    tail -inf.
    """

    ids_PK: np.ndarray
    logp_PK: np.ndarray
    inclusion_PK: np.ndarray | None
    tail_PT: np.ndarray
    entropy_P: np.ndarray
    top1_logp_P: np.ndarray
    gold_logp_P: np.ndarray
    temperatures: tuple[float, ...]

    def sparse_teacher(self, temperature: float) -> SparseTeacher:
        """The support as tensors with the log-partition at this temperature."""
        import torch

        from logitcache_kernels import SparseTeacher, log_partition

        logp_PK = torch.from_numpy(self.logp_PK)
        ids_PK = torch.from_numpy(self.ids_PK)
        if self.inclusion_PK is None:
            inclusion_PK, certain_PK = None, ids_PK >= 0
        else:
            inclusion_PK = torch.from_numpy(self.inclusion_PK)
            certain_PK = (ids_PK >= 0) & (inclusion_PK >= 1)
        partition_P = log_partition(
            logp_PK, certain_PK, torch.from_numpy(self.tail_PT), temperature, self.temperatures
        )
        partition_P = torch.where(certain_PK.any(-1), partition_P, 0.0)
        return SparseTeacher(
            ids_PK, logp_PK, partition_P, torch.from_numpy(self.entropy_P), inclusion_PK
        )


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


class StoreReader:
    """Random access to a complete store. StoreError if something is missing or fails its
    checksum."""

    def __init__(self, store: Store):
        self.store = store
        self.manifest = store.manifest
        self.temperatures = tuple(float(t) for t in self.manifest["temperatures"])
        self._committed: dict[str, tuple[Path, int] | None] = {}  # file and size, by folder

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> TeacherBatch:
        index = np.atleast_1d(np.arange(len(self))[rows])
        batch = self.read_rows(index)
        labels = batch.labels()
        teachers = tuple(self._support(name, index) for name in self.store.teachers)
        for teacher in teachers:  # nothing stored at a label: the teacher was skipped there
            labels[(teacher.ids_PK < 0).all(1).reshape(labels.shape)] = -100
        return TeacherBatch(batch, batch.positions(), labels, batch.gold_labels(), teachers)

    def read_rows(self, index: np.ndarray) -> Rows:
        """The rows alone, without teachers."""
        return Rows(*(self._read(f"rows/{name}", index) for name in ROW_ARRAYS))

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

    @cached_property
    def _group(self) -> Any:
        return self.store.group()

    @cached_property
    def _id_of_rank(self) -> np.ndarray:
        return read_id_of_rank(self.store)

    def __getstate__(self) -> dict[str, Any]:
        state = {"store": self.store, "manifest": self.manifest, "temperatures": self.temperatures}
        return {**state, "_committed": {}}

    def _read(self, name: str, index: np.ndarray) -> np.ndarray:
        """Read rows of an array one chunk at a time: integer-array indexing in zarr is 20 times
        slower."""
        part = name.partition("/")[0]
        rows = []
        row = int(index[0]) if len(index) else 0
        try:
            array = self._group[name]
            for row in map(int, index):
                self._check_file(part, f"{name}/c/{row // self.manifest['shard_rows']}/")
                rows.append(array[row])
        except (ValueError, KeyError, RuntimeError, OSError) as error:
            record = self.store.commit_path(part, row // self.manifest["shard_rows"])
            raise StoreError(
                f"{self.store.path / name}: row {row} cannot be read: {error}",
                f"delete {record} and run the same build command again",
            ) from None
        return np.stack(rows)

    def _check_file(self, part: str, folder: str) -> None:
        """Raise if a committed shard file was lost or cut: zarr reads both as zeros."""
        if folder not in self._committed:
            record = self.store.commit(part, int(folder.rstrip("/").rpartition("/")[2])) or {}
            found = [
                (self.store.path / name, file["bytes"])
                for name, file in record.get("files", {}).items()
                if name.startswith(folder)
            ]
            self._committed[folder] = found[0] if found else None
        committed = self._committed[folder]
        if committed is not None and committed[0].stat().st_size != committed[1]:
            raise OSError(
                f"expected {committed[1]} bytes, found {committed[0].stat().st_size} in "
                f"{committed[0]}"
            )

    def _support(self, name: str, index: np.ndarray) -> TeacherSupport:
        attributes = self.store.teachers[name]
        grid = len(self.temperatures)
        count = self._read(f"{name}/count", index)  # [B, 2, L]
        totals = count.sum((1, 2), dtype=np.int64)
        gaps = np.zeros(int(totals.sum()), np.uint32)
        for number in range(num_gap_planes(self.manifest["vocab_size"])):
            block = self._read(f"{name}/gap_{number}", index)
            flat = np.concatenate([row[:n] for row, n in zip(block, totals, strict=True)])
            gaps |= flat.astype(np.uint32) << np.uint32(8 * number)
        block = self._read(f"{name}/level", index)
        levels = np.concatenate([row[:n] for row, n in zip(block, totals, strict=True)])
        counts_P2 = count.transpose(0, 2, 1).reshape(-1, 2)
        ids_PK, logp_PK, certain_PK = decode(
            Entries(counts_P2, gaps, levels), self._id_of_rank, attributes["precision"]
        )
        statistics = self._read(f"{name}/statistics", index).transpose(0, 2, 1)
        statistics = statistics.reshape(-1, grid + len(STATISTICS))
        tail_PT = unpack_partition(statistics[:, :grid])
        top1_P = unpack_logp(statistics[:, grid + 1])

        used_P = ids_PK[:, 0] >= 0
        tail_PT = np.where(used_P[:, None], tail_PT, -np.inf).astype(np.float32)
        best_P = np.where(certain_PK, logp_PK, -np.inf).argmax(1)
        logp_PK = np.fmin(logp_PK, top1_P[:, None])  # rounding lets no other one be larger
        logp_PK[used_P, best_P[used_P]] = top1_P[used_P]
        certain_logp_PK = np.where(certain_PK, logp_PK, -np.inf)
        one = self.temperatures.index(1.0)
        total_P = _logaddexp(_logsumexp(certain_logp_PK), tail_PT[:, one])
        shift_P = np.where(used_P, total_P, 0.0).astype(np.float32)
        logp_PK -= shift_P[:, None]
        tail_PT -= shift_P[:, None] / np.asarray(self.temperatures, np.float32)
        support = TeacherSupport(
            ids_PK,
            logp_PK,
            None,
            tail_PT,
            unpack_entropy(statistics[:, grid]),
            np.where(used_P, top1_P - shift_P, np.nan).astype(np.float32),
            unpack_logp(statistics[:, grid + 2]),
            self.temperatures,
        )
        if attributes["estimator"] != "sampled":
            return support
        inclusion_PK = self._inclusion(attributes, support, certain_PK)
        return TeacherSupport(**{**support.__dict__, "inclusion_PK": inclusion_PK})

    def _inclusion(
        self, attributes: dict[str, Any], support: TeacherSupport, certain_PK: np.ndarray
    ) -> np.ndarray:
        """With what probability each sampled entry was kept: max(p, p^S) / threshold."""
        import torch

        from logitcache_kernels import log_partition

        temperature = float(attributes["sample_temperature"])
        partition_P = log_partition(
            torch.from_numpy(support.logp_PK),
            torch.from_numpy(certain_PK),
            torch.from_numpy(support.tail_PT),
            temperature,
            self.temperatures,
        ).numpy()
        partition_P = np.where(np.isfinite(partition_P), partition_P, 0.0)
        tempered_PK = np.exp(support.logp_PK / temperature - partition_P[:, None])
        ratio_PK = np.maximum(np.exp(support.logp_PK), tempered_PK) / attributes["threshold"]
        inclusion_PK = np.where(certain_PK, 1.0, np.minimum(ratio_PK, _MOST_INCLUSION))
        return np.where(support.ids_PK < 0, 0.0, inclusion_PK).astype(np.float32)


def _logsumexp(x_PK: np.ndarray) -> np.ndarray:
    top_P = x_PK.max(1)
    safe_P = np.where(np.isfinite(top_P), top_P, 0.0)
    with np.errstate(divide="ignore"):
        return safe_P + np.log(np.exp(x_PK - safe_P[:, None]).sum(1))


def _logaddexp(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.logaddexp(x, y)


def open_store(path: str | Path) -> StoreReader:
    """Open a complete store for reading. StoreError if it is none, of another version, or
    incomplete."""
    store = load_store(Path(path))
    if not store.teachers:
        raise StoreError(f"{path}: no teacher in it yet", "run its build command again")
    for name in TEACHERS:
        if name not in store.teachers and store.commit_path(name, 0).is_file():
            raise StoreError(
                f"{store.path / name}/zarr.json: gone or damaged, and {name} was in the store",
                "run its build command again",
            )
    for part in ("rows", *store.teachers):
        missing = store.missing(part)
        if missing:
            raise StoreError(
                f"{path}: incomplete: {part}: {len(missing)} of {len(store.ranges)} "
                "shards are missing "
                f"(first: shard {missing[0]})",
                "run its build command again to make the missing ones",
            )
    return StoreReader(store)
