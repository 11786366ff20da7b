"""Packing: every token is predicted exactly once, inside its own document."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.packing import EncodedDocument, pack


@st.composite
def corpora(draw) -> tuple[list[EncodedDocument], int]:
    """Documents of 2 to 40 tokens, each token's value its own number, and a row length."""
    lengths = draw(st.lists(st.integers(2, 40), min_size=1, max_size=12))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    marked = draw(st.booleans())
    documents, start = [], 0
    for length in lengths:
        tokens = np.arange(start, start + length, dtype=np.int32)
        gold = [None, True, False][random.integers(3)] if marked else None
        documents.append(EncodedDocument(tokens, random.random(length) < 0.7, gold))
        start += length
    return documents, draw(st.integers(2, 24))


def document(*tokens: int, gold: bool | None = None) -> EncodedDocument:
    return EncodedDocument(np.array(tokens, np.int32), np.ones(len(tokens), bool), gold)


@given(corpora())
def test_every_trained_token_is_the_label_of_its_predecessor_exactly_once(corpus):
    documents, seq_len = corpus
    rows = pack(documents, seq_len)
    labels = rows.labels()
    at = labels != -100
    predicted = sorted(zip(rows.tokens[at].tolist(), labels[at].tolist(), strict=True))
    expected = [
        (int(before), int(token))
        for d in documents
        for before, token, trained in zip(d.tokens, d.tokens[1:], d.loss_mask[1:], strict=False)
        if trained
    ]
    assert predicted == sorted(expected)


@given(corpora())
def test_segments_hold_consecutive_tokens_of_one_document_and_padding_ends_a_row(corpus):
    documents, seq_len = corpus
    rows = pack(documents, seq_len)
    starts = {int(d.tokens[0]) for d in documents}
    for tokens, segments, positions in zip(
        rows.tokens.astype(int), rows.segments.astype(int), rows.positions(), strict=True
    ):
        length = int((segments > 0).sum())
        assert (segments[length:] == 0).all()
        assert length >= 2
        for number in range(1, segments.max() + 1):
            where = np.flatnonzero(segments == number)
            assert (np.diff(where) == 1).all()
            assert (np.diff(tokens[where]) == 1).all()
            assert not starts & set(tokens[where][1:].tolist())
            assert positions[where].tolist() == list(range(len(where)))
        assert sorted(set(segments[:length].tolist())) == list(range(1, segments.max() + 1))


@given(corpora())
def test_packing_is_a_function_of_its_input(corpus):
    documents, seq_len = corpus
    one, other = pack(documents, seq_len), pack(iter(documents), seq_len)
    assert one.fingerprint() == other.fingerprint()


@given(corpora())
def test_gold_labels_are_those_of_documents_that_say_so_or_all_if_none_says_anything(corpus):
    documents, seq_len = corpus
    rows = pack(documents, seq_len)
    labels, gold = rows.labels(), rows.gold_labels()
    none_says = all(d.gold is None for d in documents)
    gold_of = {int(t): none_says or d.gold is True for d in documents for t in d.tokens}
    for label, is_gold in zip(labels[labels != -100], gold[labels != -100], strict=True):
        assert is_gold == gold_of[int(label)]


def test_short_documents_share_a_row_best_fit_first():
    rows = pack([document(1, 2, 3, 4), document(5, 6, 7), document(8, 9), document(10, 11)], 6)
    # 8 9 go to the row with the least room that takes them.
    assert rows.tokens.tolist() == [[1, 2, 3, 4, 8, 9], [5, 6, 7, 10, 11, 0]]
    assert rows.segments.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 2, 2, 0]]
    assert rows.labels().tolist() == [[2, 3, 4, -100, 9, -100], [6, 7, -100, 11, -100, -100]]
    assert rows.positions().tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 0]]
    assert rows.lengths().tolist() == [6, 5]


def test_long_documents_are_split_with_one_token_of_overlap():
    rows = pack([document(*range(10))], 4)
    assert rows.tokens.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert rows.labels().tolist() == [[1, 2, 3, -100], [4, 5, 6, -100], [7, 8, 9, -100]]


def test_masks_speak_of_targets_and_move_with_the_labels():
    masked = EncodedDocument(np.arange(5, dtype=np.int32), np.array([1, 0, 1, 1, 0], bool), True)
    rows = pack([masked, document(7, 8, gold=False)], 8)
    assert rows.labels()[0].tolist() == [-100, 2, 3, -100, -100, 8, -100, -100]
    assert rows.gold_labels()[0].tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("change", ["tokens", "segments", "loss_mask", "gold_mask"])
def test_fingerprint_sees_every_part_of_the_rows(change):
    rows = pack([document(1, 2, 3), document(4, 5)], 6)
    before = rows.fingerprint()
    getattr(rows, change)[0, 1] = ~getattr(rows, change)[0, 1]
    assert rows.fingerprint() != before
