"""The codec: ids and the certain set exactly, values within the bounds that the modules state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache import codec
from logitcache.codec import (
    PRECISIONS,
    Entries,
    decode_certain,
    decode_order,
    decode_sampled,
    dither_gain,
    encode_certain,
    encode_order,
    encode_sampled,
    frequency_order,
    inverse,
    level_table,
)
from logitcache.draws import holders, join_ids, num_groups, position_keys, split_ids
from logitcache.errors import StoreError
from logitcache.fields import (
    PLANES,
    CertainLogp,
    Fields,
    decode_fields,
    encode_fields,
    fields_width,
    tail_steps,
    top1_levels,
)
from logitcache.levels import FINE, LevelTable, dither
from logitcache.words import Words, runs_of, spread

GRID = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
TABLES = [FINE, *(p.table for p in PRECISIONS.values()), level_table("standard", True)]


def entries_of(random, vocab_size, num_positions, width, low=-20.0, flat=None):
    """Entries at positions that keep nothing, one entry or many; each position's first is its
    largest."""
    count = random.integers(0, min(width, vocab_size) + 1, num_positions)
    count[random.random(num_positions) < 0.2] = 0
    ids = [random.permutation(vocab_size)[:n] for n in count]
    logp = [np.sort(random.uniform(low, 0, n))[::-1] for n in count]
    total = int(count.sum())
    return Entries(
        count.astype(np.int64),
        np.concatenate([*ids, np.zeros(0)]).astype(np.uint32),
        np.concatenate([*logp, np.zeros(0)]).astype(np.float32),
        (random.random(total) < 0.3) if flat else None,
    )


def as_dicts(entries):
    """Per position {id: (logp, flat)}."""
    ends = entries.count_P.cumsum()
    flat = entries.flat if entries.flat is not None else np.zeros(len(entries.ids), bool)
    return [
        {
            int(i): (float(x), bool(f))
            for i, x, f in zip(entries.ids[a:b], entries.logp[a:b], flat[a:b], strict=True)
        }
        for a, b in zip(ends - entries.count_P, ends, strict=True)
    ]


seeds = st.integers(0, 2**32 - 1)
vocabularies = st.sampled_from([1, 2, 9, 300, 49152, 262144, 1 << 20])


@given(seeds, vocabularies, st.sampled_from(["standard", "high"]), st.booleans())
def test_certain_entries_come_back_with_their_ids_and_within_the_bound(
    seed, vocab_size, precision, floor
):
    random = np.random.default_rng(seed)
    entries = entries_of(random, vocab_size, 6, 40)
    order = frequency_order(entries.ids, vocab_size, 16)
    has = entries.count_P > 0
    first = (entries.count_P.cumsum() - entries.count_P)[has]
    levels = np.zeros(6, np.uint8)
    levels[has] = top1_levels(entries.logp[first], has[has])
    top1 = FINE.logp.take(levels)
    planes, floors, found = encode_certain(entries, levels, inverse(order), precision, floor)
    decoded = decode_certain(
        planes, entries.count_P, floors if floor else None, top1, order, precision
    )
    table = level_table(precision, floor)
    bend = 2 * np.log(2 * table.step / table.nats)
    for before, after, rounded in zip(as_dicts(entries), as_dicts(decoded), top1, strict=True):
        assert before.keys() == after.keys()
        top = max((value for value, _ in before.values()), default=0)
        for token, (value, _) in before.items():
            got = after[token][0]
            assert got <= rounded
            if value == top:
                assert got == rounded
            elif value >= bend + table.nats:
                bound = table.step / 2 + table.step * table.nats / 16
                # Those next to the top are kept below it, as it is rounded.
                bound += (table.step + FINE.step) / 2 if top - value < table.nats else 0
                assert abs(np.exp(got / 2) - np.exp(value / 2)) <= bound + 1e-5
            else:
                bound = table.nats / 2 + table.nats**2 / 24 + 0.05
                bound += (table.nats + FINE.nats) / 2 if top - value < table.nats else 0
                assert abs(got - value) <= bound
    # What the encoder says a reader finds is what it finds.
    said = Entries(entries.count_P, entries.ids, found)
    assert as_dicts(said) == as_dicts(decoded)


@given(seeds, vocabularies, st.sampled_from(["standard", "high"]))
def test_sampled_entries_come_back_with_ids_and_flags_and_within_half_a_step(
    seed, vocab_size, precision
):
    random = np.random.default_rng(seed)
    entries = entries_of(random, vocab_size, 6, 30, low=-35.0, flat=True)
    keys = position_keys(seed, np.arange(6, dtype=np.int64) + (1 << 33))
    planes = encode_sampled(entries, keys, vocab_size, precision)
    decoded = decode_sampled(planes, entries.count_P, keys, vocab_size, precision)
    step = PRECISIONS[precision].sampled_step
    for before, after in zip(as_dicts(entries), as_dicts(decoded), strict=True):
        assert before.keys() == after.keys()
        for token, (value, flat) in before.items():
            assert after[token][1] == flat
            assert abs(after[token][0] - value) <= step / 2 + 1e-4


@pytest.mark.parametrize("precision", ["standard", "high"])
@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.5, 1.0])
def test_rounding_of_sampled_entries_has_no_bias_at_any_temperature(precision, exponent):
    """The mean of exp(exponent * logp) over a million rounded entries, each within 3 standard
    errors."""
    number = 1_000_000
    for value in (-5.3, -9.0, -14.7):
        entries = Entries(
            np.full(number, 1, np.int64),
            np.zeros(number, np.uint32),
            np.full(number, value, np.float32),
            np.zeros(number, bool),
        )
        keys = np.zeros(number, np.uint32)
        planes = encode_sampled(entries, keys, 8, precision)
        found = decode_sampled(planes, entries.count_P, keys, 8, precision)
        weight = np.exp(exponent * (found.logp.astype(np.float64) - value))
        weight /= dither_gain(exponent, precision)
        standard_error = weight.std() / np.sqrt(number)
        assert abs(weight.mean() - 1) <= 3 * standard_error


@given(st.lists(st.integers(0, (1 << 20) - 1), min_size=1, max_size=200))
def test_an_id_is_its_group_and_member(ids):
    ids = np.array(ids, np.uint32)
    groups, members = split_ids(ids)
    assert members.max() < 32
    for token, group, member in zip(ids.tolist(), groups.tolist(), members.tolist(), strict=True):
        assert group == token // 4096 * 128 + token // 8 % 128
        assert member == token // 1024 % 4 * 8 + token % 8
        assert group < num_groups(token + 1) <= num_groups(1 << 20) == 1 << 15
    np.testing.assert_array_equal(join_ids(groups, members), ids)


@pytest.mark.parametrize("vocab_size", [1, 8, 9, 1024, 1025, 4096, 4097, 5000, 49152, 151936])
def test_groups_are_those_of_the_ids(vocab_size):
    groups, _ = split_ids(np.arange(vocab_size, dtype=np.uint32))
    assert num_groups(vocab_size) == groups.max() + 1


@given(seeds)
def test_every_member_of_a_group_has_a_rank_of_its_own(seed):
    random = np.random.default_rng(seed)
    ids = join_ids(np.repeat(np.uint32(random.integers(1 << 8)), 32), np.arange(32, dtype="u4"))
    entries = Entries(
        np.array([32]), random.permutation(ids), np.full(32, -9, np.float32), np.zeros(32, bool)
    )
    keys = random.integers(0, 1 << 32, 1, dtype=np.uint32)
    planes = encode_sampled(entries, keys, 1 << 15, "standard")
    assert planes[-1].tolist() == [*range(1, 32), 0]
    decoded = decode_sampled(planes, entries.count_P, keys, 1 << 15, "standard")
    assert sorted(decoded.ids.tolist()) == sorted(ids.tolist())


def test_draws_are_those_of_the_capture():
    """The key of a position, and that the holder of a group has its least number."""
    import torch

    from logitcache_kernels.uniform import least_of_groups, numbers, row_keys

    positions = np.array([0, 1, 12345, (1 << 40) + 7], np.int64)
    ids = torch.arange(8192).expand(4, -1)
    for seed in (0, 7, (1 << 62) + 3):
        key0, key1 = row_keys(seed, torch.from_numpy(positions))
        keys = position_keys(seed, positions)
        assert keys.tolist() == key1.tolist()
        groups, members = split_ids(ids.numpy().astype(np.uint32))
        least = least_of_groups(key0[:, None], torch.from_numpy(groups.astype(np.int64)))
        drawn = numbers(key1[:, None], ids, least).numpy()
        held = holders(keys, runs_of(np.full(4, 8192)), groups.ravel()).reshape(4, -1)
        np.testing.assert_array_equal(drawn == least.numpy(), members == held)


def test_what_was_drawn_is_nearly_always_a_holder():
    """Ranks are small because the coding knows the capture's draws, not by chance."""
    import torch

    from logitcache_kernels import capture

    logits = torch.randn(64, 8192, generator=torch.Generator().manual_seed(0)) * 2.5
    positions = torch.arange(64) + 1000
    kept = capture(
        logits,
        min_prob=0.01,
        threshold=0.05,
        sample_temperature=2.0,
        seed=5,
        position_ids_R=positions,
    )
    drawn = (kept.ids_RK >= 0) & (kept.inclusion_RK < 1)
    count = drawn.sum(1).numpy()
    groups, members = split_ids(kept.ids_RK[drawn].numpy().astype(np.uint32))
    held = holders(position_keys(5, positions.numpy()), runs_of(count), groups)
    assert count.sum() > 1000
    assert (members == held).mean() > 0.7  # 1 of 32 by chance


@pytest.mark.parametrize("table", TABLES)
def test_levels_decode_to_falling_finite_values_and_encode_back(table: LevelTable):
    logp = table.logp[table.first :]
    assert np.isfinite(logp).all()
    assert (np.diff(logp) < 0).all()
    np.testing.assert_array_equal(table.encode(logp), np.arange(table.first, 256))
    assert table.encode(np.array([-np.inf, -1e30], np.float32)).tolist() == [255, 255]
    assert logp[-1] < -20


def test_dither_is_even_and_can_be_continued():
    whole = dither(1000)
    np.testing.assert_array_equal(whole[300:], dither(700, start=300))
    assert -0.5 <= whole.min() < -0.49 < 0.49 < whole.max() < 0.5
    assert abs(whole.mean()) < 1e-3


@given(st.lists(st.integers(0, 19), max_size=60), st.integers(0, 20))
def test_frequent_ids_have_small_ranks_and_the_order_comes_back(ids, length):
    order = frequency_order(np.array(ids, np.uint32), 20, length)
    expected = sorted(range(20), key=lambda token: (-ids.count(token), token))[:length]
    assert order.tolist() == expected + sorted(set(range(20)) - set(expected))
    np.testing.assert_array_equal(decode_order(encode_order(order)), order)


def test_an_order_that_names_an_id_twice_is_refused():
    planes = encode_order(np.arange(300, dtype=np.uint32))
    planes[0, 5] += 1
    with pytest.raises(StoreError, match="each token id once"):
        decode_order(planes)


@given(seeds, st.sampled_from(["standard", "high"]), st.booleans())
def test_fields_come_back_within_their_bounds(seed, precision, floor):
    random = np.random.default_rng(seed)
    number = 50
    kept = random.random(number) < 0.8
    tail = random.uniform(-15, 8, (number, len(GRID))).astype(np.float32)
    tail[random.random(number) < 0.2] = -np.inf
    gold = random.uniform(-18, 0, number).astype(np.float32)
    gold[random.random(number) < 0.1] = np.nan
    fields = Fields(
        tail,
        random.uniform(0, 13.8, number).astype(np.float32),
        random.uniform(-12, 0, number).astype(np.float32),
        gold,
    )
    # One certain entry, exactly the top-1: nothing to make up for.
    top1 = FINE.logp.take(top1_levels(fields.top1_P, kept))[kept]
    certain = CertainLogp(kept.astype(np.int64), top1, top1)
    floors = random.integers(0, 256, number).astype(np.uint8) if floor else None
    planes = encode_fields(
        fields, [certain], top1_levels(fields.top1_P, kept), floors, GRID, precision
    )
    assert planes.shape == (PLANES, fields_width(GRID, floor), number)
    assert not planes[:, :, ~kept].any()
    found, found_floors = decode_fields(planes, GRID, precision, floor)
    if floor:
        np.testing.assert_array_equal(found_floors[kept], floors[kept])
    assert np.isneginf(found.tail_PT[~kept]).all()
    empty = np.isneginf(tail).any(1)
    assert (np.isneginf(found.tail_PT).all(1) == (empty | ~kept)).all()
    some = kept & ~empty
    for step in tail_steps(GRID, precision):
        column = GRID.index(step.temperature)
        if step.temperature <= 1:
            error = np.abs(found.tail_PT[some, column] - tail[some, column])
            assert (error <= 0.5 / step.per_nat + 1e-4).all()
    assert np.abs(found.entropy_P - fields.entropy_P)[kept].max(initial=0) <= 1 / 32 + 1e-5
    for got, exact in ((found.top1_P, fields.top1_P), (found.gold_P, gold)):
        there = kept & ~np.isnan(exact)
        assert (np.isnan(got) == np.isnan(exact))[kept].all()
        root = np.abs(np.exp(got / 2) - np.exp(exact / 2))[there]
        nats = np.abs(got - exact)[there]
        assert ((root <= 0.5 / 128 + 0.0005) | (nats <= 1 / 16 + 0.001)).all()


@pytest.mark.parametrize("precision", ["standard", "high"])
def test_log_partition_above_one_is_right_to_a_step_though_certain_entries_are_rounded(precision):
    random = np.random.default_rng(1)
    number, width, vocab_size = 200, 20, 1000
    logits = random.normal(0, 3.5, (number, vocab_size))
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-logp, axis=1)[:, :width]
    kept = np.take_along_axis(logp, order, axis=1).astype(np.float32)
    certain = np.zeros_like(logp, bool)
    np.put_along_axis(certain, order, True, axis=1)
    tail = np.stack(
        [np.log(np.where(certain, 0, np.exp(logp / t)).sum(1)) for t in GRID], axis=1
    ).astype(np.float32)
    count = np.full(number, width, np.int64)
    levels = top1_levels(kept[:, 0], count > 0)
    entries = Entries(count, order.ravel().astype(np.uint32), kept.ravel())
    order = np.arange(vocab_size, dtype=np.uint32)
    _, _, found = encode_certain(entries, levels, order, precision, False)
    fields = Fields(tail, np.zeros(number, np.float32), kept[:, 0], kept[:, 0])
    certain_logp = CertainLogp(count, kept.ravel(), found)
    planes = encode_fields(fields, [certain_logp], levels, None, GRID, precision)
    decoded, _ = decode_fields(planes, GRID, precision, False)
    found = found.reshape(number, width)
    shift = np.log(np.exp(found).sum(1) + np.exp(decoded.tail_PT[:, 1]))
    for column, temperature in enumerate(GRID):
        if temperature <= 1:
            continue
        got = np.exp((found - shift[:, None]) / temperature).sum(1)
        got += np.exp(decoded.tail_PT[:, column] - shift / temperature)
        error = np.abs(np.log(got) - np.log(np.exp(logp / temperature).sum(1)))
        assert error.max() <= 0.01, temperature
        assert error.mean() <= 0.004, temperature


def test_planes_that_point_beyond_the_vocabulary_are_refused():
    ends = np.array([1], np.int64)
    with pytest.raises(StoreError, match="there are 300 token ids"):
        decode_certain(
            np.array([[255], [255], [0]], np.uint8),
            ends,
            None,
            np.zeros(1, np.float32),
            np.arange(300, dtype=np.uint32),
            "standard",
        )
    with pytest.raises(StoreError, match="there are 300 token ids"):
        decode_sampled(
            np.array([[255], [255], [1]], np.uint8),
            ends,
            np.zeros(1, np.uint32),
            300,
            "standard",
        )
    with pytest.raises(StoreError, match="top-1"):
        decode_certain(
            np.array([[1], [0], [3]], np.uint8),
            ends,
            None,
            np.zeros(1, np.float32),
            np.arange(300, dtype=np.uint32),
            "standard",
        )


@pytest.mark.parametrize("vocab_size", [1, 256, 257, 65536, 65537, 1 << 20])
def test_planes_are_as_many_as_the_largest_id_needs(vocab_size):
    for precision in PRECISIONS:
        assert 3 <= codec.sampled_planes(vocab_size, precision) <= 4
        for floor in (False, True):
            assert 3 <= codec.certain_planes(vocab_size, precision, floor) <= 4


@given(
    seeds,
    st.sampled_from(
        [Words(5, 2, 5), Words(5, 2, 3), Words(6, 2, 2), Words(7, 3, 1), Words(8, 3, 5)]
    ),
    st.sampled_from([1, 255, 1023, 1024, 49151, (1 << 20) - 1]),
)
def test_words_come_back_whatever_is_in_them(seed, words, largest):
    random = np.random.default_rng(seed)
    number = 200
    values = random.integers(0, 1 << words.value_bits, number, dtype=np.uint32)
    gaps = random.integers(0, largest + 1, number, dtype=np.uint32)
    extra = random.integers(0, 1 << words.extra_bits, number, dtype=np.uint32)
    extra[random.random(number) < 0.7] = 0
    planes = words.pack(values, gaps, extra.copy(), largest)
    assert planes.shape == (words.planes(largest), number)
    found, found_gaps, more, found_extra = words.unpack(planes, largest)
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(found_gaps, gaps)
    whole = np.zeros(number, np.uint32)
    whole[more] = found_extra
    np.testing.assert_array_equal(whole, extra)


@given(seeds, st.lists(st.integers(0, 3), max_size=30))
def test_values_are_spread_over_the_entries_of_their_positions(seed, counts):
    count = np.array(counts, np.int64)
    values = np.random.default_rng(seed).integers(0, 1 << 32, len(count), dtype=np.uint32)
    runs = runs_of(count)
    found = spread(values.take(runs.kept), runs, int(count.sum()))
    np.testing.assert_array_equal(found, np.repeat(values, count))


@pytest.mark.parametrize("table", TABLES)
def test_levels_are_those_of_their_definition(table):
    bend_sqrt = 2 * table.step / table.nats
    logp = -np.linspace(0, 60, 100_000)
    line = (1 - bend_sqrt) / table.step + (2 * np.log(bend_sqrt) - logp) / table.nats
    exact = np.where(logp >= 2 * np.log(bend_sqrt), (1 - np.exp(logp / 2)) / table.step, line)
    exact = np.minimum(exact + table.first + 0.5, 255)
    found = table.encode(logp.astype(np.float32))
    off_an_edge = np.abs(exact - np.rint(exact)) > 1e-3
    np.testing.assert_array_equal(found[off_an_edge], exact[off_an_edge].astype(np.uint8))
    assert table.encode(np.array([-np.inf, -3e38, 0], np.float32)).tolist() == [
        255,
        255,
        table.first,
    ]


def test_a_sampled_value_beyond_the_last_level_keeps_its_flag():
    number = 5000
    count = np.array([number], np.int64)
    ids = np.arange(number, dtype=np.uint32)
    for precision, flat in (("standard", True), ("standard", False), ("high", True)):
        entries = Entries(count, ids, np.full(number, -90, np.float32), np.full(number, flat))
        keys = position_keys(0, np.arange(1, dtype=np.int64))
        planes = encode_sampled(entries, keys, number, precision)
        found = decode_sampled(planes, count, keys, number, precision)
        assert (found.flat == flat).all()
        assert sorted(found.ids) == list(range(number))
        assert found.logp.max() < -42


def test_an_extra_number_that_is_too_large_is_refused():
    words = Words(5, 2, 5)
    planes = words.pack(*(np.array([1], np.uint32) for _ in range(3)), 1023)
    planes[-1, 0] = 32
    with pytest.raises(StoreError, match="extra number is 32"):
        words.unpack(planes, 1023)
