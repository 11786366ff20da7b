"""Durable files: atomic writes, hashes, locks. Nothing else in the project renames or locks."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import LockedError


def fsync_path(path: Path) -> None:
    """Make a file, or a directory's list of names, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str) -> None:
    """Write a text file so that readers see the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_path(path.parent)


def publish_folder(temporary: Path, path: Path) -> None:
    """Give a finished folder its name, at which there is nothing or an empty folder; it is there
    whole or not at all. What it holds must be on disk already."""
    temporary.rename(path)
    fsync_path(path.parent)


def to_json(value: Any) -> str:
    """JSON text with a fixed order of keys, so that equal values are equal bytes."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clear_folder(path: Path) -> None:
    """Delete what a folder holds, except lock files: whoever calls this holds one of them."""
    for child in path.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.suffix != ".lock":
            child.unlink()


@contextlib.contextmanager
def lock(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a lock on a file ending in .lock; LockedError if another process has it, or wait.

    Shared locks go together and exclude an exclusive one. The kernel drops the lock when its
    process ends, so a killed builder leaves nothing to clean up.
    """
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, kind)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise LockedError(
                f"{path.parent}: locked by {owner}",
                "wait for it to end, then run the same command again",
            ) from None
        if not shared:
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M")
            file.write(f"process {os.getpid()} on {os.uname().nodename} since {since}")
            file.flush()
        yield
        if not shared:
            file.truncate(0)
