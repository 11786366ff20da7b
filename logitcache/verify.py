"""``logitcache verify``: is every byte of a store what was written, and does it make sense?

Every file is compared with the journal, every chunk is unpacked and decoded, and what it says is
held against the invariants of docs/format.md. Nothing is trusted because something else was fine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import StoreError
from .files import read_at, refuse_resource
from .layout import TEACHERS
from .place import load, shown
from .reader import StoreReader
from .remote import RemoteStore
from .shards import open_regular
from .store import SUMMARY, Store, check_metadata, load_tokenizer_content
from .support import Support

_BLOCK = 1 << 20
_OTHER_BYTES = "its bytes are not those that were written (SHA-256)"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: where, what, and whose rows cannot be trusted (stop exclusive).

    part: "rows", a teacher, or "store" for what belongs to the whole. file: within the store.
    """

    part: str
    file: str
    problem: str
    shard: int | None = None
    rows: tuple[int, int] | None = None


def verify_store(
    path: Path, report: Callable[[str, int, int], None] | None = None
) -> tuple[Store | None, list[Finding]]:
    """Check a store; the findings, none if it is whole. The store is None if its metadata are not
    enough to go on. report(part, shards done, shards) is called along the way."""
    try:
        store = load(path)
    except StoreError as error:
        return None, [Finding("store", "zarr.json", str(error).removeprefix(f"{shown(path)}: "))]
    findings = list(_metadata(store))
    if not findings:
        for part in ("rows", *store.teachers):
            for shard in range(len(store.ranges)):
                findings += _shard(store, part, shard)
                if report is not None:
                    report(part, shard + 1, len(store.ranges))
    findings += _unexpected(store)
    return store, findings


def _metadata(store: Store) -> Iterator[Finding]:
    for part in ("rows", *store.teachers):
        try:
            check_metadata(store, part)
        except StoreError as error:
            yield Finding(part, "zarr.json", str(error))
    for name in TEACHERS:
        if name not in store.teachers and (store.path / name).exists():
            yield Finding(name, name, "its creation was not finished")
    if not store.teachers:
        yield Finding("store", "", "no teacher in it")
    try:
        load_tokenizer_content(store.path)
    except StoreError as error:
        yield Finding("store", "tokenizer.json", str(error))


def _shard(store: Store, part: str, shard: int) -> list[Finding]:
    """Damage of one shard: its record, each file against it, then what the files say."""
    rows = store.ranges[shard]
    record_name = store.commit_path(part, shard).relative_to(store.path).as_posix()
    try:
        record = store.checked_commit(part, shard)
    except StoreError as error:
        return [Finding(part, record_name, str(error), shard, rows)]
    findings = []
    for name, file in record["files"].items():
        problem = _file_problem(store, name, file)
        if problem:
            findings.append(Finding(part, name, problem, shard, rows))
    if findings:
        return findings
    try:
        _contents(store, part, shard, record)
    except StoreError as error:
        findings.append(Finding(part, record_name, str(error), shard, rows))
    return findings


def _file_problem(store: Store, name: str, file: dict[str, Any]) -> str | None:
    if isinstance(store, RemoteStore):  # what is there, not what was fetched of it before
        if name not in store.sizes:
            return "is not there"
        content = store.read_object(name)
        if len(content) != file["bytes"]:
            return f"expected {file['bytes']} bytes, found {len(content)}"
        return _OTHER_BYTES if hashlib.sha256(content).hexdigest() != file["sha256"] else None
    root = store.path
    try:
        descriptor = open_regular(root, name)
    except OSError as error:
        refuse_resource(error, root / name)
        return f"cannot be opened: {os.strerror(error.errno or 0)}"
    except StoreError as error:
        return str(error)
    digest = hashlib.sha256()
    try:
        size = os.fstat(descriptor).st_size
        if size != file["bytes"]:
            return f"expected {file['bytes']} bytes, found {size}"
        for offset in range(0, size, _BLOCK):
            digest.update(read_at(descriptor, _BLOCK, offset, root / name))
    finally:
        os.close(descriptor)
    if digest.hexdigest() != file["sha256"]:
        return _OTHER_BYTES
    return None


def _contents(store: Store, part: str, shard: int, record: dict[str, Any]) -> None:
    """Decode a shard. StoreError names the first row that breaks an invariant."""
    reader = StoreReader(store)
    start, stop = store.ranges[shard]
    if part == "rows":
        for row in range(start, stop):
            _check_rows(reader, row)
        return
    positions = entries = 0
    for row in range(start, stop):
        support = reader.read_support(part, row)
        labels = None  # where the rows are damaged: a finding of theirs, the teacher may be whole
        with contextlib.suppress(StoreError):
            labels = reader.read_rows(np.array([row])).labels()[0]
        _check_support(store, part, row, support, labels)
        positions += int((support.certain.count_P > 0).sum())
        entries += len(support.certain.ids)
        entries += 0 if support.sampled is None else len(support.sampled.ids)
    found = {"positions": positions, "entries": entries}
    for key in SUMMARY:
        if record.get(key, -1) < 0 or found.get(key, record[key]) != record[key]:
            raise StoreError(f"{key}: expected {found.get(key)}, found {record.get(key)}")


def _check_rows(reader: StoreReader, row: int) -> None:
    rows = reader.read_rows(np.array([row]))
    segments = rows.segments[0].astype(np.int64)
    steps = np.diff(segments)
    used = int((segments > 0).sum())
    if int(rows.tokens.max()) >= reader.manifest["vocab_size"]:
        raise StoreError(f"row {row}: token {rows.tokens.max()} is not in the vocabulary")
    if not used or segments[0] != 1 or not np.isin(steps[: used - 1], (0, 1)).all():
        raise StoreError(f"row {row}: segments do not count up from 1")
    if segments[used:].any() or rows.tokens[0, used:].any():
        raise StoreError(f"row {row}: something after its end")


def _check_support(
    store: Store, part: str, row: int, support: Support, labels: np.ndarray | None
) -> None:
    """The invariants of a teacher's row."""
    attributes, certain = store.teachers[part], support.certain
    kept = certain.count_P > 0
    counts = certain.count_P.copy()
    if labels is not None and (kept & (labels == -100)).any():
        raise StoreError(f"row {row}: something is kept where nothing is predicted")
    ids = [certain.ids]
    owners = [np.repeat(np.arange(len(kept)), certain.count_P)]
    if support.sampled is not None:
        if (support.sampled.count_P[~kept] > 0).any():
            raise StoreError(f"row {row}: sampled entries without a certain one")
        counts += support.sampled.count_P
        ids.append(support.sampled.ids)
        owners.append(np.repeat(np.arange(len(kept)), support.sampled.count_P))
    if int(counts.max(initial=0)) > attributes["max_entries"]:
        raise StoreError(f"row {row}: more than {attributes['max_entries']} entries")
    keys = np.concatenate(owners) * (1 << 20) + np.concatenate(ids)
    if len(np.unique(keys)) != len(keys):
        raise StoreError(f"row {row}: an id twice at one position")
    fields = support.fields
    if not (np.isfinite(certain.logp).all() and np.isfinite(fields.entropy_P).all()):
        raise StoreError(f"row {row}: a value that is not finite")
    one = store.manifest["temperatures"].index(1.0)
    total = np.exp(fields.tail_PT[:, one])
    total += np.bincount(owners[0], np.exp(certain.logp), len(kept)).astype(np.float32)
    if np.abs(total[kept] - 1).max(initial=0) > 1e-4:
        raise StoreError(f"row {row}: probabilities do not add up to 1")


def _unexpected(store: Store) -> list[Finding]:
    """Files that no store has: left by a killed writer, or put there."""
    expected = {"zarr.json", "tokenizer.json", "rows/zarr.json"}
    parts = ("rows", *store.teachers)
    expected |= {f"{name}/zarr.json" for name in store.teachers}
    for part in parts:
        expected.add(store.commit_path("store" if part == "rows" else part).name)
        for spec in store.specs[part].values():
            expected.add(f"{spec.path}/zarr.json")
            expected |= {spec.shard_name(shard) for shard in range(len(store.ranges))}
        expected |= {
            store.commit_path(part, shard).relative_to(store.path).as_posix()
            for shard in range(len(store.ranges))
        }
    expected |= {
        store.commit_path("store" if part == "rows" else part).relative_to(store.path).as_posix()
        for part in parts
    }
    if isinstance(store, RemoteStore):
        others = sorted(set(store.sizes) - expected)
        return [Finding("store", name, "is no file of a store") for name in others]
    findings = []
    for folder, folders, files in os.walk(store.path):
        at = Path(folder).relative_to(store.path)
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in sorted([*files, *links]):
            found = (at / name).as_posix()
            if found not in expected and not name.endswith(".lock"):
                findings.append(Finding("store", found, "is no file of a store"))
    return findings


def documents_in(store: Store, rows: tuple[int, int]) -> list[int]:
    """Numbers of the documents of which rows hold a piece, as far as they can be read."""
    reader = StoreReader(store)
    found: set[int] = set()
    for row in range(*rows):
        with contextlib.suppress(StoreError):
            found |= {int(n) for n in np.unique(reader.read_row_array("documents", row)) if n}
    return sorted(found)
