"""The one pass over memory of ``capture_triton``, where the mathematics stand.

One program per row: a clip point from a sample of its logits, then sums of powers and the few
logits above it. All that a thread adds up stays in its registers until the row ends; nothing moves
between threads in the loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .capture_parts_triton import LOG2E, LOWEST, pair_words, powers, row_keys

SUMS = tl.constexpr(
    16
)  # floats a row hands on: six sums, h, the largest, the clip point, whether sound


@triton.jit
def _per_lane(x, TURNS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Sum what one thread holds: no data moves between threads."""
    return tl.sum(tl.sum(tl.reshape(x, [TURNS, LANES, VECTOR]), 2), 0)


@triton.jit
def _least_half(low, high, word, PACKED: tl.constexpr):
    """Take the lesser of both halves: one packed instruction, or two and a mask."""
    if PACKED:
        low = tl.inline_asm_elementwise(
            "min.u16x2 $0, $1, $2;", "=r,r,r", [low, word], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        low = tl.minimum(low, word & 0xFFFF)
        high = tl.minimum(high, word)
    return low, high


@triton.jit
def _score(
    group, first, key0, clip, slope,
    VECTOR: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Bound, for each group of VECTOR ids from ``first``, log2 of inclusion over uniform."""
    word = pair_words(key0, first)
    low, high = word, word
    if not PACKED:
        low = word & 0xFFFF
    for i in tl.static_range(1, VECTOR // 2):
        low, high = _least_half(low, high, pair_words(key0, first + i), PACKED)
    if PACKED:
        high = low
        low = low & 0xFFFF
    least = tl.minimum(low, high >> 16).to(tl.int32).to(tl.float32)
    # A half of 0 stands for uniforms down to 2^-33: 2^-17 of a unit of the half. The bits of a
    # float, read as a number, are its log2 from below (by at most 0.09): the score is bounded from
    # above.
    bits = tl.maximum(least, 2.0**-17).to(tl.int32, bitcast=True)
    return (group - clip) * slope - tl.fma(bits.to(tl.float32), 2.0**-23, -127.0)


@triton.jit
def _tile(
    z, first, clip, key0, a3, a4, a6, a8, a12, a24, h, peak, score, slope, group_ptr, listed_ptr,
    SAMPLED: tl.constexpr, TURNS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    PACKED: tl.constexpr, GROUP_CAP: tl.constexpr,
):  # fmt: skip
    """Add TURNS * VECTOR logits of each lane, from id ``first`` on, to what it holds."""
    # NaN stays NaN in the clip, so that it shows in the sums.
    clipped = tl.minimum(z, clip, propagate_nan=tl.PropagateNan.ALL)
    y = tl.fma(clipped, LOG2E / 12, clip * (-LOG2E / 12))
    u3, u4, u6, u8, u12, u24 = powers(y)
    a3 += _per_lane(u3, TURNS, LANES, VECTOR)
    a4 += _per_lane(u4, TURNS, LANES, VECTOR)
    a6 += _per_lane(u6, TURNS, LANES, VECTOR)
    a8 += _per_lane(u8, TURNS, LANES, VECTOR)
    a12 += _per_lane(u12, TURNS, LANES, VECTOR)
    a24 += _per_lane(u24, TURNS, LANES, VECTOR)
    h += _per_lane(u12 * y, TURNS, LANES, VECTOR)
    group = tl.max(tl.reshape(z, [TURNS, LANES, VECTOR]), 2)
    peak = tl.maximum(peak, tl.max(group, 0))
    place = tl.arange(0, TURNS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    # Groups with a logit above the clip: some hundred a row, in an order that no result depends on.
    over = group > clip
    slot = tl.atomic_add(listed_ptr + place * 0, 1, mask=over, sem="relaxed")
    tl.store(group_ptr + slot, first + place * VECTOR, mask=over & (slot < GROUP_CAP))
    if SAMPLED:
        pair = first // 2 + place * (VECTOR // 2)
        score = tl.maximum(score, tl.max(_score(group, pair, key0, clip, slope, VECTOR, PACKED), 0))
    return a3, a4, a6, a8, a12, a24, h, peak, score


@triton.jit(do_not_specialize=["start", "clip_rank"])
def capture_sweep(
    z_ptr, stride, position_ptr, sums_ptr, group_ptr, listed_ptr, score_ptr,
    num_tokens, num_segments, start, clip_rank, sample_step,
    SAMPLED: tl.constexpr, INVERSE_S: tl.constexpr,
    TURNS: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    SAMPLE: tl.constexpr, GROUPS: tl.constexpr, PACKED: tl.constexpr,
    GROUP_CAP: tl.constexpr,
):  # fmt: skip
    """Write a row's sums, its groups above the clip and its segments' scores.

    A segment is PARTS * TURNS pieces of VECTOR logits, LANES * VECTOR apart: what one lane reads.
    """
    PART: tl.constexpr = TURNS * LANES * VECTOR
    BLOCK: tl.constexpr = PARTS * PART
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * stride
    group_ptr += row * GROUP_CAP
    listed_ptr += row
    tl.store(listed_ptr, 0)
    tl.debug_barrier()
    lanes = tl.arange(0, LANES)
    key0, _ = row_keys(start, tl.load(position_ptr + row))
    # The clip point: the largest but clip_rank - 1 of the maxima of GROUPS groups of a sample,
    # runs of 1024 from all over the row (the first ids of a tokenizer are its commonest tokens).
    sample = tl.arange(0, SAMPLE)
    sample = (sample // 1024) * sample_step + sample % 1024
    sample_z = tl.load(z_row + sample, mask=sample < num_tokens, other=float("-inf"))
    maxima = tl.max(tl.reshape(sample_z.to(tl.float32), [SAMPLE // GROUPS, GROUPS]), 0)
    larger = tl.sum((maxima[:, None] > maxima[None, :]).to(tl.int32), 0)
    clip = tl.min(tl.where(larger < clip_rank, maxima, float("inf")), 0)
    sound = tl.abs(clip) < 1e5
    clip = tl.where(sound, clip, 0.0)
    a3 = tl.zeros([LANES], tl.float32)
    a4 = tl.zeros([LANES], tl.float32)
    a6 = tl.zeros([LANES], tl.float32)
    a8 = tl.zeros([LANES], tl.float32)
    a12 = tl.zeros([LANES], tl.float32)
    a24 = tl.zeros([LANES], tl.float32)
    h = tl.zeros([LANES], tl.float32)
    peak = tl.full([LANES], LOWEST, tl.float32)
    offset = tl.arange(0, PART)
    whole = num_tokens // BLOCK
    for tile in range(whole):
        score = tl.full([LANES], LOWEST, tl.float32)
        for part in range(PARTS):
            first = tile * BLOCK + part * PART
            z = tl.load(z_row + first + offset).to(tl.float32)
            a3, a4, a6, a8, a12, a24, h, peak, score = _tile(
                z, first, clip, key0, a3, a4, a6, a8, a12, a24, h, peak, score,
                INVERSE_S * LOG2E, group_ptr, listed_ptr,
                SAMPLED, TURNS, LANES, VECTOR, PACKED, GROUP_CAP,
            )  # fmt: skip
        if SAMPLED:
            tl.store(score_ptr + row * num_segments + tile * LANES + lanes, score)
    if whole * BLOCK < num_tokens:
        score = tl.full([LANES], LOWEST, tl.float32)
        for part in range(PARTS):
            first = whole * BLOCK + part * PART
            live = first + offset < num_tokens
            z = tl.load(z_row + first + offset, mask=live, other=0.0).to(tl.float32)
            a3, a4, a6, a8, a12, a24, h, peak, score = _tile(
                tl.where(live, z, LOWEST), first, clip, key0,
                a3, a4, a6, a8, a12, a24, h, peak, score,
                INVERSE_S * LOG2E, group_ptr, listed_ptr,
                SAMPLED, TURNS, LANES, VECTOR, PACKED, GROUP_CAP,
            )  # fmt: skip
        if SAMPLED:
            tl.store(score_ptr + row * num_segments + whole * LANES + lanes, score)
    sums_ptr += row * SUMS
    tl.store(sums_ptr, tl.sum(a3, 0))
    tl.store(sums_ptr + 1, tl.sum(a4, 0))
    tl.store(sums_ptr + 2, tl.sum(a6, 0))
    tl.store(sums_ptr + 3, tl.sum(a8, 0))
    tl.store(sums_ptr + 4, tl.sum(a12, 0))
    tl.store(sums_ptr + 5, tl.sum(a24, 0))
    tl.store(sums_ptr + 6, tl.sum(h, 0))
    tl.store(sums_ptr + 7, tl.max(peak, 0))
    tl.store(sums_ptr + 8, clip)
    tl.store(sums_ptr + 9, sound.to(tl.float32))
