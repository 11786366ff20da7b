"""Capture of any row, by as many sweeps as it takes: the fallback of ``capture_sweep_triton``.

Per row: one sweep for the largest logit and for NaN and infinities, one for the two partition
functions and the entropy, one to count what is kept; where that is more than K, a binary search
over the ordered bits of the Kth logit, at most 32 sweeps; one sweep to collect (ids in order, so
that among equals the lower ids stay); one for the tail at all temperatures, scaled by the tail's
own maximum. Nothing is ever subtracted, so no distribution is ill-conditioned, and a temperature
may have any value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .capture_parts_triton import (
    NO_KEY,
    PENDING,
    drawn,
    inclusion_of,
    least_of_groups,
    ordered,
    rank_of,
    row_keys,
    sort_key,
    store_gold,
    store_padding,
    store_ranked,
)


@triton.jit
def _inclusion_block(
    z, ids, live, first, top, log_1, log_s, inverse_s, min_prob, threshold, key0, key1,
    SAMPLED: tl.constexpr,
):  # fmt: skip
    """Give inclusion and whether the entry is kept, before any limit to K."""
    if SAMPLED:
        inclusion = inclusion_of(z - top, log_1, log_s, inverse_s, min_prob, threshold)
        inclusion = tl.where(ids == first, 1.0, inclusion)
        # A block is whole runs of 128 pieces of 8 ids, of which each 128 share their groups.
        group = tl.min(ids, 0) // 4096 * 128 + tl.arange(0, 128)
        least = least_of_groups(key0, group)[None, :, None]
        RUNS: tl.constexpr = ids.shape[0] // 1024
        least = tl.reshape(tl.broadcast_to(least, [RUNS, 128, 8]), [RUNS * 1024])
        keep = live & ((inclusion == 1.0) | drawn(key1, ids, least, inclusion))
    else:
        keep = live & ((tl.exp((z - top) - log_1) >= min_prob) | (ids == first))
        inclusion = tl.where(keep, 1.0, 0.0)
    return inclusion, keep


@triton.jit(do_not_specialize=["start", "num_rows"])
def capture_careful(
    z_ptr, stride, label_ptr, position_ptr, temperature_ptr,
    ids_ptr, logp_ptr, inclusion_ptr, tail_ptr, entropy_ptr, top1_ptr, gold_ptr, count_ptr,
    key_ptr, chosen_ptr,
    num_rows, num_tokens, num_temperatures, min_prob, threshold, inverse_s, start,
    SAMPLED: tl.constexpr, HAS_LABELS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    T_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Do the rows whose count is PENDING. Scratch per program: WIDTH keys and inclusions."""
    program = tl.program_id(0)
    key_ptr += program * (WIDTH + 8)
    chosen_ptr += program * WIDTH
    lane = tl.arange(0, BLOCK)
    t_lane = tl.arange(0, T_WIDTH)
    t_live = t_lane < num_temperatures
    inverse_t = 1.0 / tl.load(temperature_ptr + t_lane, mask=t_live, other=1.0)
    for row32 in range(program, num_rows, tl.num_programs(0)):
        row = tl.full((), 0, tl.int64) + row32
        if tl.load(count_ptr + row) == PENDING:
            z_row = z_ptr + row * stride
            top = float("-inf")
            bad = 0
            for base in range(0, num_tokens, BLOCK):
                ids = base + lane
                z = tl.load(z_row + ids, mask=ids < num_tokens, other=float("-inf")).to(tl.float32)
                wrong = (z != z) | (z == float("inf"))
                bad = tl.maximum(bad, tl.max(wrong.to(tl.int32), 0))
                top = tl.maximum(top, tl.max(tl.where(wrong, float("-inf"), z), 0))
            if (bad == 1) | (top == float("-inf")):
                store_padding(ids_ptr, logp_ptr, inclusion_ptr, row, 0, K, WIDTH)
                nan = float("nan")
                tl.store(tail_ptr + row * num_temperatures + t_lane, nan, mask=t_live)
                tl.store(entropy_ptr + row, nan)
                tl.store(top1_ptr + row, nan)
                tl.store(gold_ptr + row, nan)
                tl.store(count_ptr + row, -1)
            else:
                key0, key1 = row_keys(start, tl.load(position_ptr + row))
                # The two partition functions, the entropy, the first of the largest.
                e_sum = tl.zeros([BLOCK], tl.float32)
                s_sum = tl.zeros([BLOCK], tl.float32)
                h_sum = tl.zeros([BLOCK], tl.float32)
                first = num_tokens
                for base in range(0, num_tokens, BLOCK):
                    ids = base + lane
                    live = ids < num_tokens
                    z = tl.load(z_row + ids, mask=live, other=float("-inf")).to(tl.float32)
                    e = tl.exp(z - top)
                    e_sum += e
                    s_sum += tl.exp((z - top) * inverse_s)
                    h_sum += tl.where(e > 0, e * tl.maximum(z - top, -1e4), 0.0)
                    first = tl.minimum(first, tl.min(tl.where(z == top, ids, num_tokens), 0))
                e_total = tl.sum(e_sum, 0)
                log_1 = tl.log(e_total)
                log_s = tl.log(tl.sum(s_sum, 0))
                # What is kept; where that is too much, the Kth largest of it.
                kept = 0
                for base in range(0, num_tokens, BLOCK):
                    ids = base + lane
                    live = ids < num_tokens
                    z = tl.load(z_row + ids, mask=live, other=float("-inf")).to(tl.float32)
                    inclusion, keep = _inclusion_block(
                        z, ids, live, first, top, log_1, log_s, inverse_s, min_prob, threshold,
                        key0, key1, SAMPLED,
                    )  # fmt: skip
                    kept += tl.sum(keep.to(tl.int32), 0)
                low = tl.full((), -(2**31), tl.int64)
                room = K
                if kept > K:
                    high = ordered(top).to(tl.int64) + 1
                    above = 0
                    while (high - low > 1) & (above != K):
                        middle = (low + high) >> 1
                        above = 0
                        for base in range(0, num_tokens, BLOCK):
                            ids = base + lane
                            live = ids < num_tokens
                            z = tl.load(z_row + ids, mask=live, other=float("-inf")).to(tl.float32)
                            inclusion, keep = _inclusion_block(
                                z, ids, live, first, top, log_1, log_s, inverse_s,
                                min_prob, threshold, key0, key1, SAMPLED,
                            )  # fmt: skip
                            keep = keep & (ordered(z).to(tl.int64) >= middle)
                            above += tl.sum(keep.to(tl.int32), 0)
                        low = tl.where(above >= K, middle, low)
                        high = tl.where(above >= K, high, middle)
                    for base in range(0, num_tokens, BLOCK):
                        ids = base + lane
                        live = ids < num_tokens
                        z = tl.load(z_row + ids, mask=live, other=float("-inf")).to(tl.float32)
                        inclusion, keep = _inclusion_block(
                            z, ids, live, first, top, log_1, log_s, inverse_s, min_prob, threshold,
                            key0, key1, SAMPLED,
                        )  # fmt: skip
                        keep = keep & (ordered(z).to(tl.int64) > low)
                        room -= tl.sum(keep.to(tl.int32), 0)
                # Collect, ties with the Kth in order of id while there is room; the tail's maximum.
                tl.debug_barrier()
                chosen = 0
                ties = 0
                last_tie = -1
                tail_top = float("-inf")
                for base in range(0, num_tokens, BLOCK):
                    ids = base + lane
                    live = ids < num_tokens
                    z = tl.load(z_row + ids, mask=live, other=float("-inf")).to(tl.float32)
                    inclusion, keep = _inclusion_block(
                        z, ids, live, first, top, log_1, log_s, inverse_s, min_prob, threshold,
                        key0, key1, SAMPLED,
                    )  # fmt: skip
                    order = ordered(z).to(tl.int64)
                    tie = keep & (order == low)
                    tie_rank = ties + tl.cumsum(tie.to(tl.int32), 0)
                    ties += tl.sum(tie.to(tl.int32), 0)
                    tie = tie & (tie_rank <= room)
                    last_tie = tl.maximum(last_tie, tl.max(tl.where(tie, ids, -1), 0))
                    put = (keep & (order > low)) | tie
                    slot = chosen + tl.cumsum(put.to(tl.int32), 0) - 1
                    chosen += tl.sum(put.to(tl.int32), 0)
                    tl.store(key_ptr + slot, sort_key((z - top) - log_1, ids), mask=put)
                    tl.store(chosen_ptr + slot, inclusion, mask=put)
                    tail = live & (inclusion != 1.0) if SAMPLED else live & ~put
                    tail_top = tl.maximum(tail_top, tl.max(tl.where(tail, z, float("-inf")), 0))
                tail_sum = tl.zeros([T_WIDTH], tl.float32)
                shift = tl.where(tail_top == float("-inf"), 0.0, tail_top)
                for base in range(0, num_tokens, BLOCK):
                    ids = base + lane
                    live = ids < num_tokens
                    z = tl.load(z_row + ids, mask=live, other=float("-inf")).to(tl.float32)
                    if SAMPLED:
                        inclusion = inclusion_of(
                            z - top, log_1, log_s, inverse_s, min_prob, threshold
                        )
                        certain = (inclusion == 1.0) | (ids == first)
                    else:
                        certain = (tl.exp((z - top) - log_1) >= min_prob) | (ids == first)
                        order = ordered(z).to(tl.int64)
                        certain = certain & ((order > low) | ((order == low) & (ids <= last_tie)))
                    below = tl.where(live & ~certain, z - shift, float("-inf"))
                    for t in range(num_temperatures):
                        inverse = tl.sum(tl.where(t_lane == t, inverse_t, 0.0), 0)
                        share = tl.sum(tl.exp(below * inverse), 0)
                        tail_sum += tl.where(t_lane == t, share, 0.0)
                # log 0 is minus infinity: an empty tail. The addition is to logp, hence - log_1.
                partition = ((shift - top) - log_1) * inverse_t + tl.log(
                    tl.maximum(tail_sum, 1e-37)
                )
                partition = tl.where(tail_top == float("-inf"), float("-inf"), partition)
                tl.debug_barrier()
                tl.store(tail_ptr + row * num_temperatures + t_lane, partition, mask=t_live)
                tl.store(entropy_ptr + row, log_1 - tl.sum(h_sum, 0) / e_total)
                tl.store(top1_ptr + row, -log_1)
                tl.store(key_ptr + chosen + tl.arange(0, 8), NO_KEY)
                tl.debug_barrier()
                store_gold(z_row, label_ptr, gold_ptr, row, num_tokens, top, log_1, HAS_LABELS)
                slots = tl.arange(0, WIDTH)
                keys = tl.load(key_ptr + slots, mask=slots < chosen, other=NO_KEY)
                inclusions = tl.load(chosen_ptr + slots, mask=slots < chosen, other=0.0)
                rank = rank_of(key_ptr, keys, chosen)
                store_padding(ids_ptr, logp_ptr, inclusion_ptr, row, chosen, K, WIDTH)
                store_ranked(ids_ptr, logp_ptr, inclusion_ptr, row, keys, rank, inclusions, K)
                tl.store(count_ptr + row, kept if SAMPLED else chosen)
                tl.debug_barrier()
