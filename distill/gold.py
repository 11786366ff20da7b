"""Gold data: which documents are curated examples, where a corpus is put together from several.

A build takes all labels for gold if no document says otherwise, else those of the documents that
say so. Put together as they are, files would change one another's meaning; here each keeps its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from logitcache.documents import read_documents
from logitcache.errors import UsageError
from logitcache.sources import source_names

from .records import with_flag, write_lines


@dataclass(frozen=True)
class MarkedData:
    """Data of a build, in this order. gold_documents: None says that all labels are gold."""

    train: list[Path]
    gold: list[Path]
    replay: list[Path]
    gold_documents: int | None

    @property
    def files(self) -> list[Path]:
        return [*self.train, *self.gold, *self.replay]


def mark_gold(
    train: Sequence[Path], gold: Sequence[Path], replay: Sequence[Path], out: Path
) -> MarkedData:
    """Make files of which a build takes the documents of ``gold`` for gold and no others.

    A document that says itself whether it is gold (true or false) is believed, in whatever file.
    One that does not is gold if it is from a file of ``gold``; if there are none, and no document
    of ``train`` says anything, then all of these are gold, as in a build of ``train`` alone.

    Files whose documents already mean this are given back as they are; others are written to
    ``out``, as JSON Lines under their own stem. The same input gives the same bytes.

    Raises InputError for a file that is missing or cannot be used, UsageError if it would be
    overwritten.
    """
    paths = [*train, *gold, *replay]
    flags = [Counter(document.gold for document in read_documents((path,))) for path in paths]
    kinds = ["train"] * len(train) + ["gold"] * len(gold) + ["replay"] * len(replay)
    says = [count[True] + count[False] > 0 for count in flags]
    curated = bool(gold) or any(s for s, kind in zip(says, kinds, strict=True) if kind == "train")
    if not curated and not any(says):
        return MarkedData(list(train), [], list(replay), None)

    made: dict[str, list[Path]] = {"train": [], "gold": [], "replay": []}
    num_gold = 0
    names = source_names(paths)
    for path, name, kind, count in zip(paths, names, kinds, flags, strict=True):
        silent_is_gold = kind == "gold" or not curated
        num_gold += count[True] + (count[None] if silent_is_gold else 0)
        if silent_is_gold and count[None]:
            written = out / f"{name}.jsonl"
            if written.resolve() == path.resolve():
                raise UsageError(
                    f"{out}: holds {path.name}, one of the data files, which would be overwritten",
                    "give another folder for the files with flags",
                )
            write_lines(written, with_flag(read_documents((path,)), True))
            made[kind].append(written)
        else:  # silence means "not gold" beside documents that say "gold"
            made[kind].append(path)
    return MarkedData(made["train"], made["gold"], made["replay"], num_gold)
