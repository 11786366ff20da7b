"""Sources of a store: one per path of ``--data``, so that training can tell where its text comes
from.

The manifest names them in order with their numbers of documents; documents are numbered from 1 in
that order, so the array ``documents`` says of which source a token is. Imports no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import StoreError, UsageError

MAX_SOURCES, MAX_NAME = 1 << 16, 100
_UNSAFE = re.compile(r"[\x00-\x20\x7f-\x9f\ud800-\udfff/\\]")


def source_names(paths: Sequence[Path]) -> list[str]:
    """A name for each path: its stem, with -2, -3, ... where another has it already."""
    names: dict[str, None] = {}
    used: Counter[str] = Counter()
    for path in paths:
        name = stem = _UNSAFE.sub("_", path.stem)[: MAX_NAME - 8] or "data"
        while name in names:
            used[stem] += 1
            name = f"{stem}-{used[stem] + 1}"
        names[name] = None
    return list(names)


def describe_sources(
    paths: Sequence[Path], documents: Sequence[int], documents_NL: np.ndarray
) -> list[dict[str, Any]]:
    """The manifest's list: name, documents (also those left out) and tokens of each source.

    documents_NL: the rows' document numbers, from 1, 0 where there is padding. UsageError for more
    paths than a store can have.
    """
    if len(paths) > MAX_SOURCES:
        raise UsageError(f"--data: expected at most {MAX_SOURCES} paths, found {len(paths)}")
    ends = np.cumsum(documents)
    owner = np.searchsorted(ends, documents_NL[documents_NL > 0])
    tokens = np.bincount(owner, minlength=len(ends))
    return [
        {"name": name, "documents": int(number), "tokens": int(count)}
        for name, number, count in zip(source_names(paths), documents, tokens, strict=True)
    ]


def possible_sources(sources: Any, documents: Any) -> bool:
    """Whether a manifest's list of sources can be one of a store with so many documents."""
    if not (isinstance(sources, list) and 0 < len(sources) <= MAX_SOURCES):
        return False
    for source in sources:
        if not (isinstance(source, dict) and isinstance(source.get("name"), str)):
            return False
        if not 0 < len(source["name"]) <= MAX_NAME or _UNSAFE.search(source["name"]):
            return False
        for key in ("documents", "tokens"):
            number = source.get(key)
            if not (type(number) is int and 0 <= number <= 1 << 62):
                return False
    if len({source["name"] for source in sources}) != len(sources):
        return False
    return bool(sum(source["documents"] for source in sources) == documents)


def source_numbers(manifest: Mapping[str, Any], documents_BL: np.ndarray) -> np.ndarray:
    """Number of each token's source in the manifest's list, int64 [B, L]; -1 where there is
    padding. StoreError for a document that no source has."""
    ends = np.cumsum([source["documents"] for source in manifest["sources"]])
    if documents_BL.size and int(documents_BL.max()) > ends[-1]:
        raise StoreError(
            f"documents: expected numbers up to {ends[-1]}, found {documents_BL.max()}",
            "build the store again with --fresh",
        )
    return np.where(documents_BL > 0, np.searchsorted(ends, documents_BL), -1)
