"""What a disk may hold after a power loss: the recorded changes, of which any that was not synced
may be missing.

A file's name is safe when its folder was synced afterwards, its content when the file was. Of the
rest any subset may have reached the disk, in any order, and a content in part: file systems promise
no more (ALICE, OSDI 2014).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import logitcache.files

Change = tuple[str, Path, object]
CHANGES = ("_write", "_rename", "_unlink", "_remove_folder", "_make_folder", "fsync_path")


@contextlib.contextmanager
def recorded() -> Iterator[list[Change]]:
    """Record what the module that makes all changes does to the disk."""
    log: list[Change] = []
    before = {name: getattr(logitcache.files, name) for name in CHANGES}

    def recorder(name: str):
        def record(path: Path, *rest: object) -> None:
            if name == "_write" and not isinstance(rest[0], bytes):  # given in parts
                rest = (b"".join(rest[0]),)
            before[name](path, *rest)
            kind = name.strip("_")
            if kind == "rename":
                path, rest = rest[0], (path,)
            log.append((kind, path.absolute(), rest[0] if rest else None))
            if kind == "write":
                log.append(("sync", path.absolute(), None))

        return record

    for name in CHANGES:
        setattr(logitcache.files, name, recorder(name))
    try:
        yield log
    finally:
        for name, function in before.items():
            setattr(logitcache.files, name, function)


def open_changes(log: list[Change]) -> set[int]:
    """Numbers of the changes of names that no sync of their folder has made safe yet, and of the
    writes whose content is not safe: as ~number."""
    unsafe: dict[Path, set[int]] = {}
    contents: dict[Path, int] = {}
    for number, (kind, path, _) in enumerate(log):
        if kind == "fsync_path":
            unsafe.pop(path, None)
        elif kind == "sync":
            contents.pop(path, None)
        else:
            unsafe.setdefault(path.parent, set()).add(number)
            if kind == "write":
                contents[path] = number
    return {n for numbers in unsafe.values() for n in numbers} | {~n for n in contents.values()}


class Disk:
    """Files by path, None for a folder."""

    def __init__(self, root: Path, start: Path | None):
        self.root = root
        self.start: dict[Path, bytes | None] = {}
        if start is not None:
            self.start = {root / p.relative_to(start): self._read(p) for p in start.rglob("*")}
            self.start[root] = None

    @staticmethod
    def _read(path: Path) -> bytes | None:
        return None if path.is_dir() else path.read_bytes()

    def after(self, log: list[Change], lost: set[int], share: float) -> dict[Path, bytes | None]:
        """What is there if changes are lost; share: of a content that is not safe, what is."""
        true, found = dict(self.start), dict(self.start)
        for number, (kind, path, other) in enumerate(log):
            for files, happens in ((true, True), (found, number not in lost)):
                if not happens or kind in ("sync", "fsync_path"):
                    continue
                if kind == "unlink":
                    files.pop(path, None)
                elif kind == "remove_folder":
                    for below in [p for p in files if p == path or path in p.parents]:
                        del files[below]
                elif kind == "make_folder":
                    files[path] = None
                elif kind == "write":
                    keep = len(other) if ~number not in lost else int(len(other) * share)
                    files[path] = (other, keep)
                elif true.get(path if files is found else other, b"") is None:  # a whole folder
                    for below in [p for p in files if p == other or other in p.parents]:
                        files[path / below.relative_to(other)] = files.pop(below)
                else:
                    # The file that was renamed, even if its old name never reached the disk.
                    if files is true:
                        moved = true.pop(other)
                        true[path] = moved
                    else:
                        files.pop(other, None)
                        files[path] = self._cut(true[path], moved_lost(log, number, lost), share)
        return {p: (c[0][: c[1]] if isinstance(c, tuple) else c) for p, c in found.items()}

    @staticmethod
    def _cut(content: object, lost: bool, share: float) -> object:
        if not isinstance(content, tuple) or not lost:
            return content
        return content[0], int(len(content[0]) * share)

    def write(self, files: dict[Path, bytes | None]) -> None:
        """Make it so, as far as the folders are there."""
        for path in sorted(files):
            if path == self.root or (path.is_relative_to(self.root) and path.parent.is_dir()):
                content = files[path]
                if content is None:
                    path.mkdir(exist_ok=True)
                else:
                    path.write_bytes(content)


def moved_lost(log: list[Change], number: int, lost: set[int]) -> bool:
    """Whether the content of a renamed file is not safe."""
    source = log[number][2]
    writes = [n for n in range(number) if log[n][0] == "write" and log[n][1] == source]
    return bool(writes) and ~writes[-1] in lost


def losses(log: list[Change], seed: int) -> Iterator[tuple[set[int], float]]:
    """Ways to lose what is not safe after a part of the log: all of it, contents only (wholly or
    in half), and some of it."""
    unsafe = open_changes(log)
    contents = {n for n in unsafe if n < 0}
    yield unsafe, 0.0
    if contents:
        yield contents, 0.0
        yield contents, 0.5
    if len(unsafe) > 1:
        draw = random.Random(seed)
        yield {n for n in sorted(unsafe) if draw.random() < 0.5}, 0.5
