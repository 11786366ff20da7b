"""Pieces of the row kernel: powers of the student, terms of a divergence, sweeps over a row."""

from __future__ import annotations

import triton
import triton.language as tl

from .gate_triton import LOG2E

FLOOR = tl.constexpr(1e-7)  # types.PROBABILITY_FLOOR
# How exp(z/T) and exp(z) come from one exponential: u = exp(z / UNIT), powers of u.
T_1, T_3_2, T_2, T_3, T_4, T_ANY = 0, 1, 2, 3, 4, 5
UNIT = {T_1: 1.0, T_3_2: 3.0, T_2: 2.0, T_3: 3.0, T_4: 4.0, T_ANY: 1.0}


@triton.jit
def logit(raw, cap, SOFTCAP: tl.constexpr):
    """The student's logit: cap * tanh(raw / cap) where capped; -inf (left out) stays -inf."""
    z = raw
    if SOFTCAP:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(raw * (2.0 * LOG2E / cap)))
        z = tl.where(raw == float("-inf"), raw, cap * tanh)
    return z


@triton.jit
def slope(z, cap, SOFTCAP: tl.constexpr):
    """d logit / d raw as a function of the logit."""
    if SOFTCAP:
        ratio = tl.where(z == float("-inf"), 1.0, z / cap)
        value = 1.0 - ratio * ratio
    else:
        value = 1.0
    return value


@triton.jit
def powers(z, shift, unit, inv_T, MODE: tl.constexpr):
    """exp((z - m)/T) and exp(z - m); unit = log2(e) / UNIT and shift = m * unit."""
    x = z * unit - shift
    if MODE == 5:
        e_T = tl.exp2(x * inv_T)
        e_1 = tl.exp2(x)
    else:
        u = tl.exp2(x)
        if MODE == 0:
            e_T = u
            e_1 = u
        elif MODE == 1:
            e_T = u * u
            e_1 = e_T * u
        elif MODE == 2:
            e_T = u
            e_1 = u * u
        elif MODE == 3:
            e_T = u
            e_1 = u * u * u
        else:
            e_T = u
            e_1 = (u * u) * (u * u)
    return e_T, e_1


@triton.jit
def dense_gradient(raw, shift, unit, inv_T, cap, a, c, MODE: tl.constexpr, SOFTCAP: tl.constexpr):
    """a exp((z - m)/T) + c exp(z - m), through the cap."""
    z = logit(raw, cap, SOFTCAP)
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
def again(x, OPAQUE: tl.constexpr):
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
def by_eight(x, BLOCK: tl.constexpr):
    """Sums of eight neighbours: what one thread loads at once, so an eighth of the accumulators."""
    return tl.sum(tl.reshape(x, [BLOCK // 8, 8]), 1)


@triton.jit
def guarded_sums(row, V, m0, unit, inv_T, cap, SOFTCAP: tl.constexpr,
                 MODE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The safe way: the row's own maximum first. Gives sums at T and 1, the maximum, the shift."""
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
def target(logp, log_partition, inclusion, taboo, inv_T, HAS_TABOO: tl.constexpr):
    """p^T on the support, 0 at taboo ids and renormalised over what is left."""
    p = tl.exp(logp * inv_T - log_partition)
    if HAS_TABOO:
        lost = tl.sum(tl.where(taboo & (inclusion >= 1.0), p, 0.0), 0)
        p = tl.where(taboo, 0.0, p / tl.maximum(1.0 - lost, FLOOR))
    return p


@triton.jit
def terms(p, q, log_q, alive, beta, KIND: tl.constexpr):
    """Value of one term of the divergence, and its derivative with respect to log q.

    forward: p (log p - log q), -p.  reverse: q y, q (y + 1) with y = log q - log p.
    jsd: b p (log p - log m) + (1 - b) q y, (1 - b) q y with y = log q - log m.
    alive is 0 where log q is held at the floor, else 1 (a held logarithm has no gradient).
    """
    log_p = tl.log(tl.maximum(p, FLOOR))
    if KIND == 0:
        value = tl.where(p != 0.0, p * (log_p - log_q), 0.0)
        base = -p * alive
    elif KIND == 1:
        y = log_q - log_p
        value = tl.where(q != 0.0, q * y, 0.0)
        base = tl.where(q != 0.0, q * (y + alive), 0.0)
    else:
        m = beta * p + (1.0 - beta) * q
        log_m = tl.log(tl.maximum(m, FLOOR))
        y = log_q - log_m
        value = beta * tl.where(p != 0.0, p * (log_p - log_m), 0.0)
        value += (1.0 - beta) * tl.where(q != 0.0, q * y, 0.0)
        held = tl.where(m >= FLOOR, 1.0, 0.0)
        base = (1.0 - beta) * tl.where(q != 0.0, q * (y + alive - held), 0.0)
    return value, base
