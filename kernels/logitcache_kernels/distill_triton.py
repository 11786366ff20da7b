"""The row kernel of ``distill_loss``: gate, blend, divergence, cross entropy and gradient at once.

Mathematics, for one position with logits z, temperature T, q = softmax(z/T), q' = softmax(z). The
target P lives on the support (list 1, what list 2 has besides, taboo ids); tail masses p_t and q_t.
A divergence D(P, q) has terms over the support and one for the tail (``terms``), each with a
derivative b_v = dD_v / d log q_v. With B = sum b over the support:

    dD/dz_v = (b_v - kappa q_v) / T on the support,     omega q_v / T elsewhere
    bucket:      kappa = B + b_t,                         omega = b_t / q_t - kappa
    none:        kappa = B,                               omega = -B
    renormalise: kappa = B / S + B (1 - Q / S), omega = -B (1 - Q / S)    S = max(Q, floor)
    sampled:     b = -P / inclusion, as "none"            Q = sum of q over the support
    cross entropy: q'_v - [v = gold]

so the whole row gets a q_v + c q'_v with two scalars, and only support and gold are corrected.
In the first sweep these entries are *left out*: they are gathered, then overwritten by -inf in
the row itself, so that q_t and 1 - q'_gold are sums of what remains, never a difference of nearly
equal numbers. Taboo ids under taboo="neutral" leave the student by the same means.

One exponential u = exp(z / n) gives both exp(z/T) and exp(z) as powers, for T in 1, 1.5, 2, 3, 4.
The shift m is the largest gathered logit; where a sum exceeds 1e18 (a logit far above all of the
support) or nothing was gathered, the row is summed again around its own maximum.

Bytes moved per row, bf16: 2 V read and 2 V written (floor 4 V). A row is swept twice, the second
time backwards; the last tile stays in registers in between, the others are read again, from L2 as
far as it still has them (measured at V = 151936: 0.4 V more from memory with one program per
multiprocessor, 1.4 V with two). Not in place: a copy into the gradient comes first (2 V written,
2 V read, mostly L2). Sums have a fixed order: no atomics, the same bits each run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .distill_sweeps_triton import copy_row, first_sweep, guarded_sums, second_sweep, zero_row
from .distill_taboo_triton import (
    taboo_divergence,
    taboo_flags,
    taboo_gather,
    taboo_gradient,
    taboo_leave_out,
    taboo_sums,
    taboo_top,
)
from .distill_terms_triton import FLOOR, logit, powers, slope, target, terms
from .gate_triton import (
    agreement,
    confidences,
    decide,
    gold_label,
    load_teacher,
    match,
    sum2,
)

# A sum above this is taken again with a better shift: its reciprocal would near fp32's smallest.
_LARGEST_SUM = tl.constexpr(1e18)


@triton.jit
def distill_kernel(
    z_ptr, work_ptr, index_ptr, num_rows, z_stride, work_stride,
    ids1_ptr, logp1_ptr, inclusion1_ptr, partition1_ptr, entropy1_ptr,
    ids1_stride, logp1_stride, inclusion1_stride,
    ids2_ptr, logp2_ptr, inclusion2_ptr, partition2_ptr, entropy2_ptr,
    ids2_stride, logp2_stride, inclusion2_stride,
    labels_ptr, gold_ptr, taboo_ptr, taboo_stride, taboo_logits_ptr, per_item_ptr,
    loss_ptr, strategy_ptr, js_ptr, kd_ptr, ce_ptr, weight_ptr,
    K1, K2, NT, V,
    T, inv_T, unit, alpha, beta, gamma, jsd_beta, js_threshold, confidence_threshold, gold_weight,
    log_V, cap,
    KP: tl.constexpr, TB: tl.constexpr,
    TEACHERS: tl.constexpr, SAMPLED: tl.constexpr, ENTROPY: tl.constexpr, HAS_GOLD: tl.constexpr,
    TABOO: tl.constexpr,  # 0 none, 1 target, 2 neutral
    TAIL: tl.constexpr,  # 0 bucket, 1 renormalise, 2 none (and sampled)
    KIND: tl.constexpr,  # 0 forward, 1 reverse, 2 jsd
    HAS_R: tl.constexpr, MODE: tl.constexpr, SOFTCAP: tl.constexpr,
    OUT: tl.constexpr,  # 0 in place, 1 gradient elsewhere, 2 no gradient (work has a row a program)
    HAS_INDEX: tl.constexpr,  # logits row i belongs to position index[i]
    BLOCK: tl.constexpr, STAGES: tl.constexpr, OPAQUE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    minus_inf = float("-inf")
    per_item = tl.load(per_item_ptr)
    if TABOO == 1:
        slots = taboo_logits_ptr + program.to(tl.int64) * (tl.cdiv(NT, TB) * TB)
    for i in range(program, num_rows, tl.num_programs(0)):
        logits_row = tl.zeros((), tl.int64) + i
        position = logits_row
        if HAS_INDEX:
            position = tl.load(index_ptr + i).to(tl.int64)
        source = z_ptr + logits_row * z_stride
        if OUT == 2:
            row = work_ptr + program.to(tl.int64) * work_stride
        else:
            row = work_ptr + logits_row * work_stride

        # The gate.
        is_valid, gold = gold_label(
            labels_ptr, gold_ptr, taboo_ptr, position, taboo_stride, NT, V, HAS_GOLD, TABOO > 0, TB
        )
        ids1, logp1, inclusion1 = load_teacher(
            ids1_ptr, logp1_ptr, inclusion1_ptr, position, ids1_stride, logp1_stride,
            inclusion1_stride, K1, V, KP, SAMPLED, -1,
        )  # fmt: skip
        js = 0.0
        if TEACHERS == 2:
            ids2, logp2, inclusion2 = load_teacher(
                ids2_ptr, logp2_ptr, inclusion2_ptr, position, ids2_stride, logp2_stride,
                inclusion2_stride, K2, V, KP, SAMPLED, -2,
            )  # fmt: skip
            logp2_on1, inclusion2_on1, repeated2 = match(
                ids1, ids2, logp2, inclusion2, ids1_ptr, ids2_ptr, logp2_ptr, inclusion2_ptr,
                position, ids1_stride, ids2_stride, logp2_stride, inclusion2_stride, K1, K2, V,
                KP, SAMPLED,
            )  # fmt: skip
            js = agreement(
                logp1, inclusion1, logp2, inclusion2, logp2_on1, inclusion2_on1, repeated2
            )
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

        if strategy == 3:
            tl.store(loss_ptr + position, 0.0)
            tl.store(kd_ptr + position, 0.0)
            tl.store(ce_ptr + position, 0.0)
            if OUT != 2:
                zero_row(row, V, BLOCK)
        else:
            # The entries that are left out of the sweep: gather, then overwrite by -inf.
            z1 = tl.load(source + ids1, mask=ids1 >= 0, other=minus_inf).to(tl.float32)
            z1 = logit(z1, cap, SOFTCAP)
            taboo1 = tl.zeros([KP], tl.int1)
            in1 = ids1 == gold
            listed_at = in1.to(tl.int32)
            if TEACHERS == 2:
                use2 = (tl.where(strategy == 0, ids2, -2) >= 0) & (repeated2 == 0)
                z2 = tl.load(source + ids2, mask=use2, other=minus_inf).to(tl.float32)
                z2 = logit(z2, cap, SOFTCAP)
                taboo2 = tl.zeros([KP], tl.int1)
                in2 = use2 & (ids2 == gold)
                listed_at = tl.maximum(listed_at, in2.to(tl.int32))
            gold_alone = (gold >= 0) & (tl.max(listed_at, 0) == 0)
            z_gold = tl.load(source + gold, mask=gold >= 0, other=minus_inf).to(tl.float32)
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
                    taboo_gather(
                        source, slots, ids1, used, taboo_ptr, first_taboo, last_taboo, V, cap,
                        SOFTCAP, TB,
                    )  # fmt: skip
                else:
                    z1 = tl.where(taboo1, minus_inf, z1)
                    if TEACHERS == 2:
                        z2 = tl.where(taboo2, minus_inf, z2)
            if OUT != 0:
                copy_row(source, row, V, BLOCK)
            tl.debug_barrier()
            tl.store(row + ids1, minus_inf, mask=ids1 >= 0)
            if TEACHERS == 2:
                tl.store(row + ids2, minus_inf, mask=use2)
            tl.store(row + gold, minus_inf, mask=gold_alone)
            if TABOO:
                taboo_leave_out(row, taboo_ptr, first_taboo, last_taboo, V, TB)
            tl.debug_barrier()

            # First sweep.
            gathered_top = z1
            if TEACHERS == 2:
                gathered_top = tl.maximum(z1, z2)
            gathered_top = tl.maximum(tl.max(gathered_top, 0), z_gold)
            has_shift = gathered_top > minus_inf
            m = tl.where(has_shift, gathered_top, 0.0)
            shift = m * unit
            acc_T, acc_1, held = first_sweep(
                row, V, shift, unit, inv_T, cap, MODE, SOFTCAP, BLOCK, STAGES
            )
            if MODE != 0:
                rest_T, rest_1 = sum2(acc_T, acc_1)
            else:
                rest_T = tl.sum(acc_T, 0)
                rest_1 = rest_T
            taboo_T = 0.0
            taboo_1 = 0.0
            if TABOO == 1:
                taboo_T, taboo_1 = taboo_sums(slots, NT, shift, unit, inv_T, MODE, TB)
            small = (rest_T + taboo_T < _LARGEST_SUM) & (rest_1 + taboo_1 < _LARGEST_SUM)
            if (small & has_shift) == 0:
                top = gathered_top
                if TABOO == 1:
                    top = tl.maximum(top, taboo_top(slots, NT, TB))
                rest_T, rest_1, m = guarded_sums(
                    row, V, top, unit, inv_T, cap, SOFTCAP, MODE, BLOCK // 4
                )
                shift = m * unit
                if TABOO == 1:
                    taboo_T, taboo_1 = taboo_sums(slots, NT, shift, unit, inv_T, MODE, TB)

            # The student at the gathered entries, and in total.
            q1, n1 = powers(z1, shift, unit, inv_T, MODE)
            q_gold, n_gold = powers(z_gold, shift, unit, inv_T, MODE)
            alone_T = tl.where(gold_alone, q_gold, 0.0)
            listed_T = q1
            listed_1 = tl.where(in1, 0.0, n1)  # all but gold
            if TEACHERS == 2:
                q2, n2 = powers(z2, shift, unit, inv_T, MODE)
                q2 = tl.where(use2, q2, 0.0)
                n2 = tl.where(use2, n2, 0.0)
                listed_T += q2
                listed_1 += tl.where(in2, 0.0, n2)
            inside, others = sum2(listed_T, listed_1)
            sum_T = rest_T + taboo_T + alone_T + inside
            others = rest_1 + taboo_1 + others
            sum_1 = others + tl.where(gold >= 0, n_gold, 0.0)
            masked = sum_1 == 0.0  # every logit is -inf: loss 0, gradient 0
            per_T = 1.0 / tl.where(masked, 1.0, sum_T)
            per_1 = 1.0 / tl.where(masked, 1.0, sum_1)
            log_sum_T = tl.log(tl.where(masked, 1.0, sum_T))
            has_ce = (gold >= 0) & (z_gold != minus_inf)
            ce = tl.log(tl.where(masked, 1.0, sum_1)) - (z_gold - m)
            ce = tl.where(has_ce, ce, 0.0)
            rest_T = (rest_T + alone_T) * per_T
            taboo_T = taboo_T * per_T
            q1 = q1 * per_T
            reach1 = (ids1 >= 0) & (z1 != minus_inf)
            log_q1 = tl.where(reach1, (z1 - m) * inv_T - log_sum_T, 0.0)

            # The target.
            plain1 = target(
                logp1, tl.load(partition1_ptr + position).to(tl.float32), inclusion1, taboo1, inv_T,
                TABOO > 0,
            )  # fmt: skip
            alone1 = plain1
            if TEACHERS == 2:
                partition2 = tl.load(partition2_ptr + position).to(tl.float32)
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
                q2 = q2 * per_T
                log_q2 = tl.where(reach2, (z2 - m) * inv_T - log_sum_T, 0.0)
            else:
                p1 = plain1 / inclusion1
            p1 = tl.where(ids1 >= 0, p1, 0.0)

            # The divergence: value, b of each list, kappa and omega.
            inside = inside * per_T + taboo_T
            mass = p1
            if TEACHERS == 2:
                mass = p1 + p2
            mass = tl.sum(mass, 0)
            if KIND == 0:
                p1 = tl.where(reach1, p1, 0.0)
                if TEACHERS == 2:
                    p2 = tl.where(reach2, p2, 0.0)
            if SAMPLED:
                log_plain = tl.log(tl.maximum(plain1, FLOOR))
                value = tl.where(p1 != 0.0, p1 * (log_plain - log_q1), 0.0)
                b1 = -p1
                b_sum = b1
                if TEACHERS == 2:
                    log_plain = tl.log(tl.maximum(plain2, FLOOR))
                    value += tl.where(p2 != 0.0, p2 * (log_plain - log_q2), 0.0)
                    b2 = -p2
                    b_sum += b2
                value, b_sum = sum2(value, b_sum)
                kappa = b_sum
                omega = -b_sum
                per_mass = 1.0
                per_inside = 1.0
                log_inside = 0.0
            else:
                per_mass = 1.0
                per_inside = 1.0
                log_inside = 0.0
                if TAIL == 1:
                    per_mass = 1.0 / tl.maximum(mass, FLOOR)
                    per_inside = 1.0 / tl.maximum(inside, FLOOR)
                    log_inside = tl.log(tl.maximum(inside, FLOOR))
                value, b1 = terms(
                    p1 * per_mass, q1 * per_inside, log_q1 - log_inside, 1.0, jsd_beta, KIND
                )
                b_sum = b1
                if TEACHERS == 2:
                    v2, b2 = terms(
                        p2 * per_mass, q2 * per_inside, log_q2 - log_inside, 1.0, jsd_beta, KIND
                    )
                    value += v2
                    b_sum += b2
                value, b_sum = sum2(value, b_sum)
                if TABOO == 1 and KIND != 0:
                    vt, bt = taboo_divergence(
                        slots, NT, shift, unit, m, inv_T, per_T, log_sum_T + log_inside, per_inside,
                        jsd_beta, MODE, KIND, TB,
                    )  # fmt: skip
                    value += vt
                    b_sum += bt
                if TAIL == 0:
                    tail_alive = tl.where(rest_T >= FLOOR, 1.0, 0.0)
                    log_tail = tl.log(tl.maximum(rest_T, FLOOR))
                    vt, bt = terms(
                        tl.maximum(1.0 - mass, 0.0), rest_T, log_tail, tail_alive, jsd_beta, KIND
                    )
                    value += vt
                    kappa = b_sum + bt
                    omega = tl.where(bt != 0.0, bt / rest_T, 0.0) - kappa
                elif TAIL == 1:
                    alive = tl.where(inside >= FLOOR, 1.0, 0.0)
                    left = b_sum * (1.0 - alive * inside * per_inside)
                    kappa = b_sum * alive * per_inside + left
                    omega = -left
                else:
                    kappa = b_sum
                    omega = -b_sum

            kd = T * T * value
            kd = tl.where(strategy == 2, ce, tl.where(masked, 0.0, kd))
            loss = alpha * ce + beta * kd
            scale_c = tl.where(strategy == 2, alpha + beta, alpha)
            scale_c = tl.where(has_ce, weight * scale_c * per_item, 0.0)
            scale_d = tl.where((strategy == 2) | masked, 0.0, weight * beta * T * per_item)
            g1 = scale_d * (b1 - kappa * q1)
            if TEACHERS == 2:
                g2 = scale_d * (b2 - kappa * q2)
            dense = scale_d * omega
            taboo_slope = scale_d * kappa

            if HAS_R:
                # R = (1 - JS) KL(p1^T || q): list 1 alone is the support, with taboo ids.
                scale_r = tl.where(
                    (strategy == 0) & (masked == 0), weight * gamma * (1.0 - js), 0.0
                )
                pr = tl.where(ids1 >= 0, alone1 / inclusion1, 0.0)
                mass_r = tl.sum(pr, 0)
                pr = tl.where(reach1, pr, 0.0)
                other2 = tl.where(taboo2, 0.0, q2)  # list 2's own entries are tail here
                inside_r = tl.sum(q1, 0) + tl.sum(q2 - other2, 0) + taboo_T
                rest_r = rest_T + tl.sum(other2, 0)
                left = 0.0
                if SAMPLED:
                    log_plain = tl.log(tl.maximum(alone1, FLOOR))
                    value = tl.sum(tl.where(pr != 0.0, pr * (log_plain - log_q1), 0.0), 0)
                    br = -pr
                    kappa_r = -tl.sum(pr, 0)
                    omega_r = -kappa_r
                else:
                    per_mass_r = 1.0
                    log_inside_r = 0.0
                    if TAIL == 1:
                        per_mass_r = 1.0 / tl.maximum(mass_r, FLOOR)
                        per_inside_r = 1.0 / tl.maximum(inside_r, FLOOR)
                        log_inside_r = tl.log(tl.maximum(inside_r, FLOOR))
                    vr, br = terms(pr * per_mass_r, q1, log_q1 - log_inside_r, 1.0, jsd_beta, 0)
                    value = tl.sum(vr, 0)
                    b_sum = tl.sum(br, 0)
                    if TAIL == 0:
                        alive = tl.where(rest_r >= FLOOR, 1.0, 0.0)
                        log_tail = tl.log(tl.maximum(rest_r, FLOOR))
                        vt, bt = terms(
                            tl.maximum(1.0 - mass_r, 0.0), rest_r, log_tail, alive, jsd_beta, 0
                        )
                        value += vt
                        kappa_r = b_sum + bt
                        omega_r = tl.where(bt != 0.0, bt / rest_r, 0.0) - kappa_r
                    elif TAIL == 1:
                        alive = tl.where(inside_r >= FLOOR, 1.0, 0.0)
                        left = b_sum * (1.0 - alive * inside_r * per_inside_r)
                        kappa_r = b_sum * alive * per_inside_r + left
                        omega_r = -left
                    else:
                        kappa_r = b_sum
                        omega_r = -b_sum
                loss += tl.where((strategy == 0) & (masked == 0), gamma * (1.0 - js) * value, 0.0)
                scale_r = scale_r * inv_T * per_item
                g1 += scale_r * (br - kappa_r * q1)
                g2 += scale_r * q2 * tl.where(taboo2, -kappa_r, omega_r)
                dense += scale_r * omega_r
                taboo_slope += scale_r * kappa_r

            tl.store(loss_ptr + position, weight * loss)
            tl.store(kd_ptr + position, kd)
            tl.store(ce_ptr + position, ce)

            # Second sweep: the whole row, then what was left out.
            if OUT != 2:
                a = dense * per_T
                c = scale_c * per_1
                tl.debug_barrier()
                second_sweep(
                    row, held, V, shift, unit, inv_T, cap, a, c, MODE, SOFTCAP, BLOCK, STAGES,
                    OPAQUE,
                )  # fmt: skip
                tl.debug_barrier()
                behind_gold = -scale_c * others * per_1  # scale_c (q' - 1), without cancellation
                g1 += tl.where(in1, behind_gold, scale_c * n1 * per_1)
                g1 = g1 * slope(z1, cap, SOFTCAP)
                tl.store(row + ids1, g1.to(row.dtype.element_ty), mask=ids1 >= 0)
                if TEACHERS == 2:
                    g2 += tl.where(in2, behind_gold, scale_c * n2 * per_1)
                    g2 = g2 * slope(z2, cap, SOFTCAP)
                    tl.store(row + ids2, g2.to(row.dtype.element_ty), mask=use2)
                g_gold = dense * q_gold * per_T + behind_gold
                g_gold = g_gold * slope(z_gold, cap, SOFTCAP)
                tl.store(row + gold, g_gold.to(row.dtype.element_ty), mask=gold_alone)
                if TABOO == 1:
                    taboo_gradient(
                        row, slots, taboo_ptr, first_taboo, last_taboo, V, shift, unit, m, inv_T,
                        per_T, c, scale_d, taboo_slope, log_sum_T + log_inside, per_inside,
                        jsd_beta, cap, MODE, KIND, SOFTCAP, TB,
                    )  # fmt: skip
            if (TABOO == 1) or (OUT == 2):
                tl.debug_barrier()  # the scratch is used again by the next row
