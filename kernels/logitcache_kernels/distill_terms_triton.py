"""Pieces of the loss kernels: the student's powers, a teacher's target, terms of a divergence."""

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


@triton.jit
def tail_slopes(b_sum, p_tail, q_tail, inside, beta, TAIL: tl.constexpr, KIND: tl.constexpr):
    """The tail's value, then kappa and omega of the gradient (``distill_rows_triton``)."""
    value = 0.0
    if TAIL == 0:
        alive = tl.where(q_tail >= FLOOR, 1.0, 0.0)
        log_q = tl.log(tl.maximum(q_tail, FLOOR))
        value, b = terms(p_tail, q_tail, log_q, alive, beta, KIND)
        kappa = b_sum + b
        omega = tl.where(b != 0.0, b / q_tail, 0.0) - kappa
    elif TAIL == 1:
        alive = tl.where(inside >= FLOOR, 1.0, 0.0)
        per_inside = 1.0 / tl.maximum(inside, FLOOR)
        left = b_sum * (1.0 - alive * inside * per_inside)
        kappa = b_sum * alive * per_inside + left
        omega = -left
    else:
        kappa = b_sum
        omega = -b_sum
    return value, kappa, omega
