"""The plan of a row: all that the loss needs from the teachers and a few logits.

One program takes a position: gate (``gate_triton``), target on the support, the student's logits
there, and every sum that does not need the rest of the row. ``distill_rows_triton`` then reads the
row itself, and of the plan a list of entries and sixteen numbers.

The list holds teacher 1's ids, then what teacher 2 has besides where the teachers are blended; its
logits z, its target P. Gold and taboo ids stand beside it. All of these are *left out* of the sums
over the row: the other kernel overwrites them by -inf there, slice by slice just before it reads
it, so that the tail's mass and 1 - q'(gold) are never a difference of nearly equal numbers. Taboo
ids under taboo="neutral" leave the student by the same means.

With m the largest gathered logit, e = exp((z - m) / T) and e' = exp(z - m), the numbers are

    INSIDE  sum of e over list and taboo ids       OTHERS  sum of e' over them but for gold
    MASS    sum of P where the student reaches     VALUE   sum of P (log P - (z - m) / T) there

so that forward KL is VALUE + MASS log(sum of the row) + its tail's term: linear, no list needed.
Sampled: P / inclusion in place of P, but log P (DESIGN section 6).

Bytes per row: 8 K of each teacher, 32 to 64 for each gathered logit (a sector of memory), 12 K for
each list written; 5 K for 2 teachers of 64 entries, against 4 V = 600 K of the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .distill_taboo_triton import (
    taboo_flags,
    taboo_gather,
    taboo_sums,
    taboo_top,
)
from .distill_terms_triton import FLOOR, logit, powers, target
from .gate_triton import (
    agreement,
    confidences,
    decide,
    gold_label,
    load_teacher,
    match,
    sum2,
)

# Where the numbers of a row stand in its sixteen.
SHIFT, INSIDE, OTHERS, GOLD_1, GOLD_T, GOLD_LOGIT, GOLD_ID = (tl.constexpr(i) for i in range(7))
MASS, VALUE, TAIL_MASS = (tl.constexpr(i) for i in range(7, 10))
R_MASS, R_VALUE, R_TAIL_MASS, R_OTHERS = (tl.constexpr(i) for i in range(10, 14))
WEIGHT, AGREEMENT = tl.constexpr(14), tl.constexpr(15)  # AGREEMENT is 1 - JS
NUMBERS = tl.constexpr(16)


@triton.jit
def _value(p, plain, x):
    """sum P (log P - x), 0 where P = 0."""
    return tl.where(p != 0.0, p * (tl.log(tl.maximum(plain, FLOOR)) - x), 0.0)


@triton.jit
def _no_loss(loss_ptr, kd_ptr, ce_ptr, position):
    tl.store(loss_ptr + position, 0.0)
    tl.store(kd_ptr + position, 0.0)
    tl.store(ce_ptr + position, 0.0)


@triton.jit
def plan_kernel(
    z_ptr, index_ptr, z_stride,
    ids1_ptr, logp1_ptr, inclusion1_ptr, partition1_ptr, entropy1_ptr,
    ids1_stride, logp1_stride, inclusion1_stride,
    ids2_ptr, logp2_ptr, inclusion2_ptr, partition2_ptr, entropy2_ptr,
    ids2_stride, logp2_stride, inclusion2_stride,
    labels_ptr, gold_ptr, taboo_ptr, taboo_stride,
    loss_ptr, strategy_ptr, js_ptr, kd_ptr, ce_ptr, weight_ptr,
    numbers_ptr, kind_ptr, list_ids_ptr, list_z_ptr, list_p_ptr, list_r_ptr, slots_ptr,
    partial_ptr,
    K1, K2, NT, V,
    inv_T, unit, js_threshold, confidence_threshold, gold_weight, log_V, cap,
    KP: tl.constexpr, TB: tl.constexpr,
    TEACHERS: tl.constexpr, SAMPLED: tl.constexpr, ENTROPY: tl.constexpr, HAS_GOLD: tl.constexpr,
    TABOO: tl.constexpr,  # 0 none, 1 target, 2 neutral
    TAIL: tl.constexpr,  # 0 bucket, 1 renormalise, 2 none (and sampled)
    KIND: tl.constexpr,  # 0 forward, 1 reverse, 2 jsd
    HAS_R: tl.constexpr, MODE: tl.constexpr, SOFTCAP: tl.constexpr,
    LOGITS: tl.constexpr,  # whether there are any yet; else the gate alone
    HAS_INDEX: tl.constexpr,  # logits row i belongs to position index[i]
    PARTIALS: tl.constexpr,  # words of partial_ptr a row, to be set to "nothing yet"
):  # fmt: skip
    minus_inf = float("-inf")
    i = tl.program_id(0).to(tl.int64)
    position = i
    if HAS_INDEX:
        position = tl.load(index_ptr + i).to(tl.int64)
    if PARTIALS > 0:
        nothing = tl.full([PARTIALS], -1, tl.int64)
        tl.store(partial_ptr + i * PARTIALS + tl.arange(0, PARTIALS), nothing)

    # The gate.
    is_valid, gold = gold_label(
        labels_ptr, gold_ptr, taboo_ptr, position, taboo_stride, NT, V, HAS_GOLD, TABOO > 0, TB
    )
    ids1, logp1, inclusion1 = load_teacher(
        ids1_ptr, logp1_ptr, inclusion1_ptr, position, ids1_stride, logp1_stride,
        inclusion1_stride, K1, V, KP, SAMPLED, -1,
    )  # fmt: skip
    if TEACHERS == 2:
        ids2, logp2, inclusion2 = load_teacher(
            ids2_ptr, logp2_ptr, inclusion2_ptr, position, ids2_stride, logp2_stride,
            inclusion2_stride, K2, V, KP, SAMPLED, -2,
        )  # fmt: skip
    if LOGITS:
        # On their way while the gate is computed, wanted or not.
        row = z_ptr + i * z_stride
        z1 = tl.load(row + ids1, mask=ids1 >= 0, other=minus_inf).to(tl.float32)
        z_gold = tl.load(row + gold, mask=gold >= 0, other=minus_inf).to(tl.float32)
        partition1 = tl.load(partition1_ptr + position).to(tl.float32)
        if TEACHERS == 2:
            z2 = tl.load(row + ids2, mask=ids2 >= 0, other=minus_inf).to(tl.float32)
            partition2 = tl.load(partition2_ptr + position).to(tl.float32)
    js = 0.0
    if TEACHERS == 2:
        logp2_on1, inclusion2_on1, repeated2 = match(
            ids1, ids2, ids1_ptr, ids2_ptr, logp2_ptr, inclusion2_ptr, position,
            ids1_stride, ids2_stride, logp2_stride, inclusion2_stride, K1, K2, V,
            KP, SAMPLED,
        )  # fmt: skip
        js = agreement(logp1, inclusion1, logp2, inclusion2, logp2_on1, inclusion2_on1, repeated2)
        confidence1, confidence2 = confidences(
            logp1, logp2, entropy1_ptr, entropy2_ptr, position, log_V, ENTROPY
        )
        strategy, blend1, blend2, weight = decide(
            js, confidence1, confidence2, is_valid, gold >= 0, js_threshold,
            confidence_threshold, gold_weight,
        )  # fmt: skip
        js = tl.where(is_valid, js, 0.0)
    else:
        strategy = tl.where(is_valid, 1, 3)
        weight = tl.where(is_valid, 1.0, 0.0)
    tl.store(strategy_ptr + position, strategy.to(tl.int8))
    tl.store(js_ptr + position, js)
    tl.store(weight_ptr + position, weight)
    if not LOGITS:
        _no_loss(loss_ptr, kd_ptr, ce_ptr, position)
    else:
        tl.store(kind_ptr + i, strategy.to(tl.int8))
        if strategy == 3:
            _no_loss(loss_ptr, kd_ptr, ce_ptr, position)
        else:
            # What is left out of the sums over the row.
            z1 = logit(z1, cap, SOFTCAP)
            taboo1 = tl.zeros([KP], tl.int1)
            in1 = ids1 == gold
            listed_at = in1.to(tl.int32)
            if TEACHERS == 2:
                use2 = (tl.where(strategy == 0, ids2, -2) >= 0) & (repeated2 == 0)
                z2 = tl.where(use2, logit(z2, cap, SOFTCAP), minus_inf)
                taboo2 = tl.zeros([KP], tl.int1)
                in2 = use2 & (ids2 == gold)
                listed_at = tl.maximum(listed_at, in2.to(tl.int32))
            gold_alone = (gold >= 0) & (tl.max(listed_at, 0) == 0)
            z_gold = logit(z_gold, cap, SOFTCAP)
            if TABOO:
                first_taboo = position * taboo_stride
                last_taboo = first_taboo + NT
                taboo1 = taboo_flags(ids1, taboo_ptr, first_taboo, last_taboo, V, KP, TB)
                used = ids1
                if TEACHERS == 2:
                    taboo2 = taboo_flags(ids2, taboo_ptr, first_taboo, last_taboo, V, KP, TB)
                    used = tl.where(use2, ids2, -9)
                if TABOO == 1:
                    slots = slots_ptr + i * (tl.cdiv(NT, TB) * TB)
                    taboo_gather(
                        row, slots, ids1, used, taboo_ptr, first_taboo, last_taboo, V, cap,
                        SOFTCAP, TB,
                    )  # fmt: skip
                    tl.debug_barrier()  # slots are there
                else:
                    z1 = tl.where(taboo1, minus_inf, z1)
                    if TEACHERS == 2:
                        z2 = tl.where(taboo2, minus_inf, z2)

            # Sums of the student's powers over them.
            top = z1
            if TEACHERS == 2:
                top = tl.maximum(top, z2)
            top = tl.maximum(tl.max(top, 0), z_gold)
            if TABOO == 1:
                top = tl.maximum(top, taboo_top(slots, NT, TB))
            m = tl.where(top > minus_inf, top, 0.0)
            shift = m * unit
            q1, n1 = powers(z1, shift, unit, inv_T, MODE)
            q_gold, n_gold = powers(z_gold, shift, unit, inv_T, MODE)
            listed_T = q1
            listed_1 = tl.where(in1, 0.0, n1)  # all but gold
            if TEACHERS == 2:
                q2, n2 = powers(z2, shift, unit, inv_T, MODE)
                q2 = tl.where(use2, q2, 0.0)
                listed_T += q2
                listed_1 += tl.where(in2 | (use2 == 0), 0.0, n2)
            inside, others = sum2(listed_T, listed_1)
            if TABOO == 1:
                taboo_T, taboo_1 = taboo_sums(slots, NT, shift, unit, inv_T, MODE, TB)
                inside += taboo_T
                others += taboo_1

            # The target.
            plain1 = target(logp1, partition1, inclusion1, taboo1, inv_T, TABOO > 0)
            reach1 = (ids1 >= 0) & (z1 != minus_inf)
            x1 = tl.where(reach1, (z1 - m) * inv_T, 0.0)
            alone1 = plain1
            if TEACHERS == 2:
                plain2 = blend2 * target(logp2, partition2, inclusion2, taboo2, inv_T, TABOO > 0)
                plain2_on1 = tl.exp(logp2_on1 * inv_T - partition2)
                if TABOO:
                    lost = tl.exp(logp2 * inv_T - partition2)
                    lost = tl.sum(tl.where(taboo2 & (inclusion2 >= 1.0), lost, 0.0), 0)
                    plain2_on1 = plain2_on1 / tl.maximum(1.0 - lost, FLOOR)
                    plain2_on1 = tl.where(taboo1, 0.0, plain2_on1)
                plain2_on1 = blend2 * plain2_on1
                plain1 = blend1 * plain1
                p1 = plain1 / inclusion1 + plain2_on1 / inclusion2_on1
                plain1 = plain1 + plain2_on1
                p2 = tl.where(use2, plain2 / inclusion2, 0.0)
                reach2 = use2 & (z2 != minus_inf)
                x2 = tl.where(reach2, (z2 - m) * inv_T, 0.0)
            else:
                p1 = plain1 / inclusion1
            p1 = tl.where(ids1 >= 0, p1, 0.0)
            all_p = p1
            if TEACHERS == 2:
                all_p = p1 + p2
            all_p = tl.sum(all_p, 0)
            tail_mass = tl.maximum(1.0 - all_p, 0.0)
            if TAIL == 1:
                p1 = p1 / tl.maximum(all_p, FLOOR)
                if TEACHERS == 2:
                    p2 = p2 / tl.maximum(all_p, FLOOR)
            mass = 0.0
            value = 0.0
            if KIND == 0:
                p1 = tl.where(reach1, p1, 0.0)
                mass = p1
                # Sampled targets keep their own probability in the logarithm.
                value = _value(p1, plain1 if SAMPLED else p1, x1)
                if TEACHERS == 2:
                    p2 = tl.where(reach2, p2, 0.0)
                    mass += p2
                    value += _value(p2, plain2 if SAMPLED else p2, x2)
                mass, value = sum2(mass, value)

            numbers = numbers_ptr + i * NUMBERS
            tl.store(numbers + SHIFT, tl.where(top > minus_inf, top, minus_inf))
            tl.store(numbers + INSIDE, inside)
            tl.store(numbers + OTHERS, others)
            tl.store(numbers + GOLD_1, tl.where(gold >= 0, n_gold, 0.0))
            # In the divergence a gold label outside the support is part of the tail.
            tl.store(numbers + GOLD_T, tl.where(gold_alone, q_gold, -1.0))
            tl.store(numbers + GOLD_LOGIT, z_gold)
            tl.store(numbers + GOLD_ID, gold.to(tl.float32))  # exact: V is far below 2^24
            tl.store(numbers + MASS, mass)
            tl.store(numbers + VALUE, value)
            tl.store(numbers + TAIL_MASS, tail_mass)
            tl.store(numbers + WEIGHT, weight)
            at = i * (TEACHERS * KP) + tl.arange(0, KP)
            tl.store(list_ids_ptr + at, ids1)
            tl.store(list_z_ptr + at, z1)
            tl.store(list_p_ptr + at, p1)
            if TEACHERS == 2:
                tl.store(list_ids_ptr + at + KP, tl.where(use2, ids2, -1))
                tl.store(list_z_ptr + at + KP, tl.where(use2, z2, minus_inf))
                tl.store(list_p_ptr + at + KP, p2)

            if HAS_R:
                # R = (1 - JS) KL(p1^T || q): list 1 and taboo ids are its support, what list 2
                # has besides is tail, marked by -1.
                pr = tl.where(ids1 >= 0, alone1 / inclusion1, 0.0)
                mass_r = tl.sum(pr, 0)
                tail_mass_r = tl.maximum(1.0 - mass_r, 0.0)
                if TAIL == 1:
                    pr = pr / tl.maximum(mass_r, FLOOR)
                pr = tl.where(reach1, pr, 0.0)
                value_r = _value(pr, alone1 if SAMPLED else pr, x1)
                mass_r, value_r = sum2(pr, value_r)
                tail2 = use2 & (taboo2 == 0)
                tl.store(numbers + R_MASS, mass_r)
                tl.store(numbers + R_VALUE, value_r)
                tl.store(numbers + R_TAIL_MASS, tail_mass_r)
                tl.store(numbers + AGREEMENT, 1.0 - js)
                tl.store(numbers + R_OTHERS, tl.sum(tl.where(tail2, q2, 0.0), 0))
                tl.store(list_r_ptr + at, pr)
                tl.store(list_r_ptr + at + KP, tl.where(tail2, -1.0, 0.0))
