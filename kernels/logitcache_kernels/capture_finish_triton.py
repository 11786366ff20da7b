"""What follows from the sweep of ``capture_triton``: the support and the statistics of each row.

Small lists per row, hence long chains of short steps: many programs of a few warps hide each other's
waits. A row that this cannot do exactly is left PENDING for ``capture_careful``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .capture_parts_triton import (
    LN2,
    LOG2E,
    LOWEST,
    NO_KEY,
    PENDING,
    drawn,
    inclusion_of,
    ordered,
    powers,
    rank_of,
    row_keys,
    sort_key,
    store_gold,
    store_padding,
    store_ranked,
)
from .capture_sweep_triton import SUMS

# Below this share of the accumulated sum a tail would have lost too many digits to a subtraction.
LEAST_SHARE = tl.constexpr(0.01)


@triton.jit
def _list_segments(
    segment_ptr, score_ptr, list_ptr, num_segments, low, score_bound,
    SAMPLED: tl.constexpr, CHUNK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """List, in order, segments whose maximum is at least ``low`` (ordered), or score the bound."""
    listed = 0
    for base in range(0, num_segments, CHUNK):
        segment = base + tl.arange(0, CHUNK)
        live = segment < num_segments
        hit = live & (
            ordered(tl.load(segment_ptr + segment, mask=live, other=LOWEST).to(tl.float32)) >= low
        )
        if SAMPLED:
            score = tl.load(score_ptr + segment, mask=live, other=LOWEST).to(tl.float32)
            hit = hit | (live & (score >= score_bound))
        slot = listed + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(list_ptr + slot, segment, mask=hit & (slot < CAP))
        listed += tl.sum(hit.to(tl.int32), 0)
    return listed


@triton.jit
def _count_segments(segment_ptr, num_segments, low, CHUNK: tl.constexpr):
    count = tl.zeros([CHUNK], tl.int32)
    for base in range(0, num_segments, CHUNK):
        segment = base + tl.arange(0, CHUNK)
        value = tl.load(segment_ptr + segment, mask=segment < num_segments, other=LOWEST).to(
            tl.float32
        )
        count += ((ordered(value) >= low) & (segment < num_segments)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _other_bound(
    segment_ptr, num_segments, low, count, K: tl.constexpr, CAP: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Move the (ordered) bound until K to CAP segment maxima reach it; give it and their count."""
    nothing = tl.full((), -(2**31) + 1, tl.int32)
    floor = nothing
    high = low
    turn = 0
    while (turn < 32) & ((count < K) | (count > CAP)):
        # Steps down that double, in ordered bits; then halving between too many and too few.
        if count < K:
            high = low
            step = tl.full((), 1, tl.int32) << tl.minimum(turn + 16, 27)
            down = tl.maximum(low, nothing + step) - step
            low = tl.where(floor == nothing, down, floor + (low - floor) // 2)
        else:
            floor = low
            low = low + tl.maximum((high - low) // 2, 1)
        count = _count_segments(segment_ptr, num_segments, low, CHUNK)
        turn += 1
    return low, count


@triton.jit
def _segment_logits(
    z_row, list_ptr, base, listed, num_tokens,
    TURNS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Read the logits of some listed segments again (from L2 or memory), flat, with their ids."""
    SIZE: tl.constexpr = TURNS * VECTOR
    index = base + tl.arange(0, SEGMENTS)
    live = index < listed
    segment = tl.load(list_ptr + index, mask=live, other=0)
    start = (segment // LANES) * (LANES * SIZE) + (segment % LANES) * VECTOR
    item = tl.arange(0, SIZE)
    ids = start[:, None] + ((item // VECTOR) * (LANES * VECTOR) + item % VECTOR)[None, :]
    ids = tl.reshape(ids, [SEGMENTS * SIZE])
    valid = tl.reshape(tl.broadcast_to(live[:, None], [SEGMENTS, SIZE]), [SEGMENTS * SIZE])
    valid = valid & (ids < num_tokens)
    return ids, valid, tl.load(z_row + ids, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _append(z_scratch, id_scratch, found, z, ids, hit, CAP: tl.constexpr):
    slot = found + tl.cumsum(hit.to(tl.int32), 0) - 1
    tl.store(z_scratch + slot, z, mask=hit & (slot < CAP))
    tl.store(id_scratch + slot, ids, mask=hit & (slot < CAP))
    return found + tl.sum(hit.to(tl.int32), 0)


@triton.jit(do_not_specialize=["start", "num_rows"])
def capture_finish(
    z_ptr, stride, label_ptr, position_ptr,
    ids_ptr, logp_ptr, inclusion_ptr, tail_ptr, entropy_ptr, top1_ptr, gold_ptr, count_ptr,
    sums_ptr,
    segment_ptr, score_ptr, list_ptr, candidate_ptr, candidate_id_ptr, key_ptr, chosen_ptr,
    num_rows, num_tokens, num_segments, min_prob, log_min_prob, threshold, log_threshold, start,
    SAMPLED: tl.constexpr, HAS_LABELS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    INVERSE_S: tl.constexpr, TURNS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    CHUNK: tl.constexpr, SEGMENT_CAP: tl.constexpr, CANDIDATE_CAP: tl.constexpr,
):  # fmt: skip
    """Finish every row, or leave its count PENDING. Scratch per program: the lists."""
    SEGMENTS: tl.constexpr = 1024 // (TURNS * VECTOR)
    ITEMS: tl.constexpr = 128
    program = tl.program_id(0)
    list_ptr += program * SEGMENT_CAP
    candidate_ptr += program * CANDIDATE_CAP
    candidate_id_ptr += program * CANDIDATE_CAP
    key_ptr += program * CANDIDATE_CAP
    chosen_ptr += program * CANDIDATE_CAP
    item = tl.arange(0, ITEMS)
    for row32 in range(program, num_rows, tl.num_programs(0)):
        row = tl.full((), 0, tl.int64) + row32
        z_row = z_ptr + row * stride
        key0, key1 = row_keys(start, tl.load(position_ptr + row))
        segments = segment_ptr + row * num_segments
        scores = segments
        if SAMPLED:
            scores = score_ptr + row * num_segments
        sums = sums_ptr + row * SUMS
        a3 = tl.load(sums)
        a4 = tl.load(sums + 1)
        a6 = tl.load(sums + 2)
        a8 = tl.load(sums + 3)
        a12 = tl.load(sums + 4)
        a24 = tl.load(sums + 5)
        h = tl.load(sums + 6)
        top = tl.load(sums + 7)
        clip = tl.load(sums + 8)
        # A NaN anywhere makes a12 NaN, a minus infinity makes h NaN.
        sound = (tl.load(sums + 9) == 1.0) & (a12 == a12) & (h == h)
        sound = sound & (tl.abs(top) < 1e5) & (top > clip)

        # Candidates: everything above the clip; for top-k at least the K largest.
        low = ordered(clip) + 1
        listed = _list_segments(
            segments, scores, list_ptr, num_segments, low, 0.0, False, CHUNK, SEGMENT_CAP
        )
        if not SAMPLED:  # noqa: SIM102 (one is decided when compiling)
            if (listed < K) | (listed > SEGMENT_CAP):
                low, listed = _other_bound(
                    segments, num_segments, low, listed, K, SEGMENT_CAP, CHUNK
                )
                sound = sound & (low <= ordered(clip) + 1) & (listed >= K)
                tl.debug_barrier()
                listed = _list_segments(
                    segments, scores, list_ptr, num_segments, low, 0.0, False, CHUNK, SEGMENT_CAP
                )
        tl.debug_barrier()
        sound = sound & (listed <= SEGMENT_CAP)
        found = 0
        for base in range(0, tl.where(sound, listed, 0), SEGMENTS):
            ids, valid, z = _segment_logits(
                z_row, list_ptr, base, listed, num_tokens, TURNS, LANES, VECTOR, SEGMENTS
            )
            hit = valid & (ordered(z) >= low)
            found = _append(candidate_ptr, candidate_id_ptr, found, z, ids, hit, CANDIDATE_CAP)
        tl.debug_barrier()
        sound = sound & (found <= CANDIDATE_CAP)
        found = tl.where(sound, found, 0)

        # The partition functions over all entries, and the entropy, scaled by the top.
        e_sum = tl.zeros([ITEMS], tl.float32)
        s_sum = tl.zeros([ITEMS], tl.float32)
        x_sum = tl.zeros([ITEMS], tl.float32)
        above = tl.zeros([ITEMS], tl.int32)
        first = tl.full([ITEMS], 0x7FFFFFFF, tl.int32)
        for base in range(0, found, ITEMS):
            live = base + item < found
            z = tl.load(candidate_ptr + base + item, mask=live, other=LOWEST)
            ids = tl.load(candidate_id_ptr + base + item, mask=live, other=0)
            first = tl.minimum(first, tl.where(z == top, ids, 0x7FFFFFFF))
            over = z > clip
            e = tl.where(over, tl.exp(z - top), 0.0)
            e_sum += e
            x_sum += e * (z - top)
            s_sum += tl.where(over, tl.exp((z - top) * INVERSE_S), 0.0)
            above += over.to(tl.int32)
        first = tl.min(first, 0)
        num_above = tl.sum(above, 0).to(tl.float32)
        shift = tl.exp(clip - top)
        below = shift * (a12 - num_above)
        e_total = tl.sum(e_sum, 0) + below
        x_total = tl.sum(x_sum, 0) + below * (clip - top) + shift * h * (12 * LN2)
        log_1 = tl.log(tl.where(sound, e_total, 1.0))
        entropy = log_1 - x_total / tl.where(sound, e_total, 1.0)
        if SAMPLED:
            if INVERSE_S == 1.0:
                a_s = a12
            elif INVERSE_S == 1 / 1.5:
                a_s = a8
            elif INVERSE_S == 0.5:
                a_s = a6
            elif INVERSE_S == 1 / 3:
                a_s = a4
            else:
                a_s = a3
            s_total = tl.sum(s_sum, 0) + tl.exp((clip - top) * INVERSE_S) * (a_s - num_above)
            log_s = tl.log(tl.where(sound, s_total, 1.0))
            # From which logit on an entry may be certain, or have p above p^S: rarely below clip.
            bound = log_1 + tl.minimum(log_min_prob, log_threshold)
            bound = tl.minimum(bound, (log_s + log_threshold) / INVERSE_S)
            if INVERSE_S < 1.0:
                bound = tl.minimum(bound, (log_1 - log_s) / (1.0 - INVERSE_S))
            bound = top + bound
            bound = tl.where(bound > clip + 1e-2, -LOWEST, bound - 1e-2)
            score_bound = (log_threshold + log_s + (top - clip) * INVERSE_S) * LOG2E - 16.0
            # A score is kept in bf16: rounded by at most 2^-9 of itself.
            score_bound = score_bound - 0.01 - tl.abs(score_bound) / 256
            tl.debug_barrier()
            listed = _list_segments(
                segments, scores, list_ptr, num_segments, ordered(bound), score_bound,
                True, CHUNK, SEGMENT_CAP,
            )  # fmt: skip
            tl.debug_barrier()
            sound = sound & (listed <= SEGMENT_CAP)
            for base in range(0, tl.where(sound, listed, 0), SEGMENTS):
                ids, valid, z = _segment_logits(
                    z_row, list_ptr, base, listed, num_tokens, TURNS, LANES, VECTOR, SEGMENTS
                )
                inclusion = inclusion_of(z - top, log_1, log_s, INVERSE_S, min_prob, threshold)
                hit = (inclusion == 1.0) | drawn(key0, key1, ids, inclusion)
                hit = hit & valid & (z <= clip)
                found = _append(candidate_ptr, candidate_id_ptr, found, z, ids, hit, CANDIDATE_CAP)
            tl.debug_barrier()
            sound = sound & (found <= CANDIDATE_CAP)
            found = tl.where(sound, found, 0)

        # Which candidates are kept.
        kept = tl.zeros([ITEMS], tl.int32)
        for base in range(0, found, ITEMS):
            live = base + item < found
            z = tl.load(candidate_ptr + base + item, mask=live, other=LOWEST)
            ids = tl.load(candidate_id_ptr + base + item, mask=live, other=0)
            if SAMPLED:
                inclusion = inclusion_of(z - top, log_1, log_s, INVERSE_S, min_prob, threshold)
                inclusion = tl.where(ids == first, 1.0, inclusion)
                keep = (inclusion == 1.0) | drawn(key0, key1, ids, inclusion)
            else:
                keep = (tl.exp((z - top) - log_1) >= min_prob) | (ids == first)
                inclusion = tl.where(keep, 1.0, 0.0)
            keep = keep & live
            kept += keep.to(tl.int32)
            key = tl.where(keep, sort_key((z - top) - log_1, ids), NO_KEY)
            tl.store(key_ptr + base + item, key, mask=live)
            tl.store(chosen_ptr + base + item, inclusion, mask=live)
        kept = tl.sum(kept, 0)
        tl.debug_barrier()

        # Rank, write, and correct the tail: in by entries above the clip that are not certain, out
        # by certain ones that are below it.
        t3 = tl.zeros([ITEMS], tl.float32)
        t4 = tl.zeros([ITEMS], tl.float32)
        t6 = tl.zeros([ITEMS], tl.float32)
        t8 = tl.zeros([ITEMS], tl.float32)
        t12 = tl.zeros([ITEMS], tl.float32)
        t24 = tl.zeros([ITEMS], tl.float32)
        for base in range(0, found, ITEMS):
            live = base + item < found
            keys = tl.load(key_ptr + base + item, mask=live, other=NO_KEY)
            inclusion = tl.load(chosen_ptr + base + item, mask=live, other=0.0)
            z = tl.load(candidate_ptr + base + item, mask=live, other=LOWEST)
            rank = rank_of(key_ptr, keys, found, 32)
            certain = inclusion == 1.0
            if not SAMPLED:
                certain = certain & (rank < K)
            store_ranked(ids_ptr, logp_ptr, inclusion_ptr, row, keys, rank, inclusion, K)
            over = z > clip
            sign = tl.where(over & ~certain, 1.0, tl.where(~over & certain, -1.0, 0.0))
            used = live & (sign != 0.0)
            u3, u4, u6, u8, u12, u24 = powers(tl.where(used, z - clip, 0.0) * (LOG2E / 12))
            sign = tl.where(used, sign, 0.0)
            t3 += sign * u3
            t4 += sign * u4
            t6 += sign * u6
            t8 += sign * u8
            t12 += sign * u12
            t24 += sign * u24
        a3, t3, g3 = _tail(a3, num_above, t3, (clip - top) - log_1, 1 / 4)
        a4, t4, g4 = _tail(a4, num_above, t4, (clip - top) - log_1, 1 / 3)
        a6, t6, g6 = _tail(a6, num_above, t6, (clip - top) - log_1, 1 / 2)
        a8, t8, g8 = _tail(a8, num_above, t8, (clip - top) - log_1, 1 / 1.5)
        a12, t12, g12 = _tail(a12, num_above, t12, (clip - top) - log_1, 1.0)
        a24, t24, g24 = _tail(a24, num_above, t24, (clip - top) - log_1, 2.0)
        sound = sound & a3 & a4 & a6 & a8 & a12 & a24
        tl.store(tail_ptr + row * 6, g24)
        tl.store(tail_ptr + row * 6 + 1, g12)
        tl.store(tail_ptr + row * 6 + 2, g8)
        tl.store(tail_ptr + row * 6 + 3, g6)
        tl.store(tail_ptr + row * 6 + 4, g4)
        tl.store(tail_ptr + row * 6 + 5, g3)
        tl.store(entropy_ptr + row, entropy)
        tl.store(top1_ptr + row, -log_1)
        store_gold(z_row, label_ptr, gold_ptr, row, num_tokens, top, log_1, HAS_LABELS)
        store_padding(ids_ptr, logp_ptr, inclusion_ptr, row, kept, K, WIDTH)
        if not SAMPLED:
            kept = tl.minimum(kept, K)
        tl.store(count_ptr + row, tl.where(sound, kept, PENDING))
        tl.debug_barrier()


@triton.jit
def _tail(total, num_above, correction, clip_logp, INVERSE_T: tl.constexpr):
    """Give whether the tail is well-conditioned, its sum, and G."""
    tail = total - num_above + tl.sum(correction, 0)
    sound = (tail >= LEAST_SHARE * total) & (tail < -LOWEST)
    return sound, tail, clip_logp * INVERSE_T + tl.log(tl.where(sound, tail, 1.0))
