"""Taboo words: from a file of words and phrases to the token ids that a student must not say.

A spelling that is one token is taboo everywhere. One of several tokens is a phrase: its last token
is taboo where the tokens before it, within the same piece of a document, spell the rest, from the
beginning of a word on ("k", "ing" is not found in "mak", "k", "ing"). What is looked for are the
spellings that the tokenizer itself gives to running text. What follows is not known yet: a word
that begins another ("king" in "kingdom") is as taboo there.

Legend: B rows, L positions of a row, K taboo ids of the position that has most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitcache import StoreReader, open_store
from logitcache.causal_lm import Head, choose_device, hidden_states, load_causal_lm
from logitcache.documents import Document
from logitcache.errors import InputError, UsageError
from logitcache.packing import Rows, pack
from logitcache.tokenise import Encoder, load_tokenizer
from logitcache_kernels.distill_reference import taboo_mask

from .config import DistillConfig
from .spellings import Word, spell, spelled_words

_SPACES = ("\u0120", "\u2581", " ")  # how tokens spell a space: byte-level, SentencePiece, plain
_MOST_ROWS = 4096  # of a store, looked at for what is touched
_ROW_TOKENS = 512  # of texts whose mass is measured
_CHUNK_ELEMENTS = 2**25  # logits that exist at once


@dataclass(frozen=True)
class Taboo:
    """All words of a file. word_end_V: which tokens end in a letter or digit."""

    words: tuple[Word, ...]
    starts_inside: frozenset[int]  # tokens with which a word begins that could go on another
    word_end_V: np.ndarray

    @cached_property
    def ids(self) -> tuple[int, ...]:
        """Ids that are taboo everywhere, rising."""
        return tuple(sorted({s[0] for word in self.words for s in word.spellings if len(s) == 1}))

    @cached_property
    def phrases(self) -> tuple[tuple[int, ...], ...]:
        """Spellings of two tokens and more."""
        return tuple(sorted({s for word in self.words for s in word.spellings if len(s) > 1}))

    @cached_property
    def _endings(self) -> dict[tuple[int, ...], list[int]]:
        """Last tokens of the phrases that begin in some way."""
        endings: dict[tuple[int, ...], list[int]] = {}
        for phrase in self.phrases:
            endings.setdefault(phrase[:-1], []).append(phrase[-1])
        return endings

    def phrase_ids(self, rows: Rows) -> np.ndarray | None:
        """Ids that are taboo as the next token because of what stands before it, int32 [B, L, K],
        -1 padded; None if there are none in these rows."""
        endings = self._endings
        lengths = sorted({len(beginning) for beginning in endings})
        tokens, segments = rows.tokens.astype(np.int64), rows.segments
        found: dict[tuple[int, int], list[int]] = {}
        last = np.isin(tokens, [beginning[-1] for beginning in endings]) & (segments > 0)
        for row, at in zip(*(index.tolist() for index in np.nonzero(last)), strict=True):
            for length in lengths:
                start = at + 1 - length
                if start < 0 or segments[row, start] != segments[row, at]:
                    break
                ids = endings.get(tuple(tokens[row, start : at + 1].tolist()))
                if ids and not self._goes_on(tokens[row], segments[row], start):
                    found.setdefault((row, at), []).extend(ids)
        if not found:
            return None
        width = max(map(len, found.values()))
        taboo_BLK = np.full((*tokens.shape, width), -1, np.int32)
        for (row, at), ids in found.items():
            taboo_BLK[row, at, : len(ids)] = ids
        return taboo_BLK

    def _goes_on(self, tokens: np.ndarray, segments: np.ndarray, start: int) -> bool:
        """Whether a word that seems to begin at a token is the rest of a longer one."""
        return bool(
            start > 0
            and segments[start - 1] == segments[start]
            and int(tokens[start]) in self.starts_inside
            and self.word_end_V[tokens[start - 1]]
        )

    def inputs(self, rows: Rows) -> dict[str, torch.Tensor]:
        """Arguments of the student's forward for a batch."""
        given = {}
        if self.ids:
            given["taboo_ids"] = torch.tensor(self.ids)
        phrases = self.phrase_ids(rows)
        if phrases is not None:
            given["taboo_BLK"] = torch.from_numpy(phrases)
        return given


def read_taboo(path: Path, tokenizer: Any, variants: bool) -> Taboo:
    """Read a file of taboo words; see ``spelled_words``."""
    return _together(spelled_words(path, tokenizer, variants), tokenizer)


def configured_taboo(config: DistillConfig, tokenizer: Any) -> Taboo | None:
    """The taboo words of a training's settings; UsageError for settings that do not go together."""
    if config.taboo_words is None:
        return None
    if config.divergence == "reverse_kl" and config.taboo == "target":
        raise UsageError(
            "taboo_words: divergence reverse_kl would be infinite with taboo=target",
            "--set taboo=neutral, or another divergence",
        )
    return read_taboo(Path(config.taboo_words), tokenizer, config.taboo_variants)


def make_taboo(words: Iterable[str], tokenizer: Any, variants: bool) -> Taboo:
    """The same from a list of words. InputError if one cannot be spelled."""
    found = {text: spell(text, tokenizer, variants) for text in words}
    bad = [text for text, word in found.items() if word is None]
    if bad:
        raise InputError(f"taboo words: {', '.join(map(repr, bad))}: no tokens spell them")
    return _together([word for word in found.values() if word is not None], tokenizer)


def _together(words: Iterable[Word], tokenizer: Any) -> Taboo:
    unique = tuple({word.text: word for word in words}.values())
    first = {s[0]: word.text[0] for word in unique for s in word.spellings if len(s) > 1}
    inside = [
        token
        for token, start in first.items()
        if start.isalnum() and not tokenizer.convert_ids_to_tokens(token).startswith(_SPACES)
    ]
    word_end_V = np.zeros(len(tokenizer), dtype=bool)
    if inside:
        texts = tokenizer.backend_tokenizer.decode_batch([[i] for i in range(len(tokenizer))])
        word_end_V[:] = [text[-1:].isalnum() for text in texts]
    return Taboo(unique, frozenset(inside), word_end_V)


def describe_taboo(taboo: Taboo, tokenizer: Any, reader: StoreReader) -> dict[str, Any]:
    """Words with their spellings, and what they change of a store."""
    return {
        "words": [
            {
                "word": word.text,
                "spellings": [
                    {"ids": list(ids), "tokens": tokenizer.convert_ids_to_tokens(list(ids))}
                    for ids in word.spellings
                ],
            }
            for word in taboo.words
        ],
        "ids": list(taboo.ids),
        "phrases": [list(phrase) for phrase in taboo.phrases],
        "touched": touched(taboo, reader),
    }


def render_taboo(document: dict[str, Any]) -> list[str]:
    """The same for a person, a word a line."""
    found = document["touched"]
    lines = [
        f"taboo          {len(document['words'])} words: {len(document['ids'])} ids, "
        f"{len(document['phrases'])} phrases; of {found['positions']:,} positions in "
        f"{found['rows']:,} rows {found['taboo_labels']:,} have a taboo label, at "
        f"{found['phrase_positions']:,} a phrase may end"
    ]
    for word in document["words"]:
        spelled = ", ".join(
            "+".join(map(str, s["ids"])) + " " + "".join(s["tokens"]) for s in word["spellings"]
        )
        lines.append(f"  {word['word']}: {spelled}")
    return lines


def touched(taboo: Taboo, reader: StoreReader) -> dict[str, int]:
    """What taboo words change of a store: rows looked at (all of them, or 4096 spread evenly),
    positions trained on in these, those whose label is taboo (and no gold any more), and those at
    which a phrase forbids its last token."""
    rows = np.unique(np.linspace(0, len(reader) - 1, min(len(reader), _MOST_ROWS)).astype(np.int64))
    found = {"rows": len(rows), "positions": 0, "taboo_labels": 0, "phrase_positions": 0}
    for index in np.array_split(rows, -(-len(rows) // 64)):
        batch = reader.read_rows(index)
        labels, phrases = batch.labels(), taboo.phrase_ids(batch)
        forbidden = np.isin(labels, taboo.ids)
        if phrases is not None:
            valid = (labels != -100) & (phrases >= 0).any(-1)
            found["phrase_positions"] += int(valid.sum())
            forbidden |= (phrases == labels[:, :, None]).any(-1)
        found["positions"] += int((labels != -100).sum())
        found["taboo_labels"] += int(forbidden.sum())
    return found


def taboo_mass(
    model: Path,
    text: Path | str | Sequence[str],
    words: Path | str | Sequence[str],
    *,
    variants: bool = False,
    device: str = "auto",
    most_rows: int = 256,
) -> float:
    """Mean probability that a model gives to taboo tokens, at T = 1, over the positions trained on
    of a store's rows (``most_rows``, spread evenly) or of texts.

    model: its folder. text: a store's path, or texts in a list. words: their file's path, or words
    in a list. At every position all single-token spellings count, and the last tokens of phrases
    that the tokens before it spell. InputError where no text has two tokens.
    """
    tokenizer = load_tokenizer(model)
    taboo = (
        read_taboo(Path(words), tokenizer, variants)
        if isinstance(words, (str, Path))
        else make_taboo(words, tokenizer, variants)
    )
    place = choose_device(device)
    loaded = load_causal_lm(model, torch.float32, place)
    mass = mass_on_rows(loaded, taboo, _rows_of(text, loaded, tokenizer, most_rows))
    if math.isnan(mass):
        raise InputError("taboo mass: no position to measure it at", "give longer texts")
    return mass


@torch.no_grad()
def mass_on_rows(model: Any, taboo: Taboo, rows: Rows, batch_rows: int = 8) -> float:
    """The same of a loaded model on some rows; NaN if nothing is trained on in them."""
    head, total, count = Head.of(model), 0.0, 0
    device = head.weight_VD.device
    chunk = max(_CHUNK_ELEMENTS // head.weight_VD.shape[0], 16)
    for start in range(0, len(rows.tokens), batch_rows):
        part = rows[start : start + batch_rows]
        given = {name: x.to(device) for name, x in taboo.inputs(part).items()}
        phrases = given.get("taboo_BLK")
        tokens = torch.from_numpy(part.tokens.astype("int64")).to(device)
        hidden = hidden_states(model, tokens, torch.from_numpy(part.positions()).to(device))
        (valid,) = (torch.from_numpy(part.labels().reshape(-1)) != -100).nonzero(as_tuple=True)
        count += len(valid)
        for at in valid.to(device).split(chunk):
            logits_RV = head.logits(hidden.flatten(0, 1)[at]).float()
            _, taboo_RV = taboo_mask(
                logits_RV.shape[1],
                len(at),
                device,
                given.get("taboo_ids"),
                None if phrases is None else phrases.flatten(0, 1)[at],
            )
            if taboo_RV is not None:
                total += float(torch.where(taboo_RV, logits_RV.softmax(-1), 0.0).double().sum())
    return total / count if count else float("nan")


def _rows_of(text: Path | str | Sequence[str], model: Any, tokenizer: Any, most_rows: int) -> Rows:
    if isinstance(text, (str, Path)):
        reader = open_store(text)
        number = min(len(reader), most_rows)
        return reader.read_rows(np.unique(np.linspace(0, len(reader) - 1, number).astype(int)))
    documents = [Document(f"text {n}", t, None, None) for n, t in enumerate(text, start=1)]
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return pack(Encoder(tokenizer).encode(documents), min(_ROW_TOKENS, longest or _ROW_TOKENS))
