"""A store on disk: its metadata, and the journal of what is finished. Imports no torch.

docs/format.md specifies the files; ``writing`` writes them. What has no record in the journal, the
folder ``commits``, does not exist. Records name each file with its size and hash, and are bound to
the store and the teacher that they belong to by the digest of the record before them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from .errors import StoreError
from .files import (
    delete,
    read_at,
    refuse_resource,
    to_json,
    write_durable,
)
from .layout import (
    FORMAT,
    TEACHERS,
    check_manifest,
    check_teacher,
    group_metadata,
    row_specs,
    shard_ranges,
    teacher_specs,
)
from .shards import ArraySpec, ShardFile, open_regular

_ATTRIBUTE = "logitcache"
SUMMARY = ("positions", "entries", "certain_mass", "skipped")  # of a teacher's commit record
_MAX_JSON_BYTES = 16 << 20
_MAX_TOKENIZER_BYTES = 128 << 20


@dataclass(frozen=True)
class Store:
    """An opened store; manifest is the root's, teachers those of its teacher groups."""

    path: Path
    manifest: dict[str, Any]
    teachers: dict[str, dict[str, Any]]

    @cached_property
    def ranges(self) -> list[tuple[int, int]]:
        return shard_ranges(self.manifest["rows"], self.manifest["shard_rows"])

    @cached_property
    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """The arrays of each part: "rows" and the teachers."""
        teachers = {
            name: teacher_specs(name, attributes, self.manifest)
            for name, attributes in self.teachers.items()
        }
        return {"rows": row_specs(self.manifest), **teachers}

    def commit_path(self, part: str, shard: int | None = None) -> Path:
        """A shard's record, or that of the part's creation."""
        name = part if shard is None else f"{part}-{shard:06d}"
        return self.path / "commits" / f"{name}.json"

    @cached_property
    def _owners(self) -> dict[str, str]:
        return {}

    def owner(self, part: str) -> str:
        """Digest of the record that a part's shards belong to. StoreError if there is none."""
        if part not in self._owners:
            record = read_record(self.commit_path("store" if part == "rows" else part))
            self._owners[part] = str(record["digest"])
        return self._owners[part]

    def commit(self, part: str, shard: int) -> dict[str, Any] | None:
        """The commit record of a shard of "rows" or of a teacher; None if there is no whole one."""
        try:
            return self.checked_commit(part, shard)
        except StoreError:
            return None  # damaged: the shard will be written again

    def checked_commit(self, part: str, shard: int) -> dict[str, Any]:
        """The same, or StoreError saying what is wrong with it."""
        path = self.commit_path(part, shard)
        record = read_record(path)
        expected = {"part": part, "shard": shard, "rows": list(self.ranges[shard])}
        for key, value in {**expected, "of": self.owner(part)}.items():
            if record.get(key) != value:
                raise StoreError(
                    f"{path}: {key}: expected {value}, found {str(record.get(key))[:80]}"
                )
        names = {spec.shard_name(shard) for spec in self.specs[part].values()}
        files = record.get("files")
        if not isinstance(files, dict) or set(files) != names:
            raise StoreError(f"{path}: does not list the files of its shard")
        for name, file in files.items():
            if not isinstance(file, dict) or not all(
                isinstance(file.get(key), int) for key in ("bytes", "index_crc32c")
            ):
                raise StoreError(f"{path}: {name}: expected a size and checksums")
        return record

    def unfinished(self) -> list[str]:
        """Teachers of which something is there, and no record of their creation."""
        return [
            name
            for name in TEACHERS
            if name not in self.teachers
            and ((self.path / name).exists() or self.commit_path(name, 0).exists())
        ]

    def missing(self, part: str) -> list[int]:
        """Shards that are not committed, or whose committed files are gone or of another size."""
        return [i for i in range(len(self.ranges)) if not self._is_whole(part, i)]

    def _is_whole(self, part: str, shard: int) -> bool:
        record = self.commit(part, shard)
        return record is not None and not self.damaged_files(record)

    def damaged_files(self, record: Mapping[str, Any]) -> list[str]:
        """Files of a commit record that are gone or of another size, as paths within the store."""
        damaged = []
        for name, file in record["files"].items():
            try:
                found = os.lstat(self.path / name).st_size
            except OSError:
                found = -1
            if found != file["bytes"]:
                damaged.append(name)
        return damaged

    def put(self, files: Mapping[str, bytes]) -> None:
        """Make files durable, by name within the store, each whole or absent."""
        write_durable(self.path, files)

    def remove(self, *names: str) -> None:
        """Delete files, or folders with all that is in them, if they are there."""
        for name in names:
            delete(self.path / name)

    def again(self) -> Store:
        """The store as it is now."""
        return load_store(self.path)

    def sizes_of(self, part: str = "") -> dict[str, int]:
        """Bytes of each file of a part, or of all, by its path within the store."""
        found = (self.path / part).rglob("*")
        return {p.relative_to(self.path).as_posix(): p.stat().st_size for p in found if p.is_file()}

    def open_shard(self, part: str, shard: int) -> dict[str, ShardFile]:
        """Open a shard's files, by array, each checked against the commit record."""
        files = self.checked_commit(part, shard)["files"]
        opened = {}
        for array, spec in self.specs[part].items():
            file = files[spec.shard_name(shard)]
            opened[array] = ShardFile(self.path, spec, shard, file["bytes"], file["index_crc32c"])
        return opened


def digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record's text without its digest."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(to_json(rest).encode()).hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """Read a record of the journal. StoreError if it is not, byte for byte, as it was written."""
    text = read_small(path)
    record = parse_json(text, path)
    found = str(record.get("digest")) if isinstance(record, dict) else ""
    # What was hashed is the text without this line; to make the text anew would take much longer.
    rest = text.replace(f'\n "digest": "{found}",'.encode(), b"", 1)
    if hashlib.sha256(rest).hexdigest() != found:
        raise StoreError(f"{path}: damaged record: it fails its digest")
    return record


def read_small(path: Path, most: int = _MAX_JSON_BYTES) -> bytes:
    """A small file of a store. StoreError if it is gone, a link, no plain file, or too large."""
    root = path.parent
    try:
        descriptor = open_regular(root, path.name)
    except OSError as error:
        refuse_resource(error, path)
        raise StoreError(f"{path}: cannot be read: {error.strerror}", "rebuild the store") from None
    try:
        content = read_at(descriptor, min(os.fstat(descriptor).st_size, most) + 1, 0, path)
    finally:
        os.close(descriptor)
    if len(content) > most:
        raise StoreError(f"{path}: larger than {most} bytes, not a file of a store")
    return content


def parse_json(text: bytes, path: Path) -> Any:
    """Parse JSON without NaN, infinities or abysmal depth. StoreError otherwise."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise StoreError(f"{path}: cannot be read: {reason}", "rebuild the store") from None


def is_store(path: Path) -> bool:
    """Whether a folder holds a store (of any version)."""
    return (path / "zarr.json").is_file() and _attribute(path) is not None


def _attribute(path: Path) -> dict[str, Any] | None:
    """What our attribute of a Zarr group says; None if it has none."""
    metadata = parse_json(read_small(path / "zarr.json"), path / "zarr.json")
    attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
    found = attributes.get(_ATTRIBUTE) if isinstance(attributes, dict) else None
    return found if isinstance(found, dict) else None


def load_store(path: Path) -> Store:
    """Open a store's metadata. StoreError if there is none, it is damaged or of another version."""
    if not path.exists():
        raise StoreError(f"{path}: no such store", "logitcache build --out makes one")
    if not is_store(path):
        raise StoreError(
            f"{path}: expected a store, found a "
            f"{'folder' if path.is_dir() else 'file'} without a manifest",
            "give the folder that logitcache build --out wrote",
        )
    manifest = check_manifest(_attribute(path), path)
    store = Store(path, manifest, {})
    check_metadata(store, "rows")
    teachers = {}
    for name in TEACHERS:
        if store.commit_path(name).exists():  # else its creation was not finished
            teachers[name] = check_teacher(_attribute(path / name), path / name / "zarr.json")
    store = Store(path, manifest, teachers)
    for name in teachers:
        check_metadata(store, name)
    return store


@lru_cache(maxsize=256)
def _array_text(spec: ArraySpec) -> bytes:
    return to_json(spec.metadata()).encode()


def metadata_files(store: Store, part: str) -> dict[str, bytes]:
    """The zarr.json files of a part, by path; that of the root goes with the rows."""
    if part == "rows":
        groups = {"zarr.json": store.manifest, "rows/zarr.json": None}
    else:
        groups = {f"{part}/zarr.json": store.teachers[part]}
    texts = {name: to_json(group_metadata(a)).encode() for name, a in groups.items()}
    return {**texts, **{f"{s.path}/zarr.json": _array_text(s) for s in store.specs[part].values()}}


def check_metadata(store: Store, part: str) -> dict[str, Any]:
    """Compare a part's metadata with what it must be; gives its creation record."""
    path = store.commit_path("store" if part == "rows" else part)
    record = read_record(path)
    expected = creation_record(store, part)
    expected["digest"] = digest(expected)
    for key in expected:
        if key != "digest" and record.get(key) != expected[key]:
            raise StoreError(f"{path}: {key}: does not fit the store's manifest")
    for name, wanted in metadata_files(store, part).items():
        text = read_small(store.path / name)
        if text != wanted:
            difference = _difference(json.loads(wanted), parse_json(text, store.path / name))
            raise StoreError(
                f"{store.path / name}: {difference}", "build the store again with --fresh"
            )
    return record


def _difference(wanted: Any, found: Any, where: str = "") -> str:
    """The first place in which two JSON values differ."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in sorted({*wanted, *found}):
            if wanted.get(key) != found.get(key) or (key in wanted) != (key in found):
                return _difference(wanted.get(key), found.get(key), f"{where}.{key}".lstrip("."))
    return f"{where or 'its text'}: expected {str(wanted)[:80]}, found {str(found)[:80]}"


def creation_record(store: Store, part: str) -> dict[str, Any]:
    """The record of a part's creation, without its digest."""
    files = {
        name: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        for name, text in metadata_files(store, part).items()
    }
    record: dict[str, Any] = {"part": "store" if part == "rows" else part, "files": files}
    if part == "rows":
        record["format"] = FORMAT
        record["tokenizer_sha256"] = store.manifest["tokenizer_sha256"]
    else:
        record["of"] = store.owner("rows")
    return record


def creation_bytes(store: Store, part: str) -> int:
    """Size of what a part has on disk before its first shard, its record included."""
    texts = metadata_files(store, part)
    return sum(len(text) for text in texts.values()) + sum(160 + len(name) for name in texts) + 300


def load_tokenizer_content(path: Path) -> dict[str, Any]:
    """The tokenizer's content. StoreError if it is not the manifest's."""
    file = path / "tokenizer.json"
    text = read_small(file, _MAX_TOKENIZER_BYTES)
    content = parse_json(text, file)
    manifest = check_manifest(_attribute(path), path)
    # Its hash is of the content without spaces (see tokenise): recompute that of our own text.
    if not isinstance(content, dict) or to_json(content).encode() != text:
        raise StoreError(f"{file}: damaged: not as it was written", "rebuild the store")
    from .tokenise import content_sha256

    if content_sha256(content) != manifest["tokenizer_sha256"]:
        raise StoreError(f"{file}: is not the tokenizer of the manifest", "rebuild the store")
    return content
