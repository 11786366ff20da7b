"""``as_torch_dataset(path)``: a store as a map-style torch Dataset, for other trainers.

A row is a flat dict of tensors. Legend: B rows, L tokens of a row, K kept entries at its widest
position.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from logitcache_kernels import SparseTeacher

from .errors import UsageError
from .reader import StoreReader, open_store
from .store import Store

_PADDING = {"ids": -1, "logp": -torch.inf, "inclusion": 0.0}


class StoreDataset(Dataset[dict[str, torch.Tensor]]):
    """The rows of a store. Pickles without open files; each process opens the store's files itself,
    so workers may be forked or spawned.

    A row holds, for each teacher NAME (teacher1, teacher2) as the loss takes it:

    row: int64 []. tokens, segments, positions: int64 [L]. labels: int64 [L], the next tokens
    (already shifted), -100 where nothing is trained on. gold: bool [L].
    NAME_ids: int32 [L, K], -1 is padding. NAME_logp: float32 [L, K], -inf there. NAME_inclusion:
    float32 [L, K], 1 = certain, of sampled supports only. NAME_log_partition: float32 [L], F of the
    dataset's temperature. NAME_entropy, NAME_top1_logp, NAME_gold_logp: float32 [L], the last NaN
    where nothing is stored.
    """

    def __init__(self, store: Store, temperature: float):
        self.store, self.temperature = store, temperature
        self._opened: tuple[int, StoreReader] | None = None

    def __len__(self) -> int:
        return int(self.store.manifest["rows"])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """One row; StoreError if it is damaged, IndexError if there is none of this number."""
        batch = self._reader()[int(row)]
        rows = batch.rows
        found = {
            "row": torch.tensor(int(row) % len(self)),
            "tokens": torch.from_numpy(rows.tokens[0].astype("int64")),
            "segments": torch.from_numpy(rows.segments[0].astype("int64")),
            "positions": torch.from_numpy(batch.positions[0]),
            "labels": torch.from_numpy(batch.labels[0]),
            "gold": torch.from_numpy(batch.gold[0]),
        }
        for name, teacher in zip(self.store.teachers, batch.teachers, strict=True):
            sparse = teacher.sparse_teacher(self.temperature)
            found[f"{name}_ids"] = sparse.ids_RK
            found[f"{name}_logp"] = sparse.logp_RK
            if sparse.inclusion_RK is not None:
                found[f"{name}_inclusion"] = sparse.inclusion_RK
            found[f"{name}_log_partition"] = sparse.log_partition_R
            found[f"{name}_entropy"] = torch.from_numpy(teacher.entropy_P)
            found[f"{name}_top1_logp"] = torch.from_numpy(teacher.top1_logp_P)
            found[f"{name}_gold_logp"] = torch.from_numpy(teacher.gold_logp_P)
        return found

    @staticmethod
    def collate(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Stack rows, [B, ...], supports as wide as the widest: a DataLoader's collate_fn."""
        return {name: _stack(name, [row[name] for row in rows]) for name in rows[0]}

    def sparse_teachers(self, batch: Mapping[str, torch.Tensor]) -> tuple[SparseTeacher, ...]:
        """The teachers of a row or a batch as the losses of logitcache_kernels take them, with all
        positions end to end."""
        teachers = []
        for name in self.store.teachers:
            inclusion = batch.get(f"{name}_inclusion")
            teachers.append(
                SparseTeacher(
                    batch[f"{name}_ids"].flatten(0, -2),
                    batch[f"{name}_logp"].flatten(0, -2),
                    batch[f"{name}_log_partition"].flatten(),
                    batch[f"{name}_entropy"].flatten(),
                    None if inclusion is None else inclusion.flatten(0, -2),
                )
            )
        return tuple(teachers)

    def _reader(self) -> StoreReader:
        """This process's own reader: a forked one would share its locks with its parent."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), StoreReader(self.store)
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def as_torch_dataset(path: str | Path, temperature: float = 1.0) -> StoreDataset:
    """Open a complete store as a map-style Dataset whose log-partitions are at ``temperature``.

    Give its ``collate`` to the DataLoader. StoreError if it is no whole store, UsageError if its
    supports do not allow this temperature.
    """
    reader = open_store(path)
    least, most = min(reader.temperatures), reader.max_temperature
    if not least <= temperature <= most:
        raise UsageError(
            f"{path}: temperature: expected {least:g} to {most:g}, found {temperature:g}",
            "choose one inside, or build with a larger --sample-temperature",
        )
    return StoreDataset(reader.store, float(temperature))


def _stack(name: str, rows: list[torch.Tensor]) -> torch.Tensor:
    kind = name.rpartition("_")[2]
    if kind not in _PADDING or rows[0].ndim < 2:
        return torch.stack(rows)
    length, width = rows[0].shape[0], max(row.shape[1] for row in rows)
    out = rows[0].new_full((len(rows), length, width), _PADDING[kind])
    for at, row in enumerate(rows):
        out[at, :, : row.shape[1]] = row
    return out
