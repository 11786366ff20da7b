"""Writing a store: its creation, its teachers, its shards. Imports no torch.

A shard is written by one worker in one go, made durable, and only then entered in the journal. All
that is written goes through ``Store.put`` and ``Store.remove``, in an order that leaves a store or
none, whenever the writer dies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .codec import encode_order, frequency_order, inverse
from .errors import UsageError
from .files import make_folder, to_json
from .layout import check_manifest, check_teacher
from .packing import Rows
from .shards import pack_shard
from .store import Store, creation_record, digest, metadata_files
from .support import Support, encode_rows

_TOGETHER = 1 << 14  # positions that are encoded in one go


def _put_record(store: Store, path: Path, record: Mapping[str, Any]) -> None:
    text = to_json({**record, "digest": digest(record)})
    store.put({path.relative_to(store.path).as_posix(): text.encode()})


def create_store(empty: Store, tokenizer: Mapping[str, Any]) -> Store:
    """Create a store of which there is nothing yet but its manifest. The root's metadata is written
    last: it makes it a store."""
    check_manifest(dict(empty.manifest), empty.path)
    make_folder(empty.path)
    empty.remove("commits")  # of a store that was deleted half-way
    make_folder(empty.path / "commits")
    empty.put({"tokenizer.json": to_json(tokenizer).encode()})
    metadata = metadata_files(empty, "rows")
    root = metadata.pop("zarr.json")
    empty.put(metadata)
    _put_record(empty, empty.commit_path("store"), creation_record(empty, "rows"))
    empty.put({"zarr.json": root})
    return empty.again()


def create_teacher(store: Store, name: str, attributes: Mapping[str, Any]) -> Store:
    """Create a teacher's group, in place of one that is there."""
    records = sorted((store.path / "commits").glob(f"{name}*.json"))
    store.remove(*(record.relative_to(store.path).as_posix() for record in records), name)
    attributes = check_teacher(dict(attributes), name)
    made = replace(store, teachers={**store.teachers, name: attributes})
    made.put(metadata_files(made, name))
    _put_record(made, made.commit_path(name), creation_record(made, name))
    return made.again()


def restore_metadata(
    path: Path,
    manifest: Mapping[str, Any],
    teachers: Mapping[str, Mapping[str, Any]],
    tokenizer: Mapping[str, Any],
) -> Store:
    """Write the metadata of a store and its teachers anew, and nothing else."""
    store = Store(path, dict(manifest), {name: dict(a) for name, a in teachers.items()})
    make_folder(path / "commits")
    store.put({"tokenizer.json": to_json(tokenizer).encode()})
    for part in ("rows", *store.teachers):
        store.put(metadata_files(store, part))
        record = store.commit_path("store" if part == "rows" else part)
        _put_record(store, record, creation_record(store, part))
    return store.again()


def write_rows(store: Store, rows: Rows, shard: int) -> None:
    """Write and commit one shard of rows; rows is the whole corpus."""
    _commit(store, "rows", shard, pack_rows(store, rows, shard), {})


def pack_rows(store: Store, rows: Rows, shard: int) -> dict[str, bytes]:
    """The files of one shard of rows, by array."""
    start, stop = store.ranges[shard]
    return {
        name: pack_shard(spec, [(row,) for row in getattr(rows, name)[start:stop]])
        for name, spec in store.specs["rows"].items()
    }


def write_teacher(
    store: Store, name: str, shard: int, supports: Sequence[Support], summary: Mapping[str, Any]
) -> None:
    """Write and commit one shard of a teacher, a support for each of its rows."""
    _commit(store, name, shard, pack_teacher(store, name, shard, supports), summary)


def pack_teacher(
    store: Store, name: str, shard: int, supports: Sequence[Support]
) -> dict[str, bytes]:
    """The files of one shard of a teacher, by array."""
    specs, attributes = store.specs[name], store.teachers[name]
    start, _ = store.ranges[shard]
    most = specs["certain"].shape[-1]
    for row, support in enumerate(supports, start=start):
        kinds = (support.certain, *([] if support.sampled is None else [support.sampled]))
        widest = max(len(kind.ids) for kind in kinds)
        if widest > most:
            raise UsageError(
                f"{name}: row {row} keeps {widest} entries, {most} can be stored",
                "raise --min-prob or --threshold",
            )
    # Frequent ids get small ranks. The order is the shard's own; the longer, the more it costs.
    vocab_size = store.manifest["vocab_size"]
    ids = np.concatenate([support.certain.ids for support in supports])
    positions = len(supports) * store.manifest["seq_len"]
    id_of_rank = frequency_order(ids, vocab_size, max(positions // 16, 256))
    rank_of_id = inverse(id_of_rank)
    grid, together = store.manifest["temperatures"], max(_TOGETHER // store.manifest["seq_len"], 1)
    rows = [
        row
        for first in range(0, len(supports), together)
        for row in encode_rows(
            supports[first : first + together], attributes, grid, rank_of_id, start + first
        )
    ]
    content = {
        array: pack_shard(spec, [list(row[array]) for row in rows])
        for array, spec in specs.items()
        if array != "order"
    }
    content["order"] = pack_shard(specs["order"], [list(encode_order(id_of_rank))])
    return content


def _commit(
    store: Store, part: str, shard: int, content: Mapping[str, bytes], summary: Mapping[str, Any]
) -> None:
    """Make a shard's files durable, then its record; an old one goes first."""
    path = store.commit_path(part, shard)
    store.remove(path.relative_to(store.path).as_posix())
    named = {store.specs[part][array].shard_name(shard): data for array, data in content.items()}
    store.put(named)
    files = {
        name: {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "index_crc32c": int.from_bytes(data[-4:], "little"),
        }
        for name, data in named.items()
    }
    record = {
        "part": part,
        "shard": shard,
        "rows": list(store.ranges[shard]),
        "of": store.owner(part),
        "files": files,
        **summary,
    }
    _put_record(store, path, record)
