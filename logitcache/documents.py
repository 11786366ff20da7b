"""Reading documents: JSONL, Parquet, text files and folders written by ``datasets.save_to_disk``.

A document has either a text or a list of messages, and says where it came from. Lines end at LF
only: U+2028 and its kin are text.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_TEXT_HINT = 'give each record a "text" string, or "messages" as a list of {"role", "content"}'


@dataclass(frozen=True)
class Document:
    """where: file and line or row. text or messages is None. gold: None where there is no such
    column."""

    where: str
    text: str | None
    messages: list[dict[str, str]] | None
    gold: bool | None


def read_documents(paths: Sequence[Path], counts: list[int] | None = None) -> Iterator[Document]:
    """Yield all documents in the order of the files. InputError for the first one that cannot be
    used. counts: a list to which the number of each path's documents is added once it is read."""
    for path in paths:
        found = 0
        for document in _read_one(path):
            found += 1
            yield document
        if counts is not None:
            counts.append(found)
        if not found:
            raise InputError(
                f"{path}: no documents in it", "give a file with at least one document"
            )


def input_files(paths: tuple[Path, ...]) -> list[Path]:
    """The files behind the given paths, folders opened, in a fixed order. InputError if one is
    missing."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder", "check the --data argument")
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return files


def _read_one(path: Path) -> Iterator[Document]:
    if path.is_dir():
        return _from_datasets(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _from_parquet(path)
    if suffix in JSON_SUFFIXES:
        return _from_jsonl(path)
    return _from_text(path)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n"), error.start - (before.rfind(b"\n") + 1)
        place = f"{where}:{column + 1}" if ":" in where else f"{where}:{line + 1}:{column + 1}"
        raise InputError(
            f"{place}: not UTF-8: byte 0x{raw[error.start]:02x}", "convert the file to UTF-8"
        ) from None


def _from_text(path: Path) -> Iterator[Document]:
    raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not raw.strip():
        raise InputError(f"{path}: the file is empty", "give a file with text in it")
    if b"\0" in raw[:4096]:
        raise InputError(
            f"{path}: expected text, found binary data",
            "known endings: .jsonl .ndjson .json (one record a line), .parquet; all "
            "others are plain text",
        )
    yield Document(str(path), _decode(raw, str(path)), None, None)


def _from_jsonl(path: Path) -> Iterator[Document]:
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty", "give a file with at least one record")
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            where = f"{path}:{number}"
            text = _decode(raw, where)
            try:
                record = json.loads(text)
            except RecursionError:
                raise InputError(
                    f"{where}: JSON nested too deeply", "simplify the record"
                ) from None
            except ValueError as error:  # also a number of more than 4300 digits
                what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise InputError(
                    f"{where}: not JSON: {what}", "expected one record a line"
                ) from None
            if not isinstance(record, dict):
                raise InputError(
                    f"{where}: expected an object, found {type(record).__name__}",
                    "expected one record a line (JSON Lines), not one list for the whole file",
                )
            yield _to_document(record, where)


def _from_parquet(path: Path) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a Parquet file: {error}") from None
    with file:
        names = set(file.schema_arrow.names)
        columns = [name for name in ("text", "messages", "gold") if name in names]
        _check_columns(names, str(path))
        number = 0
        batches = file.iter_batches(batch_size=1024, columns=columns)
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                raise InputError(f"{path}: damaged after row {number}: {error}") from None
            if batch is None:
                return
            for record in batch.to_pylist():
                number += 1
                yield _to_document(record, f"{path}: row {number}")


def _from_datasets(path: Path) -> Iterator[Document]:
    from datasets import Dataset, load_from_disk

    try:
        data = load_from_disk(str(path))
    except Exception as error:  # datasets and pyarrow raise many kinds for a bad folder
        raise InputError(
            f"{path}: not a folder written by datasets.save_to_disk: {error}",
            "give the files in it one by one, or save it with save_to_disk",
        ) from None
    if not isinstance(data, Dataset):
        splits = ", ".join(str(path / name) for name in data)
        raise InputError(f"{path}: holds several splits", f"give one of them: {splits}")
    _check_columns(set(data.column_names), str(path))
    for number, record in enumerate(data, start=1):
        yield _to_document(record, f"{path}: row {number}")


def _check_columns(names: set[str], where: str) -> None:
    if not names & {"text", "messages"}:
        raise InputError(
            f'{where}: expected a column "text" or "messages", found {sorted(names) or "none"}',
            _TEXT_HINT,
        )


def _to_document(record: Mapping[str, Any], where: str) -> Document:
    _check_columns(set(record), where)
    gold = None
    if "gold" in record:
        gold = record["gold"]
        if not isinstance(gold, bool):
            raise InputError(
                f'{where}: "gold": expected true or false, found {_show(gold)}',
                "mark curated examples with true, all others with false",
            )
    if record.get("messages") is not None:
        return Document(where, None, _to_messages(record["messages"], where), gold)
    name = "text" if "text" in record else "messages"
    text = record[name]
    if text is None:
        raise InputError(f'{where}: "{name}" is null', _TEXT_HINT)
    if not isinstance(text, str):
        raise InputError(f'{where}: "{name}": expected a string, found {_show(text)}', _TEXT_HINT)
    return Document(where, _check_text(text, f'{where}: "text"'), None, gold)


def _to_messages(messages: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise InputError(
            f'{where}: "messages": expected a list of messages, found {_show(messages)}', _TEXT_HINT
        )
    for number, message in enumerate(messages):
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, dict) else None
            if not isinstance(value, str):
                raise InputError(
                    f'{where}: "messages"[{number}].{key}: expected a string, found {_show(value)}',
                    _TEXT_HINT,
                )
            _check_text(value, f'{where}: "messages"[{number}].{key}')
    return messages


def _check_text(text: str, where: str) -> str:
    # JSON can spell half of a surrogate pair, which is no character.
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where}: lone surrogate at character {error.start + 1}", "remove or replace it"
            ) from None
    return text


def _show(value: Any) -> str:
    if value is None:
        return "null"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
