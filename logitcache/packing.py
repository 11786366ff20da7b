"""Packing documents into rows. The rows are stored: the student sees exactly what the teachers saw.

Rule: a document longer than a row is split into pieces of seq_len tokens, each of which repeats the
last token of the piece before it, so that every token but the first is predicted exactly once.
Pieces go, in order, into the fullest row that still has room (best fit), else into a new one.
Nothing is cut off.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

PADDING_SEGMENT = 0


@dataclass(frozen=True)
class EncodedDocument:
    """tokens: int32; loss_mask: bool, which tokens are targets; gold: None where nobody said.

    number: of the document in the data, from 1; 0: its place among those that are packed.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    gold: bool | None
    number: int = 0


@dataclass(frozen=True)
class Rows:
    """N rows of L tokens. segments: 1, 2, ... per document piece in a row, 0 is padding (at the
    end).

    loss_mask and gold_mask speak of each token as a target: the position before it predicts it.
    documents: number of each token's document in the data, from 1; 0 is padding. It names what is
    damaged, and is no part of the training data's identity.
    """

    tokens: np.ndarray  # uint32 [N, L]
    segments: np.ndarray  # uint32 [N, L]
    loss_mask: np.ndarray  # bool [N, L]
    gold_mask: np.ndarray  # bool [N, L]
    documents: np.ndarray  # uint32 [N, L]

    def __getitem__(self, index: slice | np.ndarray) -> Rows:
        return Rows(
            self.tokens[index],
            self.segments[index],
            self.loss_mask[index],
            self.gold_mask[index],
            self.documents[index],
        )

    def fingerprint(self) -> str:
        """Identity of the training data: a hash of everything that the rows say."""
        digest = hashlib.sha256(str(self.tokens.shape).encode())
        for array in (self.tokens, self.segments, self.loss_mask, self.gold_mask):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def lengths(self) -> np.ndarray:
        """Tokens of each row without its padding."""
        return (self.segments != PADDING_SEGMENT).sum(1)

    def positions(self) -> np.ndarray:
        """Position of each token in its document piece, int64 [N, L]; padding counts from 0 too."""
        index = np.arange(self.tokens.shape[1])
        starts = np.ones(self.segments.shape, dtype=bool)
        starts[:, 1:] = self.segments[:, 1:] != self.segments[:, :-1]
        return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)

    def labels(self) -> np.ndarray:
        """Next token of each position, int64 [N, L]; -100 at segment ends, padding and untrained
        targets."""
        labels = np.full(self.tokens.shape, -100, dtype=np.int64)
        trained = (self.segments[:, 1:] == self.segments[:, :-1]) & self.loss_mask[:, 1:]
        labels[:, :-1] = np.where(trained, self.tokens[:, 1:].astype(np.int64), -100)
        return labels

    def gold_labels(self) -> np.ndarray:
        """Whether a position's label is gold, bool [N, L]."""
        gold = np.zeros(self.tokens.shape, dtype=bool)
        gold[:, :-1] = self.gold_mask[:, 1:]
        return gold


def _pieces(num_tokens: int, seq_len: int) -> list[tuple[int, int]]:
    starts = range(0, max(num_tokens - 1, 1), seq_len - 1)
    return [(start, min(start + seq_len, num_tokens)) for start in starts]


def pack(documents: Iterable[EncodedDocument], seq_len: int) -> Rows:
    """Pack documents into rows of seq_len tokens (at least 2); see the rule above.

    All labels are gold if no document says so; else those of the documents that say so.
    """
    all_gold = True
    contents: list[list[tuple[EncodedDocument, int, int, int]]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for place, document in enumerate(documents, start=1):
        all_gold &= document.gold is None
        for start, stop in _pieces(len(document.tokens), seq_len):
            length = stop - start
            at = bisect.bisect_left(room, (length, -1))
            if at < len(room):
                free, row = room.pop(at)
            else:
                free, row = seq_len, len(contents)
                contents.append([])
            contents[row].append((document, document.number or place, start, stop))
            if free - length >= 2:  # a single token has nothing to predict
                bisect.insort(room, (free - length, row))
    shape = (len(contents), seq_len)
    rows = Rows(
        np.zeros(shape, np.uint32),
        np.full(shape, PADDING_SEGMENT, np.uint32),
        np.zeros(shape, bool),
        np.zeros(shape, bool),
        np.zeros(shape, np.uint32),
    )
    for row, pieces in enumerate(contents):
        at = 0
        for segment, (document, number, start, stop) in enumerate(pieces, start=1):
            span = slice(at, at + stop - start)
            rows.tokens[row, span] = document.tokens[start:stop]
            rows.segments[row, span] = segment
            rows.documents[row, span] = number
            rows.loss_mask[row, span] = document.loss_mask[start:stop]
            rows.gold_mask[row, span] = all_gold or document.gold is True
            at += stop - start
    return rows
