"""Taboo ids in the kernels of the loss: slices of TB ids, NT of a position.

Under taboo="target" those that stand in no list are support entries with target 0. Their logits
are gathered into a scratch (slots), as the row itself gets -inf in their place; a slot of -inf is
none of these. Under taboo="neutral" that -inf in the row is all there is to do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .distill_terms_triton import logit, powers, slope, terms
from .gate_triton import load_ids


@triton.jit
def taboo_flags(ids, taboo_ptr, first, last, V, KP: tl.constexpr, TB: tl.constexpr):
    """Which of a list's ids are taboo."""
    hits = tl.zeros([KP], tl.int32)
    for start in range(first, last, TB):
        taboo = load_ids(taboo_ptr, start, last, V, TB, -3)
        hits = tl.maximum(hits, tl.max((ids[:, None] == taboo[None, :]).to(tl.int32), 1))
    return hits > 0


@triton.jit
def taboo_gather(source, slots, ids1, ids2, taboo_ptr, first, last, V, cap,
                 SOFTCAP: tl.constexpr, TB: tl.constexpr):  # fmt: skip
    """Logits of taboo ids that stand in neither list (pass ids below -3 for a list not used)."""
    for start in range(first, last, TB):
        taboo = load_ids(taboo_ptr, start, last, V, TB, -3)
        listed = tl.max((ids1[:, None] == taboo[None, :]).to(tl.int32), 0)
        listed += tl.max((ids2[:, None] == taboo[None, :]).to(tl.int32), 0)
        wanted = (taboo >= 0) & (listed == 0)
        raw = tl.load(source + taboo, mask=wanted, other=float("-inf")).to(tl.float32)
        tl.store(slots + (start - first) + tl.arange(0, TB), logit(raw, cap, SOFTCAP))


@triton.jit
def taboo_leave_out(row, begin, end, taboo_ptr, first, last, V, TB: tl.constexpr):
    """Overwrite by -inf in the row, from id begin to before id end."""
    for start in range(first, last, TB):
        taboo = load_ids(taboo_ptr, start, last, V, TB, -3)
        tl.store(row + taboo, float("-inf"), mask=(taboo >= begin) & (taboo < end))


@triton.jit
def taboo_top(slots, NT, TB: tl.constexpr):
    """The largest gathered logit."""
    top = tl.full([TB], float("-inf"), tl.float32)
    for start in range(0, NT, TB):
        top = tl.maximum(top, tl.load(slots + start + tl.arange(0, TB)))
    return tl.max(top, 0)


@triton.jit
def taboo_sums(slots, NT, shift, unit, inv_T, MODE: tl.constexpr, TB: tl.constexpr):
    """Sums of exp((z - m)/T) and exp(z - m)."""
    sum_T = tl.zeros([TB], tl.float32)
    sum_1 = tl.zeros([TB], tl.float32)
    for start in range(0, NT, TB):
        z = tl.load(slots + start + tl.arange(0, TB))
        e_T, e_1 = powers(z, shift, unit, inv_T, MODE)
        sum_T += e_T
        sum_1 += e_1
    return tl.sum(sum_T, 0), tl.sum(sum_1, 0)


@triton.jit
def _taboo_terms(z, q, m, inv_T, log_sum, per_inside, beta, KIND: tl.constexpr, TB: tl.constexpr):
    log_q = tl.where(z != float("-inf"), (z - m) * inv_T - log_sum, 0.0)
    return terms(tl.zeros([TB], tl.float32), q * per_inside, log_q, 1.0, beta, KIND)


@triton.jit
def taboo_divergence(slots, NT, shift, unit, m, inv_T, per_T, log_sum, per_inside, beta,
                     MODE: tl.constexpr, KIND: tl.constexpr, TB: tl.constexpr):  # fmt: skip
    """Their part of the divergence and of the sum of b; log_sum includes log S if renormalised."""
    value = tl.zeros([TB], tl.float32)
    b_sum = tl.zeros([TB], tl.float32)
    for start in range(0, NT, TB):
        z = tl.load(slots + start + tl.arange(0, TB))
        q, _ = powers(z, shift, unit, inv_T, MODE)
        one, b = _taboo_terms(z, q * per_T, m, inv_T, log_sum, per_inside, beta, KIND, TB)
        value += one
        b_sum += b
    return tl.sum(value, 0), tl.sum(b_sum, 0)


@triton.jit
def taboo_gradient(row, begin, end, slots, taboo_ptr, first, last, V, shift, unit, m, inv_T, per_T,
                   c, scale_d, taboo_slope, log_sum, per_inside, beta, cap, MODE: tl.constexpr,
                   KIND: tl.constexpr, SOFTCAP: tl.constexpr, TB: tl.constexpr):  # fmt: skip
    """Write scale_d b - taboo_slope q + c exp(z - m), from id begin to before id end."""
    for start in range(first, last, TB):
        taboo = load_ids(taboo_ptr, start, last, V, TB, -3)
        z = tl.load(slots + (start - first) + tl.arange(0, TB))
        q, n = powers(z, shift, unit, inv_T, MODE)
        q = q * per_T
        g = c * n - taboo_slope * q
        if KIND != 0:
            _, b = _taboo_terms(z, q, m, inv_T, log_sum, per_inside, beta, KIND, TB)
            g += scale_d * b
        g = g * slope(z, cap, SOFTCAP)
        wanted = (taboo >= begin) & (taboo < end) & (z != float("-inf"))
        tl.store(row + taboo, g.to(row.dtype.element_ty), mask=wanted)
