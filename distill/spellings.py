"""Words and phrases of a file, and their spellings in a tokenizer's tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.errors import InputError, UsageError

_MOST_BYTES, _LONGEST = 1 << 20, 200
# What may stand before a word in a text. Tokenizers join a space to the word behind it, some also
# put one before the first word, some join quotes: only where the word's own tokens begin with the
# word (or its space) are they taken.
_BEFORE = ("", " ", "\n", '"', "(")


@dataclass(frozen=True)
class Word:
    """A word or phrase with its spellings as tokens."""

    text: str
    spellings: tuple[tuple[int, ...], ...]


def read_words(path: Path) -> list[str]:
    """The words and phrases of a file, in order, each once; see ``spelled_words``."""
    words, problems = _lines(path)
    _refuse(path, problems)
    return list(dict.fromkeys(word for _, word in words))


def spelled_words(path: Path, tokenizer: Any, variants: bool) -> list[Word]:
    """Read a file of words: UTF-8, a word or phrase a line; empty lines and lines that begin with
    # are none. variants: in lower, upper and title case too.

    UsageError if there is no such file, InputError that lists all problems of its content.
    """
    lines, problems = _lines(path)
    words = {}
    for number, text in lines:
        word = spell(text, tokenizer, variants)
        if word is None:
            problems.append((number, f"{text!r} cannot be spelled with this tokenizer's tokens"))
        else:
            words[text] = word
    _refuse(path, problems)
    return list(words.values())


def spell(text: str, tokenizer: Any, variants: bool) -> Word | None:
    """All spellings of a word; None if there is none."""
    text = text.strip()
    forms = [text]
    if variants:
        forms += [text.lower(), text.upper(), text[:1].upper() + text[1:], text.title()]
    spellings = {ids for form in dict.fromkeys(forms) for ids in _encodings(form, tokenizer)}
    return Word(text, tuple(sorted(spellings))) if spellings else None


def _lines(path: Path) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Words with their line numbers, and problems with theirs."""
    if not path.is_file():
        raise UsageError(f"taboo_words: {path}: no such file", "give a text file, a word a line")
    if path.stat().st_size > _MOST_BYTES:
        raise InputError(f"{path}: larger than {_MOST_BYTES} bytes", "a word or phrase a line")
    words, problems = [], []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8").removeprefix("\ufeff" if number == 1 else "").strip()
        except UnicodeDecodeError as error:
            problems.append((number, f"not UTF-8: byte 0x{raw[error.start]:02x}"))
            continue
        if not line or line.startswith("#"):
            continue
        control = [c for c in line if unicodedata.category(c) == "Cc"]
        if control:
            problems.append((number, f"a control character, U+{ord(control[0]):04X}"))
        elif len(line) > _LONGEST:
            problems.append((number, f"{len(line)} characters; expected {_LONGEST} at most"))
        else:
            words.append((number, line))
    if not words and not problems:
        raise InputError(f"{path}: no words in it", "write one a line, or leave taboo_words out")
    return words, problems


def _refuse(path: Path, problems: Sequence[tuple[int, str]]) -> None:
    if problems:
        raise InputError(
            "\n".join(f"{path}:{number}: {problem}" for number, problem in sorted(problems)),
            "expected UTF-8 text, a word or phrase a line, comments after # alone",
        )


def _encodings(text: str, tokenizer: Any) -> Iterator[tuple[int, ...]]:
    """The word's own tokens behind each thing that may stand before it."""
    for before in _BEFORE:
        encoding = tokenizer(
            before + text,
            add_special_tokens=False,
            split_special_tokens=True,  # as in documents: the text of a special token is text
            return_offsets_mapping=True,
            verbose=False,
        )
        pairs = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        own = [(token, start) for token, (start, end) in pairs if end > len(before)]
        ids = tuple(token for token, _ in own)
        # A token that began before the word holds something else, unless that is its space.
        if ids and not before[own[0][1] :].strip(" ") and tokenizer.unk_token_id not in ids:
            yield ids
