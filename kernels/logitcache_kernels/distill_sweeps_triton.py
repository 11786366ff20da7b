"""The passes of the row kernel over a whole row."""

from __future__ import annotations

import triton
import triton.language as tl

from .distill_terms_triton import logit, powers, slope


@triton.jit
def zero_row(row, V, BLOCK: tl.constexpr):
    """No loss, no gradient: 2 V bytes written, none read."""
    at = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], row.dtype.element_ty)
    for start in range(0, V, BLOCK):
        tl.store(row + start + at, zeros, mask=start + at < V, cache_modifier=".cs")


@triton.jit
def copy_row(source, row, V, BLOCK: tl.constexpr):
    """Where the logits must stay: the sweeps work on this copy, which becomes the gradient."""
    at = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        raw = tl.load(source + start + at, mask=start + at < V, eviction_policy="evict_first")
        tl.store(row + start + at, raw.to(row.dtype.element_ty), mask=start + at < V)


@triton.jit
def _by_eight(x, BLOCK: tl.constexpr):
    """Sums of eight neighbours: what one thread loads at once, so an eighth of the accumulators."""
    return tl.sum(tl.reshape(x, [BLOCK // 8, 8]), 1)


@triton.jit
def _add(acc_T, acc_1, raw, shift, unit, inv_T, cap, MODE: tl.constexpr, SOFTCAP: tl.constexpr,
         BLOCK: tl.constexpr):  # fmt: skip
    e_T, e_1 = powers(logit(raw.to(tl.float32), cap, SOFTCAP), shift, unit, inv_T, MODE)
    acc_T += _by_eight(e_T, BLOCK)
    if MODE != 0:
        acc_1 += _by_eight(e_1, BLOCK)
    return acc_T, acc_1


@triton.jit
def first_sweep(row, V, shift, unit, inv_T, cap, MODE: tl.constexpr, SOFTCAP: tl.constexpr,
                BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Lanes of both sums, and the last tile, which stays in registers for the second sweep."""
    at = tl.arange(0, BLOCK)
    streamed = tl.maximum(tl.cdiv(V - BLOCK, BLOCK), 0)
    acc_T = tl.zeros([BLOCK // 8], tl.float32)
    acc_1 = tl.zeros([BLOCK // 8], tl.float32)
    for b in tl.range(0, streamed, num_stages=STAGES):
        raw = tl.load(row + b * BLOCK + at)
        acc_T, acc_1 = _add(acc_T, acc_1, raw, shift, unit, inv_T, cap, MODE, SOFTCAP, BLOCK)
    held_at = streamed * BLOCK + at
    held = tl.load(
        row + held_at, mask=held_at < V, other=float("-inf"), eviction_policy="evict_first"
    )
    acc_T, acc_1 = _add(acc_T, acc_1, held, shift, unit, inv_T, cap, MODE, SOFTCAP, BLOCK)
    return acc_T, acc_1, held


@triton.jit
def guarded_sums(row, V, m0, unit, inv_T, cap, SOFTCAP: tl.constexpr, MODE: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """The safe way: the row's own maximum first. Gives both sums and the maximum."""
    at = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        raw = tl.load(row + start + at, mask=start + at < V, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, logit(raw, cap, SOFTCAP))
    m = tl.maximum(tl.max(top, 0), m0)
    m = tl.where(m == float("-inf"), 0.0, m)
    shift = m * unit
    acc_T = tl.zeros([BLOCK], tl.float32)
    acc_1 = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        raw = tl.load(row + start + at, mask=start + at < V, other=float("-inf")).to(tl.float32)
        e_T, e_1 = powers(logit(raw, cap, SOFTCAP), shift, unit, inv_T, MODE)
        acc_T += e_T
        acc_1 += e_1
    return tl.sum(acc_T, 0), tl.sum(acc_1, 0), m


@triton.jit
def _again(x, OPAQUE: tl.constexpr):
    """The same values, as something the compiler knows nothing of.

    Without it, conversions to float32 and exponentials made in the first sweep are kept for the
    second, at 4 bytes and more an element; the 16-bit values alone are half of that.
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
def _gradient(raw, shift, unit, inv_T, cap, a, c, MODE: tl.constexpr, SOFTCAP: tl.constexpr):
    """a exp((z - m)/T) + c exp(z - m), through the cap."""
    z = logit(raw.to(tl.float32), cap, SOFTCAP)
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
def second_sweep(row, held, V, shift, unit, inv_T, cap, a, c, MODE: tl.constexpr,
                 SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
                 STAGES: tl.constexpr, OPAQUE: tl.constexpr):  # fmt: skip
    """Overwrite the row by its gradient, backwards: what was read last is what L2 still has."""
    at = tl.arange(0, BLOCK)
    streamed = tl.maximum(tl.cdiv(V - BLOCK, BLOCK), 0)
    held_at = streamed * BLOCK + at
    g = _gradient(_again(held, OPAQUE), shift, unit, inv_T, cap, a, c, MODE, SOFTCAP)
    tl.store(row + held_at, g.to(row.dtype.element_ty), mask=held_at < V, cache_modifier=".cs")
    for b in tl.range(0, streamed, num_stages=STAGES):
        here = row + (streamed - 1 - b) * BLOCK + at
        g = _gradient(tl.load(here), shift, unit, inv_T, cap, a, c, MODE, SOFTCAP)
        tl.store(here, g.to(row.dtype.element_ty), cache_modifier=".cs")
