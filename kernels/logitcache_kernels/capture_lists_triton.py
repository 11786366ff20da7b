"""Short lists of a row for ``capture_finish``: from bits and scores of the sweep to token ids.

Every step has one element of each 128 lie with a thread, so that nothing moves between threads but
a running count; Triton would else rearrange tensors through shared memory at each load and store
(loads of 4 or 8 neighbours, stores of 1). Lists come in an order that is the same on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .capture_parts_triton import LN2, LOWEST, group_words, ordered
from .capture_sweep_triton import LANES, TILE, TILES_PER_WORD, TURNS, VECTOR


@triton.jit
def places(hit, EACH: tl.constexpr):
    """Number the hits among EACH * LANES, of which one in each LANES lies with a thread."""
    hit = tl.reshape(hit.to(tl.int32), [EACH, LANES])
    count = tl.sum(hit, 0)
    before = tl.cumsum(count, 0) - count
    slot = tl.reshape(before[None, :] + tl.cumsum(hit, 0) - hit, [EACH * LANES])
    return slot, tl.sum(count, 0)


@triton.jit
def append(id_ptr, found, ids, hit, CAP: tl.constexpr):
    """Put the ids that are hit behind the ``found`` listed ones; give the new count."""
    slot = found + tl.cumsum(hit.to(tl.int32), 0) - 1
    tl.store(id_ptr + slot, ids, mask=hit & (slot < CAP))
    return found + tl.sum(hit.to(tl.int32), 0)


@triton.jit
def _bit_count(word):
    count = word - ((word >> 1) & 0x55555555)
    count = (count & 0x33333333) + ((count >> 2) & 0x33333333)
    return ((((count + (count >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _lowest_bit(word):
    """Give the word's lowest bit alone, and its number plus 127: its exponent as a float."""
    lowest = word & (~word + 1)
    return lowest, lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23


@triton.jit
def list_words(words_ptr, list_ptr, num_words, WORDS: tl.constexpr, CAP: tl.constexpr):
    """List the bits that are set, as place of the word * 32 + bit; give their number.

    num_words: a multiple of LANES; WORDS * LANES are read at a time. A list that would overflow is
    not written.
    """
    listed = 0
    for base in range(0, num_words, WORDS * LANES):
        place = tl.max_contiguous(base + tl.arange(0, WORDS * LANES), 1)
        word = tl.load(words_ptr + place, mask=place < num_words, other=0).to(tl.uint32)
        count = tl.reshape(_bit_count(word), [WORDS, LANES])
        lane_count = tl.sum(count, 0)
        before = listed + tl.cumsum(lane_count, 0) - lane_count
        slot = tl.reshape(before[None, :] + tl.cumsum(count, 0) - count, [WORDS * LANES])
        listed += tl.sum(lane_count, 0)
        most = tl.max(tl.max(count, 0), 0)
        if listed > CAP:
            most = 0
        for turn in range(most):
            lowest, exponent = _lowest_bit(word)
            tl.store(list_ptr + slot + turn, place * 32 - 127 + exponent, mask=word != 0)
            word = word ^ lowest
    return listed


@triton.jit
def _list_lanes(
    word, first, id_ptr, listed, STEP: tl.constexpr, RUN: tl.constexpr, CAP: tl.constexpr
):  # fmt: skip
    """Append first + bit % 8 * STEP + bit // 8 * RUN for the bits set in each lane's word."""
    count = _bit_count(word)
    slot = listed + tl.cumsum(count, 0) - count
    listed += tl.sum(count, 0)
    most = tl.max(count, 0)
    if listed > CAP:
        most = 0
    for turn in range(most):
        lowest, exponent = _lowest_bit(word)
        bit = exponent - 127
        value = first + (bit & 7) * STEP + (bit >> 3) * RUN
        tl.store(id_ptr + slot + turn, value, mask=word != 0)
        word = word ^ lowest
    return listed


@triton.jit
def read_groups(z_row, list_ptr, listed, clip, num_tokens, id_ptr, CAP: tl.constexpr):
    """Read the listed groups of 8 again; list the ids of the logits above the clip."""
    found = 0
    item = tl.arange(0, VECTOR)[None, :]
    for base in range(0, listed, LANES):
        index = base + tl.arange(0, LANES)
        code = tl.load(list_ptr + index, mask=index < listed, other=0)
        bit = code & 31
        place = code >> 5
        first = (place // LANES * TILES_PER_WORD + bit // TURNS) * TILE
        first = first + (bit % TURNS) * (LANES * VECTOR) + place % LANES * VECTOR
        first = tl.multiple_of(tl.where(index < listed, first, num_tokens), 8)
        ids = first[:, None] + item
        z = tl.load(z_row + ids, mask=ids < num_tokens, other=LOWEST).to(tl.float32)
        word = tl.sum(tl.where(z > clip, 1 << item, 0), 1).to(tl.uint32)
        found = _list_lanes(word, first, id_ptr, found, 1, 0, CAP)
    return found


@triton.jit
def list_scores(score_ptr, list_ptr, num_tiles, bound, CAP: tl.constexpr):
    """List the groups of 32 whose score reaches the bound."""
    lane = tl.arange(0, LANES)
    bit = (1 << tl.arange(0, 8))[:, None]
    listed = 0
    for first in range(0, num_tiles, 32):
        word = tl.zeros([LANES], tl.int32)
        for tile in range(first, tl.minimum(first + 32, num_tiles), 8):
            at = tl.max_contiguous(tile * LANES + tl.arange(0, 8 * LANES), 1)
            score = tl.load(score_ptr + at, mask=at < num_tiles * LANES, other=LOWEST)
            hit = tl.reshape(score.to(tl.float32) >= bound, [8, LANES])
            word |= tl.sum(tl.where(hit, bit, 0), 0) << (tile - first)
        word = word.to(tl.uint32, bitcast=True)
        base = lane + first * LANES
        listed = _list_lanes(word, base, list_ptr, listed, LANES, 8 * LANES, CAP)
    return listed


@triton.jit
def read_segments(
    z_row, list_ptr, listed, num_tokens, key0, clip, lse_1, lse_s, log_threshold, id_ptr,
    INVERSE_S: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Read the listed groups of 32; list the ids up to the clip whose inclusion exceeds the least
    number of their group.

    lse_1, lse_s: log sum exp of the logits, and of logits / S.
    """
    found = 0
    item = tl.arange(0, VECTOR)[None, :]
    for base in range(0, listed, LANES):
        index = base + tl.arange(0, LANES)
        group = tl.load(list_ptr + index, mask=index < listed, other=0)
        least = (group_words(key0, group) >> 5).to(tl.int32).to(tl.float32) + 0.5
        # r / threshold exceeds the least number by p or by p^S; 1e-3 for what is rounded here.
        log_r = tl.log(least) - 32 * LN2 + log_threshold - 1e-3
        low = tl.minimum(log_r + lse_1, (log_r + lse_s) / INVERSE_S)
        first = group // LANES * TILE + group % LANES * VECTOR
        first = tl.multiple_of(tl.where(index < listed, first, num_tokens), 8)
        word = tl.zeros([LANES], tl.int32)
        for turn in tl.static_range(4):
            ids = (first + turn * LANES * VECTOR)[:, None] + item
            z = tl.load(z_row + ids, mask=ids < num_tokens, other=LOWEST).to(tl.float32)
            hit = (z >= low[:, None]) & (z <= clip)
            word |= tl.sum(tl.where(hit, 1 << item, 0), 1) << (turn * 8)
        word = word.to(tl.uint32, bitcast=True)
        found = _list_lanes(word, first, id_ptr, found, 1, LANES * VECTOR, CAP)
    return found


@triton.jit
def read_row(z_row, low, num_tokens, id_ptr, SIZE: tl.constexpr, CAP: tl.constexpr):
    """List the row's logits from ``low`` (ordered) on, for rows whose clip point lay too high."""
    found = 0
    for base in range(0, num_tokens, SIZE):
        ids = base + tl.arange(0, SIZE)
        live = ids < num_tokens
        z = tl.load(z_row + ids, mask=live, other=0.0).to(tl.float32)
        found = append(id_ptr, found, ids, live & (ordered(z) >= low), CAP)
    return found


@triton.jit
def _count_row(z_row, num_tokens, low, SIZE: tl.constexpr):
    count = tl.zeros([SIZE], tl.int32)
    for base in range(0, num_tokens, SIZE):
        ids = base + tl.arange(0, SIZE)
        z = tl.load(z_row + ids, mask=ids < num_tokens, other=0.0).to(tl.float32)
        count += ((ids < num_tokens) & (ordered(z) >= low)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def other_bound(
    z_row, num_tokens, low, count, K: tl.constexpr, CAP: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Move the (ordered) bound until K to CAP logits of the row reach it; give it and the count."""
    nothing = tl.full((), -(2**31) + 1, tl.int32)
    floor = nothing
    high = low
    turn = 0
    while (turn < 32) & ((count < K) | (count > CAP)):
        # Steps down that double, in ordered bits; then halving between too many and too few.
        if count < K:
            high = low
            step = tl.full((), 1, tl.int32) << tl.minimum(turn + 19, 27)
            down = tl.maximum(low, nothing + step) - step
            low = tl.where(floor == nothing, down, floor + (low - floor) // 2)
        else:
            floor = low
            low = low + tl.maximum((high - low) // 2, 1)
        count = _count_row(z_row, num_tokens, low, SIZE)
        turn += 1
    return low, count
