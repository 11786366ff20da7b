"""Checkpoints on disk: written whole or not at all, checked before they are trusted, no pickle.

A checkpoint is staged under another name, synced, renamed, and marked complete last, by
complete.json, which holds the size and checksum of each file; only then are older ones deleted. A
process may die anywhere: the newest folder with that mark is the state to go on from.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c

from logitcache.errors import ResourceError, StoreError
from logitcache.files import (
    DISK_FULL,
    delete,
    make_durable_folder,
    publish_folder,
    refuse_resource,
    to_json,
    write_atomic,
    write_durable,
)

PREFIX, COMPLETE, FORMAT = "checkpoint-", "complete.json", 1
_PIECE = 1 << 24


def write_checkpoint(folder: Path, step: int, files: Mapping[str, bytes | Iterable[bytes]]) -> Path:
    """Write a checkpoint into the folder of checkpoints; ResourceError if the disk is full, with
    all that was there before still there."""
    path = folder / f"{PREFIX}{step}"
    staged = folder / f".{path.name}.tmp"
    records: dict[str, dict[str, int]] = {}

    def summed(name: str, content: bytes | Iterable[bytes]) -> Iterator[bytes]:
        size, crc = 0, 0
        for part in (content,) if isinstance(content, bytes) else content:
            size += len(part)
            crc = google_crc32c.extend(crc, part)
            yield part
        records[name] = {"bytes": size, "crc32c": crc}

    try:
        make_durable_folder(folder)
        delete(staged)
        write_durable(staged, {name: summed(name, content) for name, content in files.items()})
        _drop(path)  # what a process that died before the mark has left
        publish_folder(staged, path)
        write_atomic(path / COMPLETE, to_json({"format": FORMAT, "step": step, "files": records}))
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        with contextlib.suppress(OSError):  # what it took is free again
            delete(staged)
        safe = [f"{old.name} is safe" for old in checkpoints(folder)[:1]]
        raise ResourceError(
            f"{DISK_FULL[error.errno]}: {path}: {'; '.join(safe) or 'no checkpoint is there yet'}; "
            f"{shutil.disk_usage(folder).free / 1e9:.2f} GB are free",
            "free some space (--dry-run says how much), then run the same command again",
        ) from error
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Those that are marked complete, the newest first."""
    return [path for path in _all(folder) if (path / COMPLETE).is_file()]


def step_of(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def rotate(folder: Path, keep: int | None, also: Path | None = None) -> None:
    """Delete all but the newest checkpoints, and the one that is to be kept too; None keeps all."""
    if keep is not None:
        for path in checkpoints(folder)[max(keep, 1) :]:
            if also is None or path.name != also.name:
                _drop(path)


def find_checkpoint(folder: Path, note: Callable[[str], None], strict: bool = False) -> Path | None:
    """The newest checkpoint that is whole; None if there is none.

    What was never marked complete is deleted. One that is damaged is said so and put aside, as
    damaged-checkpoint-N, for whoever wants to know why; StoreError instead if strict.
    """
    if not folder.is_dir():
        return None
    for path in _all(folder):
        if not (path / COMPLETE).is_file():
            note(f"{path}: ignored, it was not written to its end")
            _drop(path)
    for stale in folder.glob(f".{PREFIX}*.tmp"):
        delete(stale)
    for path in checkpoints(folder):
        problem = _damage(path)
        if problem is None:
            return path
        message = f"{path}: the checkpoint is damaged: {problem}"
        if strict:
            raise StoreError(
                message, "without --strict the same command goes on from the one before it"
            )
        aside = _free_name(path.with_name(f"damaged-{path.name}"))
        publish_folder(path, aside)
        note(f"{message}; kept aside as {aside.name}, going on from the one before it")
    return None


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _all(folder: Path) -> list[Path]:
    found = [p for p in folder.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of, reverse=True)


def _drop(path: Path) -> None:
    """Delete a checkpoint; its mark goes first, so that a half-deleted one is none."""
    delete(path / COMPLETE)
    delete(path)


def _free_name(path: Path) -> Path:
    number = 1
    found = path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint that is marked complete; ResourceError if it cannot be
    read for want of something."""
    try:
        record = read_json(path / COMPLETE)
        expected = {name: (part["bytes"], part["crc32c"]) for name, part in record["files"].items()}
        if record["format"] != FORMAT:
            return f"format {record['format']}, expected {FORMAT}"
        for name, sums in expected.items():
            size, crc = 0, 0
            with open(path / name, "rb") as file:
                while piece := file.read(_PIECE):
                    size += len(piece)
                    crc = google_crc32c.extend(crc, piece)
            if (size, crc) != sums:
                return f"{name}: expected {sums[0]} bytes of CRC {sums[1]}, found {size} of {crc}"
    except OSError as error:
        refuse_resource(error, path)
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{COMPLETE}: {type(error).__name__}: {error}"
    return None
