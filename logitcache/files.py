"""Durable files: atomic writes, deletion, reads that try again, hashes, locks. Nothing else in the
project renames, deletes or locks what must survive a crash."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import LockedError, ResourceError

_READ_TRIES, _READ_PAUSE_S = 3, 0.05
_NOT_DAMAGE = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)
DISK_FULL = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota reached",
    errno.EFBIG: "file too large",
}
FAILPOINT = "LOGITCACHE_FAILPOINT"
_passed = itertools.count(1)


def failpoint(name: str, path: Path) -> None:
    """A place where the tests let a process die or a system call fail; else it does nothing.

    LOGITCACHE_FAILPOINT is NUMBER, or NUMBER:ERROR as in 12:ENOSPC; it counts the failpoints that
    the process passes. Every change of a disk that we depend on has one before it.
    """
    wanted = os.environ.get(FAILPOINT)
    if wanted is None:
        return
    number, _, error = wanted.partition(":")
    if next(_passed) != int(number):
        return
    if not error:
        os._exit(137)
    code = getattr(errno, error)
    raise OSError(code, f"{os.strerror(code)} (failpoint {name})", str(path))


def fsync_path(path: Path) -> None:
    """Make a directory's list of names survive a power loss."""
    failpoint("sync folder", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int, path: Path) -> None:
    failpoint("sync file", path)
    os.fsync(descriptor)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        _sync(file.fileno(), path)


def _write(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file and make what is in it survive a power loss (its name: fsync_path)."""
    failpoint("write", path)
    try:
        with open(path, "wb") as file:
            file.writelines((content,) if isinstance(content, bytes) else content)
            file.flush()
            _sync(file.fileno(), path)
    except BaseException:  # a full disk, or no more parts: half a file is of no use
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def _rename(source: Path, target: Path) -> None:
    failpoint("rename", target)
    source.replace(target)


def _unlink(path: Path) -> None:
    failpoint("unlink", path)
    path.unlink()


def _remove_folder(path: Path) -> None:
    failpoint("remove folder", path)
    path.rmdir()


def _make_folder(path: Path) -> None:
    failpoint("make folder", path)
    path.mkdir(exist_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, as far as they are not there."""
    if not path.is_dir():
        make_folder(path.parent)
        _make_folder(path)


def make_durable_folder(path: Path) -> None:
    """The same, and they are still there after a power loss."""
    path = path.absolute()
    missing = [p for p in path.parents if not p.exists()]
    make_folder(path)
    for made in (path, *missing):
        with contextlib.suppress(PermissionError):  # a parent that we may enter, not list
            fsync_path(made.parent)


def write_durable(root: Path, files: Mapping[str, bytes | Iterable[bytes]]) -> None:
    """Write files, by name within root, so that each is whole or absent, and all are still there
    after a power loss. One sync a file and one a folder. A file may be given as parts, which are
    then made one by one while it is written."""
    folders: set[Path] = set()
    for name, content in files.items():
        path = root / name
        make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.tmp")
        _write(temporary, content)
        _rename(temporary, path)
        folders |= {*path.parents[: len(Path(name).parts)]}
    for folder in sorted(folders, reverse=True):  # inner ones first
        fsync_path(folder)


def parts_of(path: Path) -> Iterator[bytes]:
    """What is in a file, a mebibyte at a time: for write_durable to copy."""
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            yield part


def write_atomic(path: Path, content: str) -> None:
    """Write a text file so that readers see the old content or the new, never a part."""
    write_durable(path.parent, {path.name: content.encode("utf-8")})


def delete(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, so that it stays away after a power loss.
    Links are not followed; what is not there is no error."""
    if path.exists() or path.is_symlink():
        _delete(path)
        fsync_path(path.parent)


def _delete(path: Path) -> None:
    if not path.is_dir() or path.is_symlink():
        _unlink(path)
        return
    for child in sorted(path.iterdir()):
        _delete(child)
    _remove_folder(path)


def read_at(descriptor: int, length: int, offset: int, path: Path) -> bytes:
    """Read bytes of an open file, fewer only at its end.

    A failing disk or network mount is asked again, three times in all; ResourceError then.
    """
    parts: list[bytes] = []
    tries = 0
    while length > 0:
        try:
            part = os.pread(descriptor, length, offset)
        except OSError as error:
            tries += 1
            if tries == _READ_TRIES:
                raise ResourceError(
                    f"{path}: cannot be read at byte {offset}, tried {tries} times: "
                    f"{error.strerror} (errno {error.errno})",
                    "check the disk or the mount, then run the same command again",
                ) from None
            time.sleep(_READ_PAUSE_S * 4**tries)
            continue
        if not part:
            break
        parts.append(part)
        length, offset = length - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def refuse_resource(error: OSError, path: Path) -> None:
    """Raise ResourceError if a file could not be opened for want of something, not damage."""
    if error.errno not in _NOT_DAMAGE:
        return
    hint = "check the permissions and the disk, then run the same command again"
    limit = ""
    if error.errno == errno.EMFILE:
        limit = f" (this process may open {resource.getrlimit(resource.RLIMIT_NOFILE)[0]})"
        hint = "raise the limit (ulimit -n), or use fewer workers"
    raise ResourceError(f"{path}: {error.strerror}{limit}", hint) from None


def publish_folder(temporary: Path, path: Path) -> None:
    """Give a finished folder its name, at which there is nothing or an empty folder; it is there
    whole or not at all. What it holds must be on disk already."""
    _rename(temporary, path)
    fsync_path(path.parent)


def move_files(source: Path, target: Path) -> None:
    """Give files that a library wrote into a folder their names in another one of the same file
    system, over those that are there: each is whole or as it was. The source folder is gone then.
    """
    for path in sorted(source.rglob("*")):
        if path.is_file():
            _sync_file(path)
    _move(source, target)
    delete(source)


def _move(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_dir():
            make_folder(target / path.name)
            _move(path, target / path.name)
        else:
            _rename(path, target / path.name)
    fsync_path(target)


def to_json(value: Any) -> str:
    """JSON text with a fixed order of keys, so that equal values are equal bytes."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clear_folder(path: Path) -> None:
    """Delete what a folder holds, except lock files: whoever calls this holds one of them."""
    for child in sorted(path.iterdir()):
        if child.suffix != ".lock" or child.is_dir():
            _delete(child)
    fsync_path(path)


@contextlib.contextmanager
def lock(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a lock on a file ending in .lock; LockedError if another process has it, or wait.

    Shared locks go together and exclude an exclusive one. The kernel drops the lock when its
    process ends, so a killed builder leaves nothing to clean up.
    """
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    failpoint("lock", path)
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
