"""The one pass over memory of ``capture_triton``, where the mathematics stand.

A clip point from a sample of the row's logits, then sums of powers, a bit for each group of 8 with
a logit above it, and a score for each group of 32 (``uniform``). All that a thread adds up stays in
its registers until the row ends; nothing moves between threads in the loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .capture_parts_triton import LOG2E, LOWEST, group_words, row_keys

# A tile is TURNS runs of LANES pieces of VECTOR logits; a lane's share of it is a group of
# ``uniform``, which fixes these numbers.
TURNS, LANES, VECTOR = tl.constexpr(4), tl.constexpr(128), tl.constexpr(8)
TILE = tl.constexpr(4096)
# Tiles whose bits, one for each turn of a lane, fill a word. (In the code the literal 8: where the
# interpreter counts tiles in plain numbers, they know no constexpr.)
TILES_PER_WORD = tl.constexpr(8)
# Floats a row hands on: a24, a12, a8, a6, a4, a3, h, the clip point (infinity: not sound).
SUMS = tl.constexpr(8)


@triton.jit
def _product_to_one(x, y, COMPILED: tl.constexpr):
    """Give the lesser of x y and 1, in one instruction (0 for NaN)."""
    if COMPILED:
        product = tl.inline_asm_elementwise(
            "mul.sat.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        product = tl.minimum(x * y, 1.0)
    return product


@triton.jit
def _log2(x, COMPILED: tl.constexpr):
    """Give log2 in one instruction; ``tl.log2`` is a polynomial."""
    if COMPILED:
        log = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        log = tl.log2(x)
    return log


@triton.jit
def _as_lanes(z, COMPILED: tl.constexpr):
    """Give a tile as fp32, [LANES, TURNS * VECTOR]: a row is what one thread holds."""
    if COMPILED and z.dtype == tl.bfloat16:
        # One instruction for each half of a word; the compiler's conversion takes three for two.
        z = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [z],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        z = z.to(tl.float32)
    z = tl.permute(tl.reshape(z, [TURNS, LANES, VECTOR]), [1, 0, 2])
    return tl.reshape(z, [LANES, TURNS * VECTOR])


@triton.jit
def _add_tile(z, clip, a24, a12, a8, a6, a4, a3, h, COMPILED: tl.constexpr):
    """Add a tile to what each lane holds; also give its own sum of u^24 and its four bits."""
    y = tl.fma(z, LOG2E / 12, clip * (-LOG2E / 12))
    u = tl.exp2(y)
    u2 = _product_to_one(u, u, COMPILED)
    u3 = _product_to_one(u2, u, COMPILED)
    u6 = u3 * u3
    u12 = u6 * u6
    # A logit above the clip gives 1, but for rounding; a sum from below it may reach that too.
    eight = tl.sum(tl.reshape(u12 * u12, [LANES, TURNS, VECTOR]), 2)
    bit = tl.broadcast_to((1 << tl.arange(0, TURNS))[None, :], [LANES, TURNS])
    bits = tl.sum(tl.where(eight > 0.999, bit, 0), 1)
    best = tl.sum(eight, 1)
    a24 += best
    a12 += tl.sum(u12, 1)
    a8 += tl.sum(u6 * u2, 1)
    a6 += tl.sum(u6, 1)
    a4 += tl.sum(u2 * u2, 1)
    a3 += tl.sum(u3, 1)
    h += tl.sum(u12 * y, 1)
    return a24, a12, a8, a6, a4, a3, h, best, bits


@triton.jit
def _mark_tile(
    bits_ptr, score_ptr, key0, tile, word, bits, best,
    SAMPLED: tl.constexpr, INVERSE_S: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Put a tile's bits into the word; write it where it is full, and the scores."""
    lanes = tl.arange(0, LANES)
    if SAMPLED:
        # log2 exp((z - c) / S) / U is at most this for any member: its u^24 is at most their sum,
        # its U at least 1 / 32 of the word's.
        least = (group_words(key0, lanes + tile * LANES) >> 5).to(tl.int32).to(tl.float32) + 0.5
        best = tl.maximum(best, 2.0**-126)
        score = _log2(best, COMPILED) * (INVERSE_S / 2) + (32.0 - _log2(least, COMPILED))
        tl.store(score_ptr + lanes + tile * LANES, score.to(tl.bfloat16))
    within = tile % 8
    word |= bits << (within * TURNS)
    if within == 7:
        tl.store(bits_ptr + tile // 8 * LANES + lanes, word)
        word = tl.zeros([LANES], tl.int32)
    return word


@triton.jit
def _clip_point(
    z_row, num_tokens, clip_rank, sample_step, SAMPLE: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Give the largest but clip_rank - 1 of the maxima of GROUPS groups of a sample.

    Runs of 1024 from all over the row: the first ids of a tokenizer are its commonest tokens.
    """
    sample = tl.arange(0, SAMPLE)
    sample = (sample // 1024) * sample_step + sample % 1024
    z = tl.load(z_row + sample, mask=sample < num_tokens, other=float("-inf"))
    maxima = tl.max(tl.reshape(z.to(tl.float32), [SAMPLE // GROUPS, GROUPS]), 0)
    larger = tl.sum((maxima[:, None] > maxima[None, :]).to(tl.int32), 0)
    return tl.min(tl.where(larger < clip_rank, maxima, float("inf")), 0)


@triton.jit(do_not_specialize=["start", "clip_rank"])
def capture_sweep(
    z_ptr, stride, position_ptr, sums_ptr, bits_ptr, score_ptr,
    num_tokens, num_words, num_segments, start, clip_rank, sample_step,
    SAMPLED: tl.constexpr, INVERSE_S: tl.constexpr, SAMPLE: tl.constexpr, GROUPS: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """Write a row's sums, bits and scores."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * stride
    sums_ptr += row * SUMS
    bits_ptr += row * num_words
    score_ptr += row * num_segments
    key0, _ = row_keys(start, tl.load(position_ptr + row))
    clip = _clip_point(z_row, num_tokens, clip_rank, sample_step, SAMPLE, GROUPS)
    sound = tl.abs(clip) < 1e5
    clip = tl.where(sound, clip, 0.0)
    lanes = tl.arange(0, LANES)
    zero = tl.zeros([LANES], tl.float32)
    a24, a12, a8, a6, a4, a3, h = zero, zero, zero, zero, zero, zero, zero
    word = tl.zeros([LANES], tl.int32)
    offset = tl.arange(0, TILE)
    tiles = tl.cdiv(num_tokens, TILE)
    first = num_tokens // TILE // 2 * 2
    for tile in range(0, first, 2):
        # Both loads before the arithmetic: the second is on its way meanwhile.
        z = tl.load(z_row + tile * TILE + offset)
        z_next = tl.load(z_row + tile * TILE + TILE + offset)
        a24, a12, a8, a6, a4, a3, h, best, bits = _add_tile(
            _as_lanes(z, COMPILED), clip, a24, a12, a8, a6, a4, a3, h, COMPILED
        )
        word = _mark_tile(
            bits_ptr, score_ptr, key0, tile, word, bits, best, SAMPLED, INVERSE_S, COMPILED
        )
        a24, a12, a8, a6, a4, a3, h, best, bits = _add_tile(
            _as_lanes(z_next, COMPILED), clip, a24, a12, a8, a6, a4, a3, h, COMPILED
        )
        word = _mark_tile(
            bits_ptr, score_ptr, key0, tile + 1, word, bits, best, SAMPLED, INVERSE_S, COMPILED
        )
    # The rest, with minus infinity made finite; and where h says that there was one before it (or
    # a NaN, which stays), the row again.
    again = True
    while again:
        for tile in range(first, tiles):
            live = tile * TILE + offset < num_tokens
            z = tl.load(z_row + tile * TILE + offset, mask=live, other=float("-inf"))
            z = _as_lanes(z, COMPILED)
            z = tl.where(z == float("-inf"), LOWEST, z)
            a24, a12, a8, a6, a4, a3, h, best, bits = _add_tile(
                z, clip, a24, a12, a8, a6, a4, a3, h, COMPILED
            )
            word = _mark_tile(
                bits_ptr, score_ptr, key0, tile, word, bits, best, SAMPLED, INVERSE_S, COMPILED
            )
        h_total = tl.sum(h, 0)
        again = (h_total != h_total) & (first > 0)
        if again:
            first = 0
            a24, a12, a8, a6, a4, a3, h = zero, zero, zero, zero, zero, zero, zero
            word = tl.zeros([LANES], tl.int32)
    if tiles % 8 != 0:
        tl.store(bits_ptr + tiles // 8 * LANES + lanes, word)
    tl.store(sums_ptr, tl.sum(a24, 0))
    tl.store(sums_ptr + 1, tl.sum(a12, 0))
    tl.store(sums_ptr + 2, tl.sum(a8, 0))
    tl.store(sums_ptr + 3, tl.sum(a6, 0))
    tl.store(sums_ptr + 4, tl.sum(a4, 0))
    tl.store(sums_ptr + 5, tl.sum(a3, 0))
    tl.store(sums_ptr + 6, tl.sum(h, 0))
    tl.store(sums_ptr + 7, tl.where(sound, clip, float("inf")))
