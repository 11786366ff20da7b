"""The row kernel of ``distill_loss``: divergence, cross entropy and gradient in one pass.

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
These entries are left out of the row's sums (``distill_plan_triton``, which also has what the
teachers give: list, target, sums over it).

A row is cut into C equal slices of at most BLOCK elements; a program holds one in registers from
its one read to its one write, in the logits' own type. In between, the sums of the C slices are
exchanged (``distill_slice_triton``). Programs are persistent and load their next slice before
they wait, so that memory is busy meanwhile.

One exponential u = exp(z / n) gives both exp(z/T) and exp(z) as powers, for T in 1, 1.5, 2, 3, 4.

Bytes moved per row, bf16: 2 V read and 2 V written, the floor; the list 12 K. Not in place: the
slice goes through the gradient's memory once more, mostly in L2, to lose what is left out. Sums
have a fixed order: no atomics, the same bits each run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .distill_plan_triton import (
    GOLD_1,
    GOLD_ID,
    GOLD_LOGIT,
    GOLD_T,
    INSIDE,
    MASS,
    NUMBERS,
    OTHERS,
    R_MASS,
    R_OTHERS,
    R_TAIL_MASS,
    R_VALUE,
    SHIFT,
    TAIL_MASS,
    VALUE,
)
from .distill_slice_triton import (
    load_slice,
    slice_sums,
    store_tile,
    tile_gradient,
    whole_row,
)
from .distill_taboo_triton import taboo_divergence, taboo_gradient, taboo_leave_out
from .distill_terms_triton import FLOOR, powers, slope, tail_slopes, terms
from .gate_triton import LOG2E, sum2


@triton.jit
def _item(item, num_rows, index_ptr, strategy_ptr, C: tl.constexpr, HAS_INDEX: tl.constexpr):
    """Row, position and strategy of an item; past the end the strategy is SKIP."""
    row = (tl.zeros((), tl.int64) + item) // C
    live = row < num_rows
    position = row
    if HAS_INDEX:
        position = tl.load(index_ptr + row, mask=live, other=0).to(tl.int64)
    strategy = tl.load(strategy_ptr + position, mask=live, other=3).to(tl.int32)
    return row, position, strategy


@triton.jit
def rows_kernel(
    x_ptr, work_x_ptr, work_ptr, index_ptr, num_rows, x_stride, work_x_stride, work_stride,
    x_size, x_end,  # elements (of x) in a slice and in a row
    taboo_ptr, taboo_stride, per_item_ptr,
    loss_ptr, strategy_ptr, js_ptr, kd_ptr, ce_ptr, weight_ptr,
    numbers_ptr, list_ids_ptr, list_z_ptr, list_p_ptr, list_r_ptr, slots_ptr, partial_ptr,
    NT, V,
    T, inv_T, unit, alpha, beta, gamma, jsd_beta, cap,
    WIDTH: tl.constexpr,  # of the list
    TB: tl.constexpr, SAMPLED: tl.constexpr,
    TABOO: tl.constexpr, TAIL: tl.constexpr, KIND: tl.constexpr,  # as for the plan
    HAS_R: tl.constexpr, MODE: tl.constexpr, SOFTCAP: tl.constexpr,
    OUT: tl.constexpr,  # 0 in place, 1 gradient elsewhere, 2 no gradient (work: a slice a program)
    HAS_INDEX: tl.constexpr,  # logits row i belongs to position index[i]
    C: tl.constexpr, CP: tl.constexpr,  # slices of a row; the next power of two
    TILES: tl.constexpr, BLOCK: tl.constexpr,  # of a slice; elements (of x) in a tile
    FORMAT: tl.constexpr,  # x has words of 16-bit elements, or elements
    AHEAD: tl.constexpr,  # whether the next slice is loaded early
    OPAQUE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    minus_inf = float("-inf")
    per_item = tl.load(per_item_ptr)
    entry = tl.arange(0, WIDTH)
    size = x_size if FORMAT == 0 else 2 * x_size
    next_row, next_position, next_strategy = _item(
        program, num_rows, index_ptr, strategy_ptr, C, HAS_INDEX
    )
    next_begin = (program % C) * x_size
    if AHEAD:
        # Nothing is read of a position without loss.
        next_left = tl.where(next_strategy != 3, x_end - next_begin, 0)
        next_x = load_slice(
            x_ptr, next_row * x_stride + next_begin, x_size, next_left, TILES, BLOCK, FORMAT
        )
    for item in range(program, num_rows * C, programs):
        row, position, strategy = next_row, next_position, next_strategy
        part = item % C
        x_begin = next_begin
        left = x_end - x_begin
        begin = part * size
        end = tl.minimum(begin + size, V)
        if AHEAD:
            x = next_x
        next_row, next_position, next_strategy = _item(
            item + programs, num_rows, index_ptr, strategy_ptr, C, HAS_INDEX
        )
        next_begin = ((item + programs) % C) * x_size
        if AHEAD:
            next_left = tl.where(next_strategy != 3, x_end - next_begin, 0)
            next_x = load_slice(
                x_ptr, next_row * x_stride + next_begin, x_size, next_left, TILES, BLOCK, FORMAT
            )
        if OUT == 2:
            work_first = program.to(tl.int64) * work_x_stride
            work = work_ptr + program.to(tl.int64) * work_stride - begin
        else:
            work_first = row * work_x_stride + x_begin
            work = work_ptr + row * work_stride

        if strategy == 3:
            if OUT != 2:
                for tile in tl.static_range(TILES):
                    zeros = tl.zeros([BLOCK], work_x_ptr.dtype.element_ty)
                    store_tile(work_x_ptr, work_first, x_size, left, tile, zeros, BLOCK)
        else:
            if AHEAD == 0:
                x = load_slice(
                    x_ptr, row * x_stride + x_begin, x_size, left, TILES, BLOCK, FORMAT
                )
            # The list, and of it what lies in this slice.
            numbers = numbers_ptr + row * NUMBERS
            at_list = row * WIDTH + entry
            ids = tl.load(list_ids_ptr + at_list)
            z = tl.load(list_z_ptr + at_list)
            p = tl.load(list_p_ptr + at_list)
            mine = (ids >= begin) & (ids < end)
            gold = tl.load(numbers + GOLD_ID).to(tl.int32)
            gold_T = tl.load(numbers + GOLD_T)
            gold_alone = gold_T >= 0.0
            gold_mine = gold_alone & (gold >= begin) & (gold < end)
            if TABOO:
                first_taboo = position * taboo_stride
                last_taboo = first_taboo + NT
            if TABOO == 1:
                slots = slots_ptr + row * (tl.cdiv(NT, TB) * TB)
            if OUT != 0:  # a copy that may lose them
                for tile in tl.static_range(TILES):
                    store_tile(work_x_ptr, work_first, x_size, left, tile, x[tile], BLOCK)
                tl.debug_barrier()
                tl.store(work + ids, minus_inf, mask=mine)
                tl.store(work + gold, minus_inf, mask=gold_mine)
                if TABOO:
                    taboo_leave_out(
                        work, begin, end, taboo_ptr, first_taboo, last_taboo, V, TB
                    )
                tl.debug_barrier()
                x = load_slice(work_x_ptr, work_first, x_size, left, TILES, BLOCK, FORMAT)

            shift = tl.load(numbers + SHIFT)
            rest_T, rest_1, m = slice_sums(
                x, shift, unit, inv_T, cap, TILES, FORMAT, MODE, SOFTCAP
            )
            rest_T, rest_1, m = whole_row(
                partial_ptr, row, part, rest_T, rest_1, m, shift, inv_T, C, CP
            )
            # The plan's sums, to the same shift (a factor of 1 nearly always).
            lead = tl.where(shift > minus_inf, shift, 0.0) - m
            plan_T = tl.exp2(lead * (inv_T * LOG2E))
            plan_1 = tl.exp2(lead * LOG2E)
            inside = tl.load(numbers + INSIDE) * plan_T
            others = rest_1 + tl.load(numbers + OTHERS) * plan_1
            alone_T = tl.where(gold_alone, gold_T * plan_T, 0.0)
            sum_T = rest_T + alone_T + inside
            sum_1 = others + tl.load(numbers + GOLD_1) * plan_1
            masked = sum_1 == 0.0  # every logit is -inf: loss 0, gradient 0
            per_T = 1.0 / tl.where(masked, 1.0, sum_T)
            per_1 = 1.0 / tl.where(masked, 1.0, sum_1)
            log_sum_T = tl.log(tl.where(masked, 1.0, sum_T))
            z_gold = tl.load(numbers + GOLD_LOGIT)
            has_ce = (gold >= 0) & (z_gold != minus_inf)
            ce = tl.log(tl.where(masked, 1.0, sum_1)) - (z_gold - m)
            ce = tl.where(has_ce, ce, 0.0)
            tail_q = (rest_T + alone_T) * per_T
            inside = inside * per_T

            # The divergence: value, kappa and omega.
            log_inside = 0.0
            per_inside = 1.0
            if TAIL == 1:
                per_inside = 1.0 / tl.maximum(inside, FLOOR)
                log_inside = tl.log(tl.maximum(inside, FLOOR))
            q, n = powers(z, m * unit, unit, inv_T, MODE)
            q = q * per_T
            if KIND == 0:
                mass = tl.load(numbers + MASS)
                value = tl.load(numbers + VALUE) + mass * (
                    log_sum_T - lead * inv_T + log_inside
                )
                b_sum = -mass
                b = -p
            else:
                reach = (ids >= 0) & (z != minus_inf)
                log_q = tl.where(reach, (z - m) * inv_T - log_sum_T - log_inside, 0.0)
                value, b = terms(p, q * per_inside, log_q, 1.0, jsd_beta, KIND)
                value, b_sum = sum2(value, b)
                if TABOO == 1:
                    vt, bt = taboo_divergence(
                        slots, NT, m * unit, unit, m, inv_T, per_T, log_sum_T + log_inside,
                        per_inside, jsd_beta, MODE, KIND, TB,
                    )  # fmt: skip
                    value += vt
                    b_sum += bt
            vt, kappa, omega = tail_slopes(
                b_sum, tl.load(numbers + TAIL_MASS), tail_q, inside, jsd_beta, TAIL, KIND
            )
            kd = T * T * (value + vt)
            kd = tl.where(strategy == 2, ce, tl.where(masked, 0.0, kd))
            loss = alpha * ce + beta * kd
            weight = tl.load(weight_ptr + position)
            scale_c = tl.where(strategy == 2, alpha + beta, alpha)
            scale_c = tl.where(has_ce, weight * scale_c * per_item, 0.0)
            scale_d = tl.where((strategy == 2) | masked, 0.0, weight * beta * T * per_item)
            g = scale_d * (b - kappa * q)
            dense = scale_d * omega
            taboo_slope = scale_d * kappa
            if HAS_R:
                # R = (1 - JS) KL(p1^T || q), for blended positions.
                share = 1.0 - tl.load(js_ptr + position)
                share = tl.where((strategy == 0) & (masked == 0), gamma * share, 0.0)
                others_r = tl.load(numbers + R_OTHERS) * (plan_T * per_T)
                inside_r = inside - others_r
                log_inside_r = 0.0
                if TAIL == 1:
                    log_inside_r = tl.log(tl.maximum(inside_r, FLOOR))
                mass_r = tl.load(numbers + R_MASS)
                value = tl.load(numbers + R_VALUE) + mass_r * (
                    log_sum_T - lead * inv_T + log_inside_r
                )
                vt, kappa_r, omega_r = tail_slopes(
                    -mass_r, tl.load(numbers + R_TAIL_MASS), tail_q + others_r, inside_r, jsd_beta,
                    TAIL, 0,
                )  # fmt: skip
                loss += share * (value + vt)
                scale_r = weight * share * inv_T * per_item
                pr = tl.load(list_r_ptr + at_list)
                g += scale_r * tl.where(pr < 0.0, omega_r * q, -pr - kappa_r * q)
                dense += scale_r * omega_r
                taboo_slope += scale_r * kappa_r
            if part == 0:
                tl.store(loss_ptr + position, weight * loss)
                tl.store(kd_ptr + position, kd)
                tl.store(ce_ptr + position, ce)

            # The gradient: the whole slice, then what was left out.
            if OUT != 2:
                a = dense * per_T
                c = scale_c * per_1
                for tile in tl.static_range(TILES):
                    dense_x = tile_gradient(
                        x[tile], m, unit, inv_T, cap, a, c, FORMAT, MODE, SOFTCAP, OPAQUE
                    )
                    store_tile(work_x_ptr, work_first, x_size, left, tile, dense_x, BLOCK)
                tl.debug_barrier()
                behind_gold = -scale_c * others * per_1  # scale_c (q' - 1), without cancellation
                g += tl.where(ids == gold, behind_gold, scale_c * n * per_1)
                g = g * slope(z, cap, SOFTCAP)
                tl.store(work + ids, g.to(work_ptr.dtype.element_ty), mask=mine)
                g_gold = dense * alone_T * per_T + behind_gold
                g_gold = g_gold * slope(z_gold, cap, SOFTCAP)
                tl.store(work + gold, g_gold.to(work_ptr.dtype.element_ty), mask=gold_mine)
                if TABOO == 1:
                    taboo_gradient(
                        work, begin, end, slots, taboo_ptr, first_taboo, last_taboo, V, m * unit,
                        unit, m, inv_T, per_T, c, scale_d, taboo_slope, log_sum_T + log_inside,
                        per_inside, jsd_beta, cap, MODE, KIND, SOFTCAP, TB,
                    )  # fmt: skip
            else:
                tl.debug_barrier()  # the scratch is used again by the next item
