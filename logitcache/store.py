"""A store on disk: layout, creation, writing of shards, commit records. Imports no torch.

    STORE/                  a Zarr v3 group; its attribute "logitcache" is the manifest
      rows/                 tokens, segments uint32; loss_mask, gold_mask bool      [N, L]
      id_of_rank            uint32 [V], the corpus's frequency order of token ids
      teacher1/, teacher2/  groups; attribute "logitcache" pins model and estimator
        count               uint16 [N, 2, L]  entries certain, sampled
        gap_0, gap_1, ..    uint8  [N, E]     bytes of the gaps between ranks, lowest first
        level               uint8 or float16 [N, E]
        statistics          uint16 [N, T + 3, L]  tail log-partition on the grid, entropy, top-1,
                            gold logp
      commits/              one JSON per written shard of rows/ and of each teacher: file hashes
      tokenizer.json        content of the tokenizer (see tokenise)

One chunk is one row, one shard file some 2^18 positions; both are checksummed (crc32c). A shard is
written by one worker in one go, made durable, and only then committed: what has no commit record
does not exist. E is the widest that a row can get; the zeros after its entries cost nothing (STORE
facts: -0.6 % bytes).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from .codec import Entries, level_dtype, num_gap_planes
from .errors import StoreError
from .files import file_sha256, fsync_path, to_json, write_atomic
from .packing import Rows

FORMAT = 1
SHARD_POSITIONS = 2**18
TEACHERS = ("teacher1", "teacher2")
STATISTICS = ("entropy", "top1_logp", "gold_logp")  # after the tail log-partition's grid
ROW_ARRAYS = {"tokens": "uint32", "segments": "uint32", "loss_mask": "bool", "gold_mask": "bool"}
_ATTRIBUTE = "logitcache"
_MANIFEST_KEYS = (
    *("rows", "seq_len", "shard_rows", "documents", "tokens", "valid_tokens"),
    *("vocab_size", "temperatures", "tokenizer_sha256", "data_sha256"),
)
SUMMARY = ("positions", "entries", "certain_mass", "skipped")  # of a teacher's commit record
_MAX_JSON_BYTES = 16 << 20


def shard_rows(num_rows: int, seq_len: int) -> int:
    """Rows in a shard file."""
    return max(1, min(num_rows, SHARD_POSITIONS // seq_len))


def shard_ranges(num_rows: int, rows_per_shard: int) -> list[tuple[int, int]]:
    starts = range(0, num_rows, rows_per_shard)
    return [(start, min(start + rows_per_shard, num_rows)) for start in starts]


@dataclass(frozen=True)
class Store:
    """An opened store; manifest is the root's, teachers those of its teacher groups."""

    path: Path
    manifest: dict[str, Any]
    teachers: dict[str, dict[str, Any]]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return shard_ranges(self.manifest["rows"], self.manifest["shard_rows"])

    def group(self, mode: Literal["r", "r+"] = "r") -> Any:  # items are groups or arrays
        return zarr.open_group(str(self.path), mode=mode, zarr_format=3, use_consolidated=False)

    def commit_path(self, part: str, shard: int) -> Path:
        return self.path / "commits" / f"{part}-{shard:06d}.json"

    def commit(self, part: str, shard: int) -> dict[str, Any] | None:
        """The commit record of a shard of "rows" or of a teacher; None if there is no whole one."""
        path = self.commit_path(part, shard)
        try:
            record = _read_json(path) if path.is_file() else None
            if record is not None:
                numbers = [file["bytes"] for file in record["files"].values()]
                numbers += [record[key] for key in (SUMMARY if part != "rows" else ())]
                if record["shard"] == shard and numbers and sum(numbers) >= 0:
                    return dict(record)
        except (StoreError, TypeError, KeyError, AttributeError):
            pass  # damaged: the shard will be written again
        return None

    def missing(self, part: str) -> list[int]:
        """Shards that are not committed, or whose committed files are gone or of another size."""
        return [i for i in range(len(self.ranges)) if not self._is_whole(part, i)]

    def _is_whole(self, part: str, shard: int) -> bool:
        record = self.commit(part, shard)
        return record is not None and not self.damaged_files(record)

    def damaged_files(self, record: Mapping[str, Any]) -> list[str]:
        """Files of a commit record that are gone or of another size, as paths within the store.

        Zarr itself would read either as zeros.
        """
        return [
            name
            for name, file in record["files"].items()
            if not (self.path / name).is_file()
            or (self.path / name).stat().st_size != file["bytes"]
        ]


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise StoreError(f"{path}: larger than {_MAX_JSON_BYTES} bytes, not a file of a store")
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise StoreError(f"{path}: cannot be read: {error}", "rebuild the store") from None


def is_store(path: Path) -> bool:
    """Whether a folder holds a store (of any version)."""
    return (path / "zarr.json").is_file() and _attribute(path) is not None


def _attribute(path: Path) -> dict[str, Any] | None:
    """What our attribute of a Zarr group says; None if it has none."""
    metadata = _read_json(path / "zarr.json")
    attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
    found = attributes.get(_ATTRIBUTE) if isinstance(attributes, dict) else None
    return found if isinstance(found, dict) else None


def load_store(path: Path) -> Store:
    """Open a store's metadata. StoreError if there is none or of another format version."""
    if not path.exists():
        raise StoreError(f"{path}: no such store", "logitcache build --out makes one")
    if not is_store(path):
        raise StoreError(
            f"{path}: expected a store, found a "
            f"{'folder' if path.is_dir() else 'file'} without a manifest",
            "give the folder that logitcache build --out wrote",
        )
    manifest = _attribute(path) or {}
    if manifest.get("format") != FORMAT:
        raise StoreError(
            f"{path}: format: expected {FORMAT}, found {manifest.get('format')}",
            "use the version of logitcache that wrote it, or build it again",
        )
    absent = [key for key in _MANIFEST_KEYS if key not in manifest]
    if absent:
        raise StoreError(
            f"{path / 'zarr.json'}: damaged manifest: expected {absent[0]}, found none",
            "build the store again with --fresh",
        )
    # A build killed while it created a teacher left a group without our attribute.
    teachers = {
        name: attributes
        for name in TEACHERS
        if (path / name / "zarr.json").is_file()
        and (attributes := _attribute(path / name)) is not None
    }
    return Store(path, manifest, teachers)


def read_id_of_rank(store: Store) -> np.ndarray:
    """The frequency order of the token ids, uint32 [V]. StoreError if it is none."""
    try:
        id_of_rank = np.asarray(store.group()["id_of_rank"][:])
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise StoreError(
            f"{store.path / 'id_of_rank'}: cannot be read: {error}",
            "build the store again with --fresh",
        ) from None
    # Zarr reads a chunk that is gone as zeros.
    if not np.array_equal(np.sort(id_of_rank), np.arange(store.manifest["vocab_size"])):
        raise StoreError(
            f"{store.path / 'id_of_rank'}: expected each token id once, found others",
            "build the store again with --fresh",
        )
    return id_of_rank


def load_tokenizer_content(path: Path) -> dict[str, Any]:
    content = _read_json(path / "tokenizer.json")
    assert isinstance(content, dict)
    return content


def _create_array(
    group: zarr.Group, name: str, shape: tuple[int, ...], rows_per_shard: int, dtype: Any
) -> None:
    group.create_array(
        name,
        shape=shape,
        chunks=(1, *shape[1:]),
        shards=(rows_per_shard, *shape[1:]),
        dtype=dtype,
        filters=None,
        compressors=(ZstdCodec(level=3), Crc32cCodec()),
        fill_value=0,
        config={"write_empty_chunks": True},
    )


def create_store(
    path: Path, manifest: Mapping[str, Any], tokenizer: Mapping[str, Any], id_of_rank: np.ndarray
) -> Store:
    """Create an empty store with its row arrays. The root's metadata is written last: it makes it a
    store."""
    path.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(path / "commits", ignore_errors=True)  # of a store that was deleted half-way
    (path / "commits").mkdir()
    write_atomic(path / "tokenizer.json", to_json(tokenizer))
    rows = zarr.create_group(str(path / "rows"), zarr_format=3, overwrite=True)
    shape = (manifest["rows"], manifest["seq_len"])
    for name, dtype in ROW_ARRAYS.items():
        _create_array(rows, name, shape, manifest["shard_rows"], dtype)
    ranks = zarr.create_array(
        str(path / "id_of_rank"),
        shape=id_of_rank.shape,
        chunks=id_of_rank.shape,
        dtype="uint32",
        compressors=(ZstdCodec(level=3), Crc32cCodec()),
        fill_value=0,
        zarr_format=3,
        overwrite=True,
    )
    ranks[:] = id_of_rank
    root = {"zarr_format": 3, "node_type": "group", "attributes": {_ATTRIBUTE: manifest}}
    write_atomic(path / "zarr.json", to_json(root))
    return load_store(path)


def create_teacher(store: Store, name: str, attributes: Mapping[str, Any]) -> Store:
    """Create a teacher's empty arrays."""
    manifest = store.manifest
    num_rows, seq_len, per_shard = manifest["rows"], manifest["seq_len"], manifest["shard_rows"]
    group = zarr.create_group(str(store.path / name), zarr_format=3, overwrite=True)
    width = seq_len * attributes["max_entries"]
    grid = len(manifest["temperatures"])
    _create_array(group, "count", (num_rows, 2, seq_len), per_shard, "uint16")
    _create_array(
        group, "statistics", (num_rows, grid + len(STATISTICS), seq_len), per_shard, "uint16"
    )
    for plane in range(num_gap_planes(manifest["vocab_size"])):
        _create_array(group, f"gap_{plane}", (num_rows, width), per_shard, "uint8")
    _create_array(
        group, "level", (num_rows, width), per_shard, level_dtype(attributes["precision"])
    )
    root = {"zarr_format": 3, "node_type": "group", "attributes": {_ATTRIBUTE: attributes}}
    write_atomic(store.path / name / "zarr.json", to_json(root))
    return load_store(store.path)


def write_rows(store: Store, rows: Rows, shard: int) -> None:
    """Write and commit one shard of rows; rows is the whole corpus."""
    start, stop = store.ranges[shard]
    group = store.group("r+")["rows"]
    _clear(store, "rows", shard, ROW_ARRAYS)
    for name in ROW_ARRAYS:
        group[name][start:stop] = getattr(rows, name)[start:stop]
    _commit(store, "rows", shard, ROW_ARRAYS, {})


def write_teacher(
    store: Store,
    name: str,
    shard: int,
    entries_per_row: list[Entries],
    statistics: np.ndarray,
    summary: Mapping[str, Any],
) -> None:
    """Write and commit one shard of a teacher. statistics: uint16 [rows, T + 3, L]."""
    start, stop = store.ranges[shard]
    num_rows, seq_len = stop - start, store.manifest["seq_len"]
    group = store.group("r+")[name]
    planes = num_gap_planes(store.manifest["vocab_size"])
    names = ["count", "statistics", "level", *(f"gap_{plane}" for plane in range(planes))]
    _clear(store, name, shard, names)
    count = np.stack([entries.counts.T for entries in entries_per_row])
    assert count.shape == (num_rows, 2, seq_len)
    group["count"][start:stop] = count
    group["statistics"][start:stop] = statistics
    width = group["level"].shape[1]
    for plane in range(planes):
        block = np.zeros((num_rows, width), np.uint8)
        for row, entries in enumerate(entries_per_row):
            block[row, : len(entries.gaps)] = (entries.gaps >> (8 * plane)) & 0xFF
        group[f"gap_{plane}"][start:stop] = block
    levels = np.zeros((num_rows, width), group["level"].dtype)
    for row, entries in enumerate(entries_per_row):
        levels[row, : len(entries.levels)] = entries.levels
    group["level"][start:stop] = levels
    _commit(store, name, shard, names, summary)


def _clear(store: Store, part: str, shard: int, arrays: Iterable[str]) -> None:
    """Remove what a killed writer left of a shard: a damaged file, or a temporary one of zarr's."""
    store.commit_path(part, shard).unlink(missing_ok=True)
    for name in arrays:
        folder = store.path / part / name / "c" / str(shard)
        if folder.exists():
            shutil.rmtree(folder)


def _commit(
    store: Store, part: str, shard: int, arrays: Iterable[str], summary: Mapping[str, Any]
) -> None:
    start, stop = store.ranges[shard]
    files = {}
    for name in sorted(arrays):
        folder = store.path / part / name / "c" / str(shard)
        # A shard's file ends in one "0" per further dimension. Zarr leaves out a shard that is all
        # zeros (a high gap plane of a small vocabulary): it has no file, and none is expected.
        found = [p for p in folder.rglob("*") if p.is_file()]
        if not found:
            continue
        (path,) = found
        fsync_path(path)
        for parent in path.parents[: len(path.relative_to(store.path).parts)]:
            fsync_path(parent)
        files[path.relative_to(store.path).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
    record = {"shard": shard, "rows": [start, stop], "files": files, **summary}
    write_atomic(store.commit_path(part, shard), to_json(record))
