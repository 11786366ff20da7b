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

A row is cut into C equal slices; a program holds one in registers from its one read to its one
write, in the logits' own type. Programs are persistent and have two slices at hand: they add up
one and publish its sums, then give the one before, whose row's sums have come in meanwhile, its
gradient (``distill_slice_triton``). All programs run at once (a cooperative launch), each takes its
slices in rising order and publishes before it waits: so every wait ends.

One exponential u = exp(z / n) gives both exp(z/T) and exp(z) as powers, for T in 1, 1.5, 2, 3, 4.

Bytes moved per row, bf16: 2 V read and 2 V written, the floor; the list, 16 K with its ids twice.
Not in place: the slice goes through the gradient's memory once more, mostly in L2, to lose what is
left out. Sums have a fixed order: no atomics, the same bits each run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .distill_plan_triton import (
    AGREEMENT,
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
    WEIGHT,
)
from .distill_slice_triton import (
    lanes,
    load_slice,
    look,
    no_slice,
    publish,
    store_tile,
    tile_gradient,
    total,
    whole_row,
)
from .distill_taboo_triton import taboo_divergence, taboo_gradient, taboo_leave_out
from .distill_terms_triton import FLOOR, powers, slope, tail_slopes, terms
from .gate_triton import LOG2E, sum2


@triton.jit
def _kind(item, num_rows, kind_ptr, C: tl.constexpr):
    """An item's row, and its strategy; past the last it is the last row's, as SKIP."""
    row = ((tl.zeros((), tl.int32) + item) // C).to(tl.int64)
    strategy = tl.load(kind_ptr + row, mask=row < num_rows, other=3).to(tl.int32)
    return tl.minimum(row, num_rows - 1), strategy


@triton.jit
def _list(row, list_ids_ptr, list_z_ptr, list_p_ptr, WIDTH: tl.constexpr):
    """The plan's entries of a row: ids, logits, target."""
    at = row * WIDTH + tl.arange(0, WIDTH)
    return tl.load(list_ids_ptr + at), tl.load(list_z_ptr + at), tl.load(list_p_ptr + at)


@triton.jit
def _left_out(row, list_ids_ptr, numbers_ptr, WIDTH: tl.constexpr):
    """What a row's sums leave out: the list's ids, and gold where it stands in no list (else -1).
    Rubbish of a position without loss."""
    ids = tl.load(list_ids_ptr + row * WIDTH + tl.arange(0, WIDTH))
    gold = tl.load(numbers_ptr + row * NUMBERS + GOLD_ID)
    alone = tl.load(numbers_ptr + row * NUMBERS + GOLD_T)
    return ids, tl.where(alone >= 0.0, gold, -1.0).to(tl.int32)


@triton.jit
def _fetch(
    item, row, strategy, left_out, gold, x_ptr, work_x_ptr, work_ptr, index_ptr, x_stride,
    work_x_stride, work_stride, x_size, x_end, taboo_ptr, taboo_stride, NT, V,
    TB: tl.constexpr, TABOO: tl.constexpr, OUT: tl.constexpr, HAS_INDEX: tl.constexpr,
    C: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """An item's slice, without left_out and gold, which are overwritten in memory."""
    begin = (item % C) * x_size
    left = tl.where(strategy != 3, x_end - begin, 0)  # nothing of a position without loss
    work_x, work = _work(
        work_x_ptr, work_ptr, row, item, work_x_stride, work_stride, x_size, C, OUT, FORMAT
    )
    if OUT != 0:
        # The logits stay: a copy loses what the plan has, and is where the gradient goes.
        x = load_slice(x_ptr + row * x_stride + begin, x_size, left, TILES, BLOCK, FORMAT)
        tl.debug_barrier()  # a scratch is read to its end before it is used again
        for tile in tl.static_range(TILES):
            store_tile(work_x, x_size, left, tile, x[tile], BLOCK)
        tl.debug_barrier()
    # In place: in lines that are read anyway.
    first = begin if FORMAT == 0 else 2 * begin
    last = tl.minimum(first + (x_size if FORMAT == 0 else 2 * x_size), V)
    last = tl.where(strategy != 3, last, 0)
    tl.store(work + left_out, float("-inf"), mask=(left_out >= first) & (left_out < last))
    tl.store(work + gold, float("-inf"), mask=(gold >= first) & (gold < last))
    if TABOO:
        position = _position(row, index_ptr, HAS_INDEX)
        from_taboo = position * taboo_stride
        taboo_leave_out(work, first, last, taboo_ptr, from_taboo, from_taboo + NT, V, TB)
    tl.debug_barrier()
    return load_slice(work_x, x_size, left, TILES, BLOCK, FORMAT)


@triton.jit
def _position(row, index_ptr, HAS_INDEX: tl.constexpr):
    if HAS_INDEX:
        row = tl.load(index_ptr + row).to(tl.int64)
    return row


@triton.jit
def _work(
    work_x_ptr, work_ptr, row, item, work_x_stride, work_stride, x_size, C: tl.constexpr,
    OUT: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Where an item's slice is written, and the first element of its row there."""
    begin = (item % C) * x_size
    if OUT == 2:  # two scratches for each program, in turn
        turn = (item // tl.num_programs(0)) % 2
        slot = (tl.program_id(0) * 2 + turn).to(tl.int64)
        work_x = work_x_ptr + slot * work_x_stride
        work = work_ptr + slot * work_stride - (begin if FORMAT == 0 else 2 * begin)
    else:
        work_x = work_x_ptr + row * work_x_stride + begin
        work = work_ptr + row * work_stride
    return work_x, work


@triton.jit
def rows_kernel(
    x_ptr, work_x_ptr, work_ptr, index_ptr, num_rows, x_stride, work_x_stride, work_stride,
    x_size, x_end,  # elements (of x) in a slice and in a row
    taboo_ptr, taboo_stride, per_item_ptr,
    loss_ptr, kd_ptr, ce_ptr,
    numbers_ptr, kind_ptr, list_ids_ptr, list_z_ptr, list_p_ptr, list_r_ptr, slots_ptr, partial_ptr,
    NT, V,
    T, inv_T, unit, alpha, beta, gamma, jsd_beta, cap,
    WIDTH: tl.constexpr,  # of the list
    TB: tl.constexpr,
    TABOO: tl.constexpr, TAIL: tl.constexpr, KIND: tl.constexpr,  # as for the plan
    HAS_R: tl.constexpr, MODE: tl.constexpr, SOFTCAP: tl.constexpr,
    OUT: tl.constexpr,  # 0 in place, 1 gradient elsewhere, 2 none (work: two slices a program)
    HAS_INDEX: tl.constexpr,  # logits row i belongs to position index[i]
    C: tl.constexpr, CP: tl.constexpr,  # slices of a row; the next power of two
    TILES: tl.constexpr, BLOCK: tl.constexpr,  # of a slice; elements (of x) in a tile
    FORMAT: tl.constexpr,  # x has words of two 16-bit elements, or elements
    OPAQUE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    minus_inf = float("-inf")
    per_item = tl.load(per_item_ptr)
    entry = tl.arange(0, WIDTH)
    size = x_size if FORMAT == 0 else 2 * x_size
    row, strategy = _kind(program, num_rows, kind_ptr, C)
    shift = tl.load(numbers_ptr + row * NUMBERS + SHIFT)
    left_out, gold_out = _left_out(row, list_ids_ptr, numbers_ptr, WIDTH)
    x = _fetch(
        program, row, strategy, left_out, gold_out, x_ptr, work_x_ptr, work_ptr, index_ptr,
        x_stride, work_x_stride, work_stride, x_size, x_end, taboo_ptr, taboo_stride, NT, V,
        TB, TABOO, OUT, HAS_INDEX, C, TILES, BLOCK, FORMAT,
    )  # fmt: skip
    row_next, strategy_next = _kind(program + programs, num_rows, kind_ptr, C)
    left_out, gold_out = _left_out(row_next, list_ids_ptr, numbers_ptr, WIDTH)
    # Values of their own: names that begin as one value would stay one in the loop.
    row_before = tl.zeros((), tl.int64)
    strategy_before = tl.full((), 3, tl.int32)
    shift_before = tl.zeros((), tl.float32)
    x_before = no_slice(x_ptr, TILES, BLOCK)
    ids, z, p = _list(row_before, list_ids_ptr, list_z_ptr, list_p_ptr, WIDTH)
    for item in range(program, num_rows * C + programs, programs):
        # What this slice adds to its row's sums.
        m = tl.where(shift > minus_inf, shift, 0.0)
        acc_T, acc_1 = lanes(x, m, unit, inv_T, cap, TILES, FORMAT, MODE, SOFTCAP)
        # The slice before, whose row's sums have been coming in meanwhile: what it is finished
        # with, on its way during the reduction (rubbish where that position has no loss).
        words = look(partial_ptr, row_before, C, CP)
        numbers = numbers_ptr + row_before * NUMBERS
        gold = tl.load(numbers + GOLD_ID).to(tl.int32)
        gold_T = tl.load(numbers + GOLD_T)
        weight = tl.load(numbers + WEIGHT)
        plan_inside = tl.load(numbers + INSIDE)
        plan_others = tl.load(numbers + OTHERS)
        plan_gold = tl.load(numbers + GOLD_1)
        z_gold = tl.load(numbers + GOLD_LOGIT)
        tail_mass = tl.load(numbers + TAIL_MASS)
        if KIND == 0:
            mass = tl.load(numbers + MASS)
            value = tl.load(numbers + VALUE)
        position = _position(row_before, index_ptr, HAS_INDEX)
        sum_T, sum_1 = total(acc_T, acc_1, MODE)
        if strategy != 3:
            begin = (item % C) * x_size
            source = x_ptr + row * x_stride + begin
            if OUT != 0:
                source, _ = _work(
                    work_x_ptr, work_ptr, row, item, work_x_stride, work_stride, x_size, C,
                    OUT, FORMAT,
                )  # fmt: skip
            publish(
                partial_ptr, row, item % C, sum_T, sum_1, shift, source,
                tl.minimum(x_size, x_end - begin), unit, inv_T, cap, CP, BLOCK, FORMAT, MODE,
                SOFTCAP,
            )  # fmt: skip
        rest_T, rest_1, m = whole_row(
            words, strategy_before != 3, partial_ptr, row_before, shift_before, inv_T, C, CP
        )

        # Now that nothing is waited for any more, all that the next turn needs is asked for. (A
        # processor tells loads apart only roughly: a wait for any of them would be one for all.)
        x_next = _fetch(
            item + programs, row_next, strategy_next, left_out, gold_out, x_ptr, work_x_ptr,
            work_ptr, index_ptr, x_stride, work_x_stride, work_stride, x_size, x_end, taboo_ptr,
            taboo_stride, NT, V, TB, TABOO, OUT, HAS_INDEX, C, TILES, BLOCK, FORMAT,
        )  # fmt: skip
        ids_next, z_next, p_next = _list(row, list_ids_ptr, list_z_ptr, list_p_ptr, WIDTH)
        shift_next = tl.load(numbers_ptr + row_next * NUMBERS + SHIFT)
        row_later, strategy_later = _kind(item + 2 * programs, num_rows, kind_ptr, C)
        left_out, gold_out = _left_out(row_later, list_ids_ptr, numbers_ptr, WIDTH)

        item_before = tl.maximum(item - programs, 0)
        part = item_before % C
        begin = part * size
        end = tl.minimum(begin + size, V)
        left = x_end - part * x_size
        work_x, work = _work(
            work_x_ptr, work_ptr, row_before, item_before, work_x_stride, work_stride, x_size, C,
            OUT, FORMAT,
        )  # fmt: skip
        if strategy_before == 3:
            if (OUT != 2) & (item >= programs):
                for tile in tl.static_range(TILES):
                    zeros = tl.zeros([BLOCK], work_x_ptr.dtype.element_ty)
                    store_tile(work_x, x_size, left, tile, zeros, BLOCK)
        else:
            gold_alone = gold_T >= 0.0
            if TABOO == 1:
                slots = slots_ptr + row_before * (tl.cdiv(NT, TB) * TB)
            # The plan's sums, to the same shift (a factor of 1 nearly always).
            lead = tl.where(shift_before > minus_inf, shift_before, 0.0) - m
            plan_T = tl.exp2(lead * (inv_T * LOG2E))
            plan_1 = tl.exp2(lead * LOG2E)
            inside = plan_inside * plan_T
            others = rest_1 + plan_others * plan_1
            alone_T = tl.where(gold_alone, gold_T * plan_T, 0.0)
            sum_T = rest_T + alone_T + inside
            sum_1 = others + plan_gold * plan_1
            masked = sum_1 == 0.0  # every logit is -inf: loss 0, gradient 0
            per_T = 1.0 / tl.where(masked, 1.0, sum_T)
            per_1 = 1.0 / tl.where(masked, 1.0, sum_1)
            log_sum_T = tl.log(tl.where(masked, 1.0, sum_T))
            has_ce = (gold >= 0) & (z_gold != minus_inf)
            tail_q = (rest_T + alone_T) * per_T
            inside = inside * per_T

            # The divergence: value, kappa and omega.
            log_inside = 0.0
            per_inside = 1.0
            if TAIL == 1:
                per_inside = 1.0 / tl.maximum(inside, FLOOR)
                log_inside = tl.log(tl.maximum(inside, FLOOR))
            log_sum_T += log_inside  # a renormalised student's
            q, n = powers(z, m * unit, unit, inv_T, MODE)
            q = q * per_T
            if KIND == 0:
                value += mass * (log_sum_T - lead * inv_T)
                b_sum = -mass
                b = -p
            else:
                reach = (ids >= 0) & (z != minus_inf)
                log_q = tl.where(reach, (z - m) * inv_T - log_sum_T, 0.0)
                value, b = terms(p, q * per_inside, log_q, 1.0, jsd_beta, KIND)
                value, b_sum = sum2(value, b)
                if TABOO == 1:
                    vt, bt = taboo_divergence(
                        slots, NT, m * unit, unit, m, inv_T, per_T, log_sum_T, per_inside,
                        jsd_beta, MODE, KIND, TB,
                    )  # fmt: skip
                    value += vt
                    b_sum += bt
            vt, kappa, omega = tail_slopes(b_sum, tail_mass, tail_q, inside, jsd_beta, TAIL, KIND)
            value += vt
            scale_c = tl.where(strategy_before == 2, alpha + beta, alpha)
            scale_c = tl.where(has_ce, weight * scale_c * per_item, 0.0)
            scale_d = tl.where((strategy_before == 2) | masked, 0.0, weight * beta * T * per_item)
            g = scale_d * (b - kappa * q)
            dense = scale_d * omega
            taboo_slope = scale_d * kappa
            agree = 0.0
            if HAS_R:
                # R = (1 - JS) KL(p1^T || q), for blended positions.
                share = gamma * tl.load(numbers + AGREEMENT)
                share = tl.where((strategy_before == 0) & (masked == 0), share, 0.0)
                others_r = tl.load(numbers + R_OTHERS) * (plan_T * per_T)
                inside_r = inside - others_r
                log_sum_r = log_sum_T
                if TAIL == 1:
                    log_sum_r += tl.log(tl.maximum(inside_r, FLOOR)) - log_inside
                mass_r = tl.load(numbers + R_MASS)
                agree = tl.load(numbers + R_VALUE) + mass_r * (log_sum_r - lead * inv_T)
                vt, kappa_r, omega_r = tail_slopes(
                    -mass_r, tl.load(numbers + R_TAIL_MASS), tail_q + others_r, inside_r, jsd_beta,
                    TAIL, 0,
                )  # fmt: skip
                agree = share * (agree + vt)
                scale_r = weight * share * inv_T * per_item
                pr = tl.load(list_r_ptr + row_before * WIDTH + entry)
                g += scale_r * tl.where(pr < 0.0, omega_r * q, -pr - kappa_r * q)
                dense += scale_r * omega_r
                taboo_slope += scale_r * kappa_r
            if part == 0:
                ce = tl.log(tl.where(masked, 1.0, sum_1)) - (z_gold - m)
                ce = tl.where(has_ce, ce, 0.0)
                kd = tl.where(strategy_before == 2, ce, tl.where(masked, 0.0, T * T * value))
                tl.store(loss_ptr + position, weight * (alpha * ce + beta * kd + agree))
                tl.store(kd_ptr + position, kd)
                tl.store(ce_ptr + position, ce)
            a = dense * per_T
            c = scale_c * per_1
            # What the sweep below cannot know: the entries that were left out of it.
            behind_gold = -scale_c * others * per_1  # scale_c (q' - 1), without cancellation
            g += tl.where(ids == gold, behind_gold, n * c)
            g = g * slope(z, cap, SOFTCAP)
            g_gold = (a * alone_T + behind_gold) * slope(z_gold, cap, SOFTCAP)
            if OUT != 2:
                for tile in tl.static_range(TILES):
                    dense_x = tile_gradient(
                        x_before[tile], m, unit, inv_T, cap, a, c, FORMAT, MODE, SOFTCAP, OPAQUE
                    )
                    store_tile(work_x, x_size, left, tile, dense_x, BLOCK)
                tl.debug_barrier()
                mine = (ids >= begin) & (ids < end)
                tl.store(work + ids, g.to(work_ptr.dtype.element_ty), mask=mine)
                mine = gold_alone & (gold >= begin) & (gold < end)
                tl.store(work + gold, g_gold.to(work_ptr.dtype.element_ty), mask=mine)
                if TABOO == 1:
                    first = position * taboo_stride
                    taboo_gradient(
                        work, begin, end, slots, taboo_ptr, first, first + NT, V, m * unit, unit,
                        m, inv_T, per_T, c, scale_d, taboo_slope, log_sum_T, per_inside, jsd_beta,
                        cap, MODE, KIND, SOFTCAP, TB,
                    )  # fmt: skip
        row_before, strategy_before, shift_before, x_before = row, strategy, shift, x
        ids, z, p = ids_next, z_next, p_next
        row, strategy, shift, x = row_next, strategy_next, shift_next, x_next
        row_next, strategy_next = row_later, strategy_later
