"""A slice of a row in registers: its sums, what its row sums to, its gradient.

Programs that share a row tell each other both sums through memory, in a 64-bit word each. A word is
whole when it is seen at all, so the words themselves say that they are there: until then they are
NOTHING, which the launch before set.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .distill_terms_triton import logit, powers, slope
from .gate_triton import LOG2E, sum2

# A sum above this is taken again with a better shift: its reciprocal would near fp32's smallest.
_LARGEST_SUM = tl.constexpr(1e18)
_NOTHING = tl.constexpr(-1)  # as two floats: NaNs that no operation yields
# How a slice's elements are read: one by one, or as words of two 16-bit numbers.
SINGLE, BF16_PAIRS, FP16_PAIRS = 0, 1, 2


@triton.jit
def _halves(x, cap, FORMAT: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits in float32: those of even and of odd ids; a single one twice."""
    if FORMAT == 1:
        low = (x << 16).to(tl.float32, bitcast=True)
        high = (x & -65536).to(tl.float32, bitcast=True)
    elif FORMAT == 2:
        low = (x & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (x >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        low = x.to(tl.float32)
        high = low
    return logit(low, cap, SOFTCAP), logit(high, cap, SOFTCAP)


@triton.jit
def _bits(x):
    return x.to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _join(low, high, FORMAT: tl.constexpr, OPAQUE: tl.constexpr):
    """Two float32 rounded into a word."""
    if OPAQUE:
        if FORMAT == 1:
            word = tl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32,
                is_pure=True, pack=1,
            )  # fmt: skip
        else:
            word = tl.inline_asm_elementwise(
                "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32,
                is_pure=True, pack=1,
            )  # fmt: skip
    elif FORMAT == 1:
        word = (_bits(high.to(tl.bfloat16)) << 16) | _bits(low.to(tl.bfloat16))
    else:
        word = (_bits(high.to(tl.float16)) << 16) | _bits(low.to(tl.float16))
    return word.to(tl.int32, bitcast=True)


@triton.jit
def load_slice(ptr, size, left, TILES: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr):
    """The slice at ptr, a tuple of TILES tiles, so that sums need few registers beside it.

    size: elements (or words) of a slice; left: how much of the row there is from ptr on. What is
    beyond is -inf, which adds nothing.
    """
    if FORMAT == 1:
        none = -8323200  # 0xff80ff80
    elif FORMAT == 2:
        none = -67044352  # 0xfc00fc00
    else:
        none = float("-inf")
    end = tl.minimum(size, left)
    at = tl.arange(0, BLOCK)
    x = (tl.load(ptr + at, mask=at < end, other=none),)
    for tile in tl.static_range(1, TILES):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        x = x + (tl.load(ptr + at, mask=at < end, other=none),)
    return x


@triton.jit
def no_slice(ptr, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """A slice before the first."""
    x = (tl.zeros([BLOCK], ptr.dtype.element_ty),)
    for _ in tl.static_range(1, TILES):
        x = x + (tl.zeros([BLOCK], ptr.dtype.element_ty),)
    return x


@triton.jit
def store_tile(ptr, size, left, tile: tl.constexpr, x, BLOCK: tl.constexpr):
    """Write one tile of the slice at ptr. It stays in L2 (no streaming store): the gradients of the
    support are written over some of it."""
    at = tile * BLOCK + tl.arange(0, BLOCK)
    here = at < tl.minimum(size, left)
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=here)


@triton.jit
def _pack(low, high):
    low = low.to(tl.uint32, bitcast=True).to(tl.uint64)
    high = high.to(tl.uint32, bitcast=True).to(tl.uint64)
    return ((high << 32) | low).to(tl.int64, bitcast=True)


@triton.jit
def _low(word):
    return word.to(tl.uint64, bitcast=True).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _high(word):
    return (word.to(tl.uint64, bitcast=True) >> 32).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def lanes(x, m, unit, inv_T, cap, TILES: tl.constexpr, FORMAT: tl.constexpr, MODE: tl.constexpr,
          SOFTCAP: tl.constexpr):  # fmt: skip
    """What each place of a tile sums up of exp((z - m)/T) and exp(z - m), over the tiles."""
    shift = m * unit
    acc_T = 0.0
    acc_1 = 0.0
    for tile in tl.static_range(TILES):
        low, high = _halves(x[tile], cap, FORMAT, SOFTCAP)
        e_T, e_1 = powers(low, shift, unit, inv_T, MODE)
        acc_T += e_T
        acc_1 += e_1
        if FORMAT != 0:
            e_T, e_1 = powers(high, shift, unit, inv_T, MODE)
            acc_T += e_T
            acc_1 += e_1
    return acc_T, acc_1


@triton.jit
def total(acc_T, acc_1, MODE: tl.constexpr):
    """Both sums over the places."""
    if MODE != 0:
        sum_T, sum_1 = sum2(acc_T, acc_1)
    else:
        sum_T = tl.sum(acc_T, 0)
        sum_1 = sum_T
    return sum_T, sum_1


@triton.jit
def _own_sums(ptr, end, unit, inv_T, cap, BLOCK: tl.constexpr, FORMAT: tl.constexpr,
              MODE: tl.constexpr, SOFTCAP: tl.constexpr):  # fmt: skip
    """The safe way, from memory (registers are full): the slice's own maximum, then its sums."""
    m = tl.zeros((), tl.float32) + float("-inf")
    for start in range(0, end, BLOCK):
        x = load_slice(ptr + start, BLOCK, end - start, 1, BLOCK, FORMAT)
        low, high = _halves(x[0], cap, FORMAT, SOFTCAP)
        m = tl.maximum(m, tl.max(tl.maximum(low, high), 0))
    safe = tl.where(m == float("-inf"), 0.0, m)
    acc_T = tl.zeros([BLOCK], tl.float32)
    acc_1 = tl.zeros([BLOCK], tl.float32)
    for start in range(0, end, BLOCK):
        x = load_slice(ptr + start, BLOCK, end - start, 1, BLOCK, FORMAT)
        more_T, more_1 = lanes(x, safe, unit, inv_T, cap, 1, FORMAT, MODE, SOFTCAP)
        acc_T += more_T
        acc_1 += more_1
    sum_T, sum_1 = total(acc_T, acc_1, MODE)
    return sum_T, sum_1, m


@triton.jit
def publish(
    partial_ptr, row, part, sum_T, sum_1, shift, ptr, end, unit, inv_T, cap, CP: tl.constexpr,
    BLOCK: tl.constexpr, FORMAT: tl.constexpr, MODE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Tell the row's other slices the sums that were taken with the shift.

    Where these grew too large, or there is no shift (-inf): infinity and the own maximum m of the
    slice at ptr (-inf where all of it is -inf), and the sums with that in another word.
    """
    partial = partial_ptr + row * (2 * CP) + part
    if (shift > float("-inf")) & (sum_T < _LARGEST_SUM) & (sum_1 < _LARGEST_SUM):
        tl.store(partial, _pack(sum_T, sum_1))
    else:
        sum_T, sum_1, m = _own_sums(ptr, end, unit, inv_T, cap, BLOCK, FORMAT, MODE, SOFTCAP)
        tl.store(partial, _pack(tl.zeros((), tl.float32) + float("inf"), m))
        tl.store(partial + CP, _pack(sum_T, sum_1))


@triton.jit
def _gradient(z, shift, unit, inv_T, cap, a, c, MODE: tl.constexpr, SOFTCAP: tl.constexpr):
    if MODE == 5:
        e_T, e_1 = powers(z, shift, unit, inv_T, MODE)
        g = e_T * a + e_1 * c
    else:
        u = tl.exp2(z * unit - shift)
        if MODE == 0:
            g = u * (a + c)
        elif MODE == 1:
            g = (u * u) * (a + c * u)
        elif MODE == 2:
            g = u * (a + c * u)
        elif MODE == 3:
            g = u * (a + c * (u * u))
        else:
            g = u * (a + c * (u * u * u))
    return g * slope(z, cap, SOFTCAP)


@triton.jit
def tile_gradient(x, m, unit, inv_T, cap, a, c, FORMAT: tl.constexpr, MODE: tl.constexpr,
                   SOFTCAP: tl.constexpr, OPAQUE: tl.constexpr):  # fmt: skip
    """a exp((z - m)/T) + c exp(z - m), through the cap; in the slice's format."""
    low, high = _halves(x, cap, FORMAT, SOFTCAP)
    shift = m * unit
    g = _gradient(low, shift, unit, inv_T, cap, a, c, MODE, SOFTCAP)
    if FORMAT != 0:
        g_high = _gradient(high, shift, unit, inv_T, cap, a, c, MODE, SOFTCAP)
        g = _join(g, g_high, FORMAT, OPAQUE)
    return g


@triton.jit
def look(partial_ptr, row, C: tl.constexpr, CP: tl.constexpr):
    """What the slices of a row have published so far."""
    at = tl.arange(0, CP)
    return tl.load(partial_ptr + row * (2 * CP) + at, mask=at < C, other=0, volatile=True)


@triton.jit
def whole_row(words, live, partial_ptr, row, shift, inv_T, C: tl.constexpr, CP: tl.constexpr):
    """Sums over all C slices, in order, so the same in each; and their common shift.

    words: from an earlier look, which is nearly always enough. What is not there yet is NaN and
    what has a shift of its own is infinite, so a finite sum says that all is well. live: whether
    anybody publishes; else the sums are rubbish.
    """
    sum_T, sum_1 = sum2(_low(words), _high(words))
    top = tl.where(shift > float("-inf"), shift, 0.0)
    if live & ((sum_T + sum_1 < float("inf")) == 0):
        missing = tl.sum((words == _NOTHING).to(tl.int32), 0)
        while missing > 0:
            words = look(partial_ptr, row, C, CP)
            missing = tl.sum((words == _NOTHING).to(tl.int32), 0)
        sum_T, sum_1 = sum2(_low(words), _high(words))
        if (sum_T + sum_1 < float("inf")) == 0:
            at = tl.arange(0, CP)
            apart = _low(words) == float("inf")
            own = look(partial_ptr + CP, row, C, CP)
            missing = tl.sum((apart & (own == _NOTHING)).to(tl.int32), 0)
            while missing > 0:
                own = look(partial_ptr + CP, row, C, CP)
                missing = tl.sum((apart & (own == _NOTHING)).to(tl.int32), 0)
            m = tl.where(apart, _high(words), shift)
            top = tl.maximum(tl.max(tl.where(at < C, m, float("-inf")), 0), shift)
            top = tl.where(top == float("-inf"), 0.0, top)
            of_T = tl.where(apart, _low(own), _low(words)) * tl.exp2((m - top) * (inv_T * LOG2E))
            of_1 = tl.where(apart, _high(own), _high(words)) * tl.exp2((m - top) * LOG2E)
            sum_T, sum_1 = sum2(tl.where(at < C, of_T, 0.0), tl.where(at < C, of_1, 0.0))
    return sum_T, sum_1, top
