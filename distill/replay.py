"""Replay: documents sampled from what earlier generations learned from, so that a child keeps it.

How many: ``size`` documents of each earlier generation, and together at most ``fraction`` of the
mix with the new data; the smaller of the two rules. No document is taken twice, and none of the new
data is left out to reach a share.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from logitcache.documents import Document, read_documents
from logitcache.errors import InputError, UsageError
from logitcache.files import file_sha256, make_durable_folder, write_durable

from .records import to_line

FRACTION = 0.1


@dataclass(frozen=True)
class Replayed:
    """One earlier generation. file: None if nothing could be sampled. documents: there were to
    sample from. problems: of its recorded files, one a line."""

    name: str
    file: Path | None
    sampled: int
    documents: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class ReplayResult:
    """What was sampled, in the order of the generations; quota: documents of each, at most."""

    generations: tuple[Replayed, ...]
    quota: int

    @property
    def files(self) -> list[Path]:
        """The files to give to ``logitcache build``, one a generation that could be sampled."""
        return [each.file for each in self.generations if each.file is not None]

    @property
    def sampled(self) -> int:
        return sum(each.sampled for each in self.generations)

    @property
    def gone(self) -> list[str]:
        """Generations of whose data nothing is left."""
        return [each.name for each in self.generations if each.file is None and each.problems]

    def describe(self) -> dict[str, Any]:
        """The same as plain data, without places on this machine."""
        return {
            "quota": self.quota,
            "sampled": self.sampled,
            "gone": self.gone,
            "generations": [
                {
                    "name": each.name,
                    "sampled": each.sampled,
                    "documents": each.documents,
                    "problems": list(each.problems),
                }
                for each in self.generations
            ],
        }

    def notes(self) -> list[str]:
        """What a person should know of it, one line each."""
        lines = []
        for each in self.generations:
            lines += [f"replay: {each.name}: {problem}" for problem in each.problems]
            if each.file is None:
                lines.append(f"replay: {each.name}: nothing to sample from, left out")
            else:
                lines.append(f"replay: {each.name}: {each.sampled} of {each.documents} documents")
        return lines


def replay_quota(
    size: int, num_generations: int, main_documents: int | None, fraction: float = FRACTION
) -> int:
    """Documents of each generation: ``size``, or fewer (at least one) where they all would be more
    than ``fraction`` of the mix with ``main_documents`` new ones; None: ``size``."""
    if main_documents is None or num_generations == 0:
        return size
    together = main_documents * fraction / (1 - fraction)
    return max(1, min(size, math.floor(together / num_generations + 1e-9)))


def main_documents_for(sampled: int, fraction: float = FRACTION) -> int:
    """New documents of which ``sampled`` replayed ones make up ``fraction`` of the mix."""
    return math.ceil(sampled * (1 - fraction) / fraction - 1e-9)


def count_documents(paths: Sequence[Path]) -> int:
    """Documents in files that a build can use. InputError for one that it cannot."""
    return sum(1 for document in read_documents(tuple(paths)) if _usable(document))


def data_fingerprint(path: Path) -> str:
    """SHA-256 of a data file; of a folder, that of its files' names and hashes."""
    if not path.is_dir():
        return file_sha256(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def sample_replay(
    recorded: Mapping[str, Sequence[Path]],
    size: int,
    seed: int,
    out: Path,
    *,
    fingerprints: Mapping[Path, str] | None = None,
    main_documents: int | None = None,
    fraction: float = FRACTION,
    gold: Mapping[str, Collection[Path]] | None = None,
) -> ReplayResult:
    """Sample documents of each earlier generation, without replacement, into ``out/NAME.jsonl``.

    recorded: name of a generation -> the data files it learned from. fingerprints: what
    ``data_fingerprint`` was of them; one that is another now is not read. main_documents and
    fraction: see ``replay_quota``. gold: name of a generation -> those of its files whose documents
    counted as gold unless they said otherwise. Documents are whole, with messages and gold flags;
    where some of a generation's documents had a flag and others none, the others get ``gold:
    false``, as they were in its build. Empty ones are not sampled.

    A file that is gone, changed or damaged is told in ``problems``; what the others hold is sampled
    as if it were there. A generation of which nothing is left has no file in the result. The same
    input gives the same bytes, and files that are there already are not touched.

    Raises InputError if files were recorded and nothing is left of any, UsageError for arguments
    that cannot be.
    """
    _check(recorded, size, fraction)
    found = {
        name: _Sample(
            name,
            size,
            seed,
            list(dict.fromkeys(paths)),
            fingerprints or {},
            (gold or {}).get(name, ()),
        )
        for name, paths in recorded.items()
    }
    left = sum(bool(sample.kept) for sample in found.values())
    problems = [f"{name}: {p}" for name, sample in found.items() for p in sample.problems]
    if problems and not left:
        raise InputError(
            "nothing is left to replay of any earlier generation:\n  " + "\n  ".join(problems),
            "put the data back, or switch replay off",
        )
    quota = replay_quota(size, left, main_documents, fraction)
    generations = []
    for name, sample in found.items():
        documents = sample.documents(quota)
        path = out / f"{name}.jsonl" if documents else None
        if path is not None:
            _write_once(path, b"".join(map(to_line, documents)))
        problems_ = tuple(sample.problems)
        generations.append(Replayed(name, path, len(documents), sample.num_usable, problems_))
    return ReplayResult(tuple(generations), quota)


class _Sample:
    """The ``size`` documents of a generation that come first in an order drawn by the seed.

    The order is by a hash of (seed, generation, number of the file, number of the document), so a
    smaller sample is a part of a larger one, and a file that is gone does not change what the
    others give.
    """

    def __init__(
        self,
        name: str,
        size: int,
        seed: int,
        paths: Sequence[Path],
        fingerprints: Mapping[Path, str],
        gold: Collection[Path],
    ):
        self.gold = gold
        self.size, self.purpose = size, f"replay {seed} {name}"
        self.kept: list[tuple[int, int, int, Document]] = []  # a heap: the last in order on top
        self.problems: list[str] = []
        self.num_usable, self.has_flags = 0, False
        for number, path in enumerate(paths):
            problem = _changed(path, fingerprints.get(path))
            if problem is None:
                problem = self._take(number, path)
            if problem is not None:
                self.problems.append(problem)

    def _take(self, number: int, path: Path) -> str | None:
        """Read one file; what is wrong with it, in which case nothing of it is taken."""
        kept, usable, has_flags = list(self.kept), 0, False
        try:
            for at, document in enumerate(read_documents((path,))):
                if document.gold is None and path in self.gold:
                    document = replace(document, gold=True)
                has_flags |= document.gold is not None
                if not _usable(document):
                    continue
                to_line(document)
                usable += 1
                key = hashlib.sha256(f"{self.purpose} {number} {at}".encode()).digest()
                entry = (-int.from_bytes(key[:16]), number, at, document)
                if len(kept) < self.size:
                    heapq.heappush(kept, entry)
                elif entry > kept[0]:
                    heapq.heapreplace(kept, entry)
        except InputError as error:
            return f"cannot be used: {error}"
        self.kept = kept
        self.num_usable += usable
        self.has_flags |= has_flags
        return None if usable else f"{path}: only empty documents in it"

    def documents(self, quota: int) -> list[Document]:
        """The sample, in the order of the data."""
        first = sorted(heapq.nlargest(quota, self.kept), key=lambda entry: entry[1:3])
        return list(self._flagged([entry[3] for entry in first]))

    def _flagged(self, documents: list[Document]) -> Iterator[Document]:
        for document in documents:
            silent = document.gold is None and self.has_flags
            yield replace(document, gold=False) if silent else document


def _usable(document: Document) -> bool:
    return document.messages is not None or bool(document.text and document.text.strip())


def _changed(path: Path, fingerprint: str | None) -> str | None:
    if not path.exists():
        return f"{path}: is gone"
    if fingerprint is not None and data_fingerprint(path) != fingerprint:
        return f"{path}: has changed since it was recorded (SHA-256)"
    return None


def _check(recorded: Mapping[str, Sequence[Path]], size: int, fraction: float) -> None:
    if isinstance(size, bool) or size < 1:
        raise UsageError(f"replay size: expected a number of documents from 1, found {size}")
    if not 0 < fraction < 1:
        raise UsageError(f"replay fraction: expected a number in (0, 1), found {fraction}")
    for name in recorded:
        if not name or Path(name).name != name or name.startswith(".") or not name.isprintable():
            raise UsageError(f"generation {name!r}: expected a name that a file can have")


def _write_once(path: Path, content: bytes) -> None:
    if path.is_file() and path.read_bytes() == content:
        return
    make_durable_folder(path.parent)
    write_durable(path.parent, {path.name: content})
