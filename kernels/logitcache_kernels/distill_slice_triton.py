"""A slice of a row in registers: its sums, what the row's other slices sum to, its gradient.

Programs that share a row tell each other their sums through memory, in two 64-bit words each: both
sums, and the shift they were taken with. A word is whole when it is seen at all, so the words
themselves say that they are there: until then they are NOTHING, which the launch before set.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .distill_terms_triton import logit, powers, slope
from .gate_triton import LOG2E, sum2

# A sum above this is taken again with a better shift: its reciprocal would near fp32's smallest.
_LARGEST_SUM = tl.constexpr(1e18)
_NOTHING = tl.constexpr(-1)  # as two floats: NaNs that no operation yields


@triton.jit
def again(x, OPAQUE: tl.constexpr):
    """The same values, as something the compiler knows nothing of.

    Without it, conversions to float32 and exponentials made for the sums are kept for the
    gradient, at 4 bytes and more an element; the 16-bit values alone are half of that.
    """
    if OPAQUE:
        if x.dtype.primitive_bitwidth == 16:
            y = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
            )
        else:
            y = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1
            )
    else:
        y = x
    return y


@triton.jit
def _sums(x, m, unit, inv_T, cap, MODE: tl.constexpr, SOFTCAP: tl.constexpr):
    z = logit(x.to(tl.float32), cap, SOFTCAP)
    e_T, e_1 = powers(z, m * unit, unit, inv_T, MODE)
    if MODE != 0:
        sum_T, sum_1 = sum2(e_T, e_1)
    else:
        sum_T = tl.sum(e_T, 0)
        sum_1 = sum_T
    return sum_T, sum_1


@triton.jit
def slice_sums(x, shift, unit, inv_T, cap, MODE: tl.constexpr, SOFTCAP: tl.constexpr,
               OPAQUE: tl.constexpr):  # fmt: skip
    """Sums of exp((z - m)/T) and exp(z - m), and their m: the shift, or where a sum grows too large
    or there is no shift (-inf) the slice's own maximum (-inf where all of it is -inf)."""
    has_shift = shift > float("-inf")
    m = tl.where(has_shift, shift, 0.0)
    sum_T, sum_1 = _sums(x, m, unit, inv_T, cap, MODE, SOFTCAP)
    fine = has_shift & (sum_T < _LARGEST_SUM) & (sum_1 < _LARGEST_SUM)
    if fine == 0:
        y = again(x, OPAQUE)
        m = tl.max(logit(y.to(tl.float32), cap, SOFTCAP), 0)
        safe = tl.where(m == float("-inf"), 0.0, m)
        sum_T, sum_1 = _sums(y, safe, unit, inv_T, cap, MODE, SOFTCAP)
    return sum_T, sum_1, m


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
def whole_row(
    partial_ptr, row, part, sum_T, sum_1, m, shift, inv_T, C: tl.constexpr, CP: tl.constexpr
):
    """Sums over all C slices and their common shift M >= shift: in order, so the same in each.

    The programs of a row all run at once (a cooperative launch), each takes its items in rising
    order, and none waits before its own words are out: so every wait ends.
    """
    if C == 1:
        M = tl.maximum(m, shift)
        M = tl.where(M == float("-inf"), 0.0, M)
        sum_T = sum_T * tl.exp2((m - M) * (inv_T * LOG2E))
        sum_1 = sum_1 * tl.exp2((m - M) * LOG2E)
    else:
        partial = partial_ptr + row * (2 * CP)
        tl.store(partial + part, _pack(sum_T, sum_1))
        tl.store(partial + CP + part, _pack(m, m))
        at = tl.arange(0, CP)
        sums = tl.load(partial + at, mask=at < C, other=0, volatile=True)
        shifts = tl.load(partial + CP + at, mask=at < C, other=0, volatile=True)
        missing = tl.sum(((sums == _NOTHING) | (shifts == _NOTHING)).to(tl.int32), 0)
        while missing > 0:
            sums = tl.load(partial + at, mask=at < C, other=0, volatile=True)
            shifts = tl.load(partial + CP + at, mask=at < C, other=0, volatile=True)
            missing = tl.sum(((sums == _NOTHING) | (shifts == _NOTHING)).to(tl.int32), 0)
        ms = tl.where(at < C, _low(shifts), float("-inf"))
        M = tl.maximum(tl.max(ms, 0), shift)
        M = tl.where(M == float("-inf"), 0.0, M)
        every_T = tl.where(at < C, _low(sums) * tl.exp2((ms - M) * (inv_T * LOG2E)), 0.0)
        every_1 = tl.where(at < C, _high(sums) * tl.exp2((ms - M) * LOG2E), 0.0)
        sum_T, sum_1 = sum2(every_T, every_1)
    return sum_T, sum_1, M


@triton.jit
def slice_gradient(x, shift, unit, inv_T, cap, a, c, MODE: tl.constexpr, SOFTCAP: tl.constexpr):
    """a exp((z - m)/T) + c exp(z - m), through the cap."""
    z = logit(x.to(tl.float32), cap, SOFTCAP)
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
