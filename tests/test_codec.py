"""The codec: ids and the certain set exactly, values within their quantisation steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.codec import (
    ABSENT,
    ENTROPY_STEPS,
    LOGP_STEPS,
    PARTITION_STEPS,
    Entries,
    decode,
    encode,
    frequency_rank,
    level_dtype,
    num_gap_planes,
    pack_entropy,
    pack_logp,
    pack_partition,
    unpack_entropy,
    unpack_logp,
    unpack_partition,
)


@st.composite
def supports(draw):
    """Random supports: vocabulary, order, positions that keep nothing, one entry or many."""
    vocab_size = draw(st.integers(1, 400))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_positions = draw(st.integers(0, 6))
    width = draw(st.integers(1, min(vocab_size, 40)))
    ids = np.full((num_positions, width), -1, np.int32)
    logp = np.full((num_positions, width), -np.inf, np.float32)
    certain = np.zeros((num_positions, width), bool)
    for position in range(num_positions):
        count = int(random.integers(0, width + 1))
        ids[position, :count] = random.permutation(vocab_size)[:count]
        logp[position, :count] = -np.sort(random.exponential(4.0, count))
        certain[position, :count] = np.arange(count) < random.integers(0, count + 1)
    order = random.permutation(vocab_size).astype(np.uint32)
    rank = np.empty(vocab_size, np.uint32)
    rank[order] = np.arange(vocab_size, dtype=np.uint32)
    return ids, logp, certain, order, rank


def as_dicts(ids, logp, certain):
    """Per position {id: (logp, certain)}."""
    return [
        {int(i): (float(x), bool(c)) for i, x, c in zip(*row, strict=True) if i >= 0}
        for row in zip(ids, logp, certain, strict=True)
    ]


@given(supports(), st.sampled_from(["standard", "high"]))
def test_round_trip_keeps_ids_and_the_certain_set_and_values_within_a_step(support, precision):
    ids, logp, certain, order, rank = support
    entries = encode(ids, logp, certain, rank, precision)
    assert entries.levels.dtype == level_dtype(precision)
    decoded = decode(entries, order, precision)
    for before, after in zip(as_dicts(ids, logp, certain), as_dicts(*decoded), strict=True):
        assert before.keys() == after.keys()
        for token, (value, is_certain) in before.items():
            found, still_certain = after[token]
            assert still_certain == is_certain
            if precision == "high":
                assert found == pytest.approx(value, rel=2**-11, abs=1e-7)
            elif is_certain:  # half a step of 1/255 in sqrt(p), and never probability 0
                least = max(np.exp(value / 2), 1 / 255)
                assert abs(np.exp(found / 2) - least) <= 0.5 / 255 + 1e-6
            else:  # half a step of 1/8 nat, down to 255 / 8 nats
                assert abs(found - max(value, -255 / 8)) <= 1 / 16 + 1e-6


@given(supports())
def test_padding_is_marked_and_counts_say_how_much_there_is(support):
    ids, logp, certain, order, rank = support
    entries = encode(ids, logp, certain, rank, "standard")
    used = ids >= 0
    assert entries.counts[:, 0].tolist() == (used & certain).sum(1).tolist()
    assert entries.counts[:, 1].tolist() == (used & ~certain).sum(1).tolist()
    assert len(entries.gaps) == len(entries.levels) == used.sum()
    found_ids, found_logp, found_certain = decode(entries, order, "standard")
    padding = found_ids < 0
    assert np.isneginf(found_logp[padding]).all()
    assert not found_certain[padding].any()


def test_ids_are_stored_as_gaps_between_ranks_certain_ones_first():
    rank = np.array([3, 0, 1, 2, 4, 5], np.uint32)
    ids = np.array([[0, 5, 1, 4]], np.int32)  # ranks 3, 5, 0, 4
    certain = np.array([[True, True, False, False]])
    entries = encode(ids, np.full((1, 4), -1.0, np.float32), certain, rank, "standard")
    assert entries.counts.tolist() == [[2, 2]]
    assert entries.gaps.tolist() == [3, 1, 0, 3]


def test_standard_levels_are_square_roots_and_eighths_of_a_nat():
    logp = np.log(np.array([[1.0, 0.25, 1e-9]])).astype(np.float32)
    ids = np.arange(3, dtype=np.int32)[None]
    rank = np.arange(3, dtype=np.uint32)
    certain = encode(ids, logp, np.ones((1, 3), bool), rank, "standard")
    assert certain.levels.tolist() == [255, 128, 1]  # rint(127.5) is even
    sampled = encode(
        ids, np.array([[-1.0, -2.06, -90.0]]), np.zeros((1, 3), bool), rank, "standard"
    )
    assert sampled.levels.tolist() == [8, 16, 255]


def test_entries_without_probability_stay_finite_in_high_precision():
    logp = np.array([[0.0, -np.inf]], np.float32)
    ids, rank = np.array([[0, 1]], np.int32), np.arange(2, dtype=np.uint32)
    entries = encode(ids, logp, np.ones((1, 2), bool), rank, "high")
    _, found, _ = decode(entries, rank, "high")
    assert np.isfinite(found).all()
    assert np.exp(found).tolist() == [[1.0, 0.0]]


def test_no_positions_and_empty_positions_decode_to_padding():
    for num_positions in (0, 3):
        entries = Entries(
            np.zeros((num_positions, 2), np.uint16), np.zeros(0, np.uint32), np.zeros(0, np.uint8)
        )
        ids, logp, certain = decode(entries, np.arange(4, dtype=np.uint32), "standard")
        assert ids.shape == (num_positions, 1)
        assert (ids == -1).all()
        assert np.isneginf(logp).all()
        assert not certain.any()


# --- statistics ----------------------------------------------------------------------------------


@given(st.floats(0, 31.9))
def test_logp_is_kept_within_half_a_step(nats):
    found = unpack_logp(pack_logp(np.array([-nats], np.float32)))[0]
    assert abs(found + nats) <= 0.5 / LOGP_STEPS + 1e-5


def test_logp_ends_at_the_smallest_and_absence_is_no_number():
    packed = pack_logp(np.array([0.0, -100.0, -np.inf, np.nan, 1e-9], np.float32))
    assert packed.tolist() == [0, ABSENT - 1, ABSENT - 1, ABSENT, 0]
    found = unpack_logp(packed)
    assert found[0] == 0.0
    assert found[1] == found[2] == np.float32(-(ABSENT - 1) / LOGP_STEPS)
    assert np.isnan(found[3])


@given(st.floats(0, 15.9))
def test_entropy_is_kept_within_half_a_step(nats):
    found = unpack_entropy(pack_entropy(np.array([nats], np.float32)))[0]
    assert abs(found - nats) <= 0.5 / ENTROPY_STEPS + 1e-5


def test_entropy_of_the_largest_vocabulary_fits():
    assert np.log(2**23) < unpack_entropy(np.array([65535], np.uint16))[0]
    assert pack_entropy(np.array([99.0])).tolist() == [65535]


@given(st.floats(-63.9, 63.9))
def test_partition_is_kept_within_half_a_step(nats):
    found = unpack_partition(pack_partition(np.array([nats], np.float32)))[0]
    assert abs(found - nats) <= 0.5 / PARTITION_STEPS + 1e-5


def test_an_empty_tail_stays_empty_and_a_small_one_does_not_become_empty():
    packed = pack_partition(np.array([-np.inf, -1000.0, 0.0, 1000.0], np.float32))
    assert packed.tolist() == [0, 1, 32768, 65535]
    found = unpack_partition(packed)
    assert np.isneginf(found[0])
    assert np.isfinite(found[1:]).all()


# --- ranks ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 19), max_size=60))
def test_frequent_ids_have_small_ranks_and_ties_go_to_the_lower_id(tokens):
    array = np.array(tokens, np.uint32)
    id_of_rank, rank_of_id = frequency_rank(array, 20)
    expected = sorted(range(20), key=lambda token: (-tokens.count(token), token))
    assert id_of_rank.tolist() == expected
    assert rank_of_id[id_of_rank].tolist() == list(range(20))


@pytest.mark.parametrize(
    ("vocab_size", "planes"), [(1, 1), (256, 1), (257, 2), (65536, 2), (65537, 3), (262144, 3)]
)
def test_gaps_take_as_many_bytes_as_the_largest_rank(vocab_size, planes):
    assert num_gap_planes(vocab_size) == planes
    assert (vocab_size - 1).bit_length() <= 8 * planes
