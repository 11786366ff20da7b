"""Documents as JSON Lines, for data that is written anew: replayed samples and files with flags."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from logitcache.documents import Document
from logitcache.errors import InputError
from logitcache.files import make_durable_folder, write_durable


def to_line(document: Document) -> bytes:
    """A document as one line that ``logitcache build`` reads as the same document. ASCII, so that
    no character of it can end a line."""
    record: dict[str, Any] = {"text": document.text}
    if document.messages is not None:
        record = {"messages": document.messages}
    if document.gold is not None:
        record["gold"] = document.gold
    try:
        return json.dumps(record).encode("ascii") + b"\n"
    except (TypeError, ValueError) as error:  # Parquet knows dates and bytes, JSON does not
        raise InputError(
            f'{document.where}: "messages": cannot be written as JSON: {error}',
            "keep to strings, numbers, lists and objects in messages",
        ) from None


def with_flag(documents: Iterable[Document], gold: bool) -> Iterator[Document]:
    """The documents, those that do not say whether they are gold with this answer."""
    for document in documents:
        yield document if document.gold is not None else replace(document, gold=gold)


def write_lines(path: Path, documents: Iterable[Document]) -> None:
    """Write documents durably, one a line; the file is whole or not there."""
    make_durable_folder(path.parent)
    write_durable(path.parent, {path.name: (to_line(document) for document in documents)})
