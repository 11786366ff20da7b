"""``logitcache export``: a store as a folder of Parquet files, for other tools. Imports no torch.

One file per shard of the store, one record per row; README, "Other tools", lists the columns. Their
values are those of the reader, without its padding. The folder appears under its name when all of
it is on disk, so one that is there is whole. Memory: a group of rows, 2^22 entries at most where
supports are as wide as they may be, and what the reader takes for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import Interrupted, StoreError, UsageError
from .files import fsync_path, lock, publish_folder
from .padded import TeacherSupport
from .reader import StoreReader, TeacherBatch, open_store
from .store import Store

_KEY = b"logitcache"  # of what a file's metadata say about store and export
_GROUP_ENTRIES = 1 << 22
_MEAN_ENTRIES = 128  # of a sampled support over a row, at most (see layout.entries_per_row)

Report = Callable[[int, int], None]
"""Called as report(rows done, rows) after each group of rows."""


@dataclass(frozen=True)
class Exported:
    """A finished export. written: whether this call made it."""

    path: Path
    rows: int
    files: int
    size_bytes: int
    written: bool


def export_parquet(
    path: Path,
    out: Path,
    *,
    report: Report = lambda *_: None,
    stop: Callable[[], bool] = lambda: False,
) -> Exported:
    """Export the store ``path`` to the folder ``out``; one that is finished is left as it is.

    stop: asked after every group of rows; when it says yes, Interrupted is raised and nothing is
    left. Raises StoreError where the store is damaged or incomplete, UsageError where ``out`` holds
    something else, LockedError where another process exports to it.
    """
    reader = open_store(path)
    if path.resolve() in (out.resolve(), *out.resolve().parents):
        raise UsageError(f"{out}: lies within the store {path}", "give --out a folder elsewhere")
    record = {**_describe(reader.store), "files": len(reader.store.ranges)}
    if _is_finished(out, record):
        return _exported(out, record, written=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock(out.with_name(f".{out.name}.lock")):
        temporary = out.with_name(f".{out.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir()
        try:
            _write_files(reader, record, temporary, report, stop)
            publish_folder(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return _exported(out, record, written=True)


def schema(store: Store, record: dict[str, Any]) -> pa.Schema:
    """The columns of a store's export, with what is in it as JSON in the metadata."""
    numbers, logps = pa.list_(pa.int32()), pa.list_(pa.float32())
    columns = {
        "row": pa.int64(),
        "tokens": numbers,
        "segments": numbers,
        "positions": numbers,
        "documents": pa.list_(pa.int64()),
        "labels": numbers,
        "gold": pa.list_(pa.bool_()),
    }
    for name, attributes in store.teachers.items():
        columns[f"{name}_ids"] = pa.list_(numbers)
        columns[f"{name}_logp"] = pa.list_(logps)
        if attributes["estimator"] == "sampled":
            columns[f"{name}_inclusion"] = pa.list_(logps)
            columns[f"{name}_flat"] = pa.list_(pa.list_(pa.bool_()))
        columns[f"{name}_tail_log_partition"] = pa.list_(logps)
        for field in ("entropy", "top1_logp", "gold_logp"):
            columns[f"{name}_{field}"] = logps
    return pa.schema(columns.items(), {_KEY: json.dumps(record, sort_keys=True).encode()})


def _describe(store: Store) -> dict[str, Any]:
    """What is exported: the manifests, and a digest over the records of everything in the store."""
    digest = hashlib.sha256()
    for part in ("rows", *store.teachers):
        digest.update(f"{part} {store.owner(part)}\n".encode())
        for shard in range(len(store.ranges)):
            digest.update(f"{store.checked_commit(part, shard)['digest']}\n".encode())
    return {
        "export_format": 1,
        "store_sha256": digest.hexdigest(),
        "store": store.manifest,
        "teachers": store.teachers,
    }


def _file_name(number: int, record: dict[str, Any]) -> str:
    return f"rows-{number:05d}-of-{record['files']:05d}.parquet"


def _is_finished(out: Path, record: dict[str, Any]) -> bool:
    """Whether out is this very export, whole. An empty folder, or none, is not. Errors else."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise UsageError(f"{out}: expected a folder, found a file", "give --out a new folder")
    names = sorted(path.name for path in out.iterdir())
    if not names:
        return False
    found = [name for name in names if name.startswith("rows-") and name.endswith(".parquet")]
    if found != names:
        other = next(name for name in names if name not in found)
        raise UsageError(
            f"{out}: expected an empty folder or an export, found other files ({other}, ...)",
            "give --out a new folder",
        )
    again = f"delete {out}, then run the same command again"
    rows = 0
    for name in found:
        try:
            metadata = pq.read_metadata(out / name)
            theirs = json.loads((metadata.metadata or {})[_KEY])
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise StoreError(f"{out / name}: no file of an export: {error}", again) from None
        if theirs != record:
            raise UsageError(
                f"{out}: holds the export of another store, or of this one before it changed",
                "give --out a new folder",
            )
        rows += metadata.num_rows
    wanted = [_file_name(number, record) for number in range(record["files"])]
    if found != wanted or rows != record["store"]["rows"]:
        raise StoreError(
            f"{out}: not whole: expected {len(wanted)} files with {record['store']['rows']} rows, "
            f"found {len(found)} with {rows}",
            again,
        )
    return True


def _exported(out: Path, record: dict[str, Any], written: bool) -> Exported:
    size = sum((out / _file_name(n, record)).stat().st_size for n in range(record["files"]))
    return Exported(out, record["store"]["rows"], record["files"], size, written)


def _write_files(
    reader: StoreReader,
    record: dict[str, Any],
    folder: Path,
    report: Report,
    stop: Callable[[], bool],
) -> None:
    store = reader.store
    columns = schema(store, record)
    group = _rows_per_group(store)
    for number, (start, end) in enumerate(store.ranges):
        with (
            _durable(folder / _file_name(number, record)) as file,
            pq.ParquetWriter(file, columns, compression="zstd") as writer,
        ):
            for first in range(start, end, group):
                if stop():
                    raise Interrupted(
                        "export stopped; nothing of it is kept", "run the same command again"
                    )
                rows = np.arange(first, min(first + group, end))
                writer.write_table(_table(rows, reader[rows], store, columns))
                report(int(rows[-1]) + 1, len(reader))
    fsync_path(folder)


def _rows_per_group(store: Store) -> int:
    """Rows of a row group, such that its widest teacher's entries are bounded."""
    widths = [
        min(a["max_entries"], _MEAN_ENTRIES) if a["estimator"] == "sampled" else a["max_entries"]
        for a in store.teachers.values()
    ]
    return max(1, _GROUP_ENTRIES // (max(widths) * int(store.manifest["seq_len"])))


@contextlib.contextmanager
def _durable(path: Path) -> Iterator[Any]:
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _table(rows: np.ndarray, batch: TeacherBatch, store: Store, columns: pa.Schema) -> pa.Table:
    length = int(store.manifest["seq_len"])
    tokens = {
        "tokens": batch.rows.tokens,
        "segments": batch.rows.segments,
        "positions": batch.positions,
        "documents": batch.rows.documents,
        "labels": batch.labels,
        "gold": batch.gold,
    }
    arrays: dict[str, pa.Array] = {"row": pa.array(rows, pa.int64())}
    for name, values_BL in tokens.items():
        arrays[name] = pa.array(values_BL.reshape(-1), columns.field(name).type.value_type)
    for name, teacher in zip(store.teachers, batch.teachers, strict=True):
        arrays |= {f"{name}_{field}": array for field, array in _teacher(teacher).items()}
    # Whatever is in it, each column so far is one list of all positions: cut it into rows.
    starts = pa.array(np.arange(len(rows) + 1) * length, pa.int32())
    return pa.table(
        [
            arrays[name]
            if name == "row"
            else pa.ListArray.from_arrays(starts, arrays[name], type=columns.field(name).type)
            for name in columns.names
        ],
        schema=columns,
    )


def _teacher(teacher: TeacherSupport) -> dict[str, pa.Array]:
    """A teacher's columns at all positions of a group of rows, one element a position."""
    kept_PK = teacher.ids_PK >= 0
    ends = np.concatenate(([0], kept_PK.sum(1).cumsum())).astype(np.int32)
    padded = {
        "ids": teacher.ids_PK,
        "logp": teacher.logp_PK,
        "inclusion": teacher.inclusion_PK,
        "flat": teacher.flat_PK,
    }
    columns = {
        name: pa.ListArray.from_arrays(pa.array(ends), pa.array(values_PK[kept_PK]))
        for name, values_PK in padded.items()
        if values_PK is not None
    }
    grid = np.arange(len(teacher.tail_PT) + 1) * teacher.tail_PT.shape[1]
    columns["tail_log_partition"] = pa.ListArray.from_arrays(
        pa.array(grid, pa.int32()), pa.array(teacher.tail_PT.reshape(-1))
    )
    columns["entropy"] = pa.array(teacher.entropy_P)
    columns["top1_logp"] = pa.array(teacher.top1_logp_P)
    columns["gold_logp"] = pa.array(teacher.gold_logp_P)
    return columns
