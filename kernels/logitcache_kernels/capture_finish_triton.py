"""What follows from the sweep of ``capture_triton``: the support and the statistics of each row.

Small lists per row, hence long chains of short steps: many programs of a few warps hide each
other's waits. A row that this cannot do exactly is left PENDING for ``capture_careful``. The
candidates come in an order that may change from run to run: sums over them are taken in integers,
which add up to the same.
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
PER_UNIT = tl.constexpr(2.0**44)  # of the integer sums: 1024 terms of at most 1 fit in 63 bits


@triton.jit
def _total(x):
    """Sum fp32 numbers of at most 1 so that their order does not matter."""
    return tl.sum((x * PER_UNIT).to(tl.int64), 0).to(tl.float32) * (1.0 / PER_UNIT)


@triton.jit
def _append(z_scratch, id_scratch, found, z, ids, hit, CAP: tl.constexpr):
    slot = found + tl.cumsum(hit.to(tl.int32), 0) - 1
    tl.store(z_scratch + slot, z, mask=hit & (slot < CAP))
    tl.store(id_scratch + slot, ids, mask=hit & (slot < CAP))
    return found + tl.sum(hit.to(tl.int32), 0)


@triton.jit
def _read_groups(
    z_row, group_ptr, listed, low, num_tokens, z_scratch, id_scratch,
    VECTOR: tl.constexpr, SIZE: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Read listed groups again, SIZE logits at a time; collect those from ``low`` (ordered) on."""
    found = 0
    for base in range(0, listed * VECTOR, SIZE):
        place = base + tl.arange(0, SIZE)
        first = tl.load(group_ptr + place // VECTOR, mask=place < listed * VECTOR, other=num_tokens)
        ids = first + place % VECTOR
        live = ids < num_tokens
        z = tl.load(z_row + ids, mask=live, other=0.0).to(tl.float32)
        found = _append(z_scratch, id_scratch, found, z, ids, live & (ordered(z) >= low), CAP)
    return found


@triton.jit
def _count_row(z_row, num_tokens, low, SIZE: tl.constexpr):
    count = tl.zeros([SIZE], tl.int32)
    for base in range(0, num_tokens, SIZE):
        ids = base + tl.arange(0, SIZE)
        z = tl.load(z_row + ids, mask=ids < num_tokens, other=0.0).to(tl.float32)
        count += ((ids < num_tokens) & (ordered(z) >= low)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _read_row(
    z_row, low, num_tokens, z_scratch, id_scratch, SIZE: tl.constexpr, CAP: tl.constexpr
):  # fmt: skip
    """Collect the row's logits from ``low`` on: a sweep, for rows whose clip point lay too high."""
    found = 0
    for base in range(0, num_tokens, SIZE):
        ids = base + tl.arange(0, SIZE)
        live = ids < num_tokens
        z = tl.load(z_row + ids, mask=live, other=0.0).to(tl.float32)
        found = _append(z_scratch, id_scratch, found, z, ids, live & (ordered(z) >= low), CAP)
    return found


@triton.jit
def _list_scores(
    score_ptr, list_ptr, num_segments, bound, CHUNK: tl.constexpr, CAP: tl.constexpr
):  # fmt: skip
    """List the segments that score at least the bound."""
    listed = 0
    for base in range(0, num_segments, CHUNK):
        segment = base + tl.arange(0, CHUNK)
        live = segment < num_segments
        score = tl.load(score_ptr + segment, mask=live, other=LOWEST).to(tl.float32)
        hit = live & (score >= bound)
        slot = listed + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(list_ptr + slot, segment, mask=hit & (slot < CAP))
        listed += tl.sum(hit.to(tl.int32), 0)
    return listed


@triton.jit
def _other_bound(
    z_row, num_tokens, low, count, K: tl.constexpr, CAP: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Move the (ordered) bound until K to CAP logits of the row reach it; give it and the count."""
    nothing = tl.full((), -(2**31) + 1, tl.int32)
    floor = nothing
    high = low
    turn = 0
    while (turn < 32) & ((count < K) | (count > CAP)):
        # Steps down that double, in ordered bits; then halving between too many and too few.
        if count < K:
            high = low
            step = tl.full((), 1, tl.int32) << tl.minimum(turn + 19, 27)
            down = tl.maximum(low, nothing + step) - step
            low = tl.where(floor == nothing, down, floor + (low - floor) // 2)
        else:
            floor = low
            low = low + tl.maximum((high - low) // 2, 1)
        count = _count_row(z_row, num_tokens, low, SIZE)
        turn += 1
    return low, count


@triton.jit
def _kth(order, found, low, top, K: tl.constexpr, UNIT: tl.constexpr):
    """Give an ordered bound that the K largest reach, and no more but for ties with the Kth.

    Bisects ordered bits; UNIT of them separate neighbours of the logits' own type.
    """
    # 64 bits: low may be negative and high positive.
    high = ordered(top).to(tl.int64) + 1
    least = low.to(tl.int64)
    count = found
    while (high - least > UNIT) & (count != K):
        middle = (high + least) >> 1
        above = tl.sum((order >= middle.to(tl.int32)).to(tl.int32), 0)
        if above >= K:
            least = middle
            count = above
        else:
            high = middle
    return least.to(tl.int32)


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
def _read_segments(
    z_row, list_ptr, listed, num_tokens, low, z_scratch, id_scratch, found,
    key0, key1, top, log_1, log_s, min_prob, threshold,
    INVERSE_S: tl.constexpr, TURNS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    SEGMENTS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Collect what is drawn of the listed segments below ``low`` (ordered)."""
    for base in range(0, listed, SEGMENTS):
        ids, valid, z = _segment_logits(
            z_row, list_ptr, base, listed, num_tokens, TURNS, LANES, VECTOR, SEGMENTS
        )
        inclusion = inclusion_of(z - top, log_1, log_s, INVERSE_S, min_prob, threshold)
        hit = drawn(key0, key1, ids, inclusion) & valid & (ordered(z) < low)
        found = _append(z_scratch, id_scratch, found, z, ids, hit, CAP)
    return found


@triton.jit(do_not_specialize=["start", "num_rows"])
def capture_finish(
    z_ptr, stride, label_ptr, position_ptr,
    ids_ptr, logp_ptr, inclusion_ptr, tail_ptr, entropy_ptr, top1_ptr, gold_ptr, count_ptr,
    sums_ptr, group_ptr, listed_ptr, score_ptr,
    list_ptr, candidate_ptr, candidate_id_ptr, key_ptr, chosen_ptr,
    num_rows, num_tokens, num_segments, min_prob, log_min_prob, threshold, log_threshold, start,
    SAMPLED: tl.constexpr, HAS_LABELS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    INVERSE_S: tl.constexpr, TURNS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    UNIT: tl.constexpr, GROUP_CAP: tl.constexpr, SEGMENT_CAP: tl.constexpr,
    CANDIDATE_CAP: tl.constexpr, SIZE: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Finish every row, or leave its count PENDING. Scratch per program: the lists."""
    SEGMENTS: tl.constexpr = SIZE // (TURNS * VECTOR)
    program = tl.program_id(0)
    list_ptr += program * SEGMENT_CAP
    candidate_ptr += program * CANDIDATE_CAP
    candidate_id_ptr += program * CANDIDATE_CAP
    key_ptr += program * CANDIDATE_CAP
    chosen_ptr += program * CANDIDATE_CAP
    item = tl.arange(0, CANDIDATE_CAP)
    for row32 in range(program, num_rows, tl.num_programs(0)):
        row = tl.full((), 0, tl.int64) + row32
        z_row = z_ptr + row * stride
        key0, key1 = row_keys(start, tl.load(position_ptr + row))
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
        listed = tl.load(listed_ptr + row)
        # A NaN anywhere makes a12 NaN, a minus infinity makes h NaN.
        sound = (tl.load(sums + 9) == 1.0) & (a12 == a12) & (h == h)
        sound = sound & (tl.abs(top) < 1e5) & (top > clip) & (listed <= GROUP_CAP)

        # Candidates: everything above the clip.
        low = ordered(clip) + 1
        found = _read_groups(
            z_row, group_ptr + row * GROUP_CAP, tl.where(sound, listed, 0), low, num_tokens,
            candidate_ptr, candidate_id_ptr, VECTOR, SIZE, CANDIDATE_CAP,
        )  # fmt: skip
        tl.debug_barrier()
        sound = sound & (found <= CANDIDATE_CAP)
        found = tl.where(sound, found, 0)

        # The partition functions over all entries, and the entropy, scaled by the top.
        live = item < found
        z = tl.load(candidate_ptr + item, mask=live, other=LOWEST)
        ids = tl.load(candidate_id_ptr + item, mask=live, other=0x7FFFFFFF)
        first = tl.min(tl.where(live & (z == top), ids, 0x7FFFFFFF), 0)
        e = tl.where(live, tl.exp(z - top), 0.0)
        e_above = _total(e)
        x_above = _total(e * tl.maximum(z - top, -200.0))
        num_above = found.to(tl.float32)
        shift = tl.exp(clip - top)
        below = shift * (a12 - num_above)
        e_total = e_above + below
        x_total = x_above + below * (clip - top) + shift * h * (12 * LN2)
        log_1 = tl.log(tl.where(sound, e_total, 1.0))
        log_s = 0.0
        entropy = log_1 - x_total / tl.where(sound, e_total, 1.0)

        # Candidates again: for top-k at least K, for the sampled support every certain entry and
        # the drawn ones. Where the clip lay too high for that, the row is read once more.
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
            s_above = _total(tl.where(live, tl.exp((z - top) * INVERSE_S), 0.0))
            s_total = s_above + tl.exp((clip - top) * INVERSE_S) * (a_s - num_above)
            log_s = tl.log(tl.where(sound, s_total, 1.0))
            bound = log_1 + tl.minimum(log_min_prob, log_threshold)
            bound = top + tl.minimum(bound, (log_s + log_threshold) / INVERSE_S) - 1e-2
            if sound & (bound <= clip):
                low = ordered(bound)
                tl.debug_barrier()
                found = _read_row(
                    z_row, low, num_tokens, candidate_ptr, candidate_id_ptr, SIZE, CANDIDATE_CAP
                )
                sound = sound & (found <= CANDIDATE_CAP)
                found = tl.where(sound, found, 0)
            # Up to the clip, r(z) <= max(p, p^S)(clip) e^((z - clip) / S).
            most = tl.maximum((clip - top) - log_1, (clip - top) * INVERSE_S - log_s)
            score_bound = (log_threshold - most) * LOG2E - 16.0
            # A score is kept in bf16: rounded by at most 2^-9 of itself.
            score_bound = score_bound - 0.01 - tl.abs(score_bound) / 256
            listed = _list_scores(
                score_ptr + row * num_segments, list_ptr, num_segments, score_bound,
                SIZE, SEGMENT_CAP,
            )  # fmt: skip
            tl.debug_barrier()
            sound = sound & (listed <= SEGMENT_CAP)
            found = _read_segments(
                z_row, list_ptr, tl.where(sound, listed, 0), num_tokens, low,
                candidate_ptr, candidate_id_ptr, found,
                key0, key1, top, log_1, log_s, min_prob, threshold,
                INVERSE_S, TURNS, LANES, VECTOR, SEGMENTS, CANDIDATE_CAP,
            )  # fmt: skip
            tl.debug_barrier()
            sound = sound & (found <= CANDIDATE_CAP)
            found = tl.where(sound, found, 0)
        else:
            if sound & (found < K) & (tl.exp((clip - top) - log_1) >= min_prob):
                low, _ = _other_bound(z_row, num_tokens, low, found, K, CANDIDATE_CAP, 4 * SIZE)
                tl.debug_barrier()
                found = _read_row(
                    z_row, low, num_tokens, candidate_ptr, candidate_id_ptr, SIZE, CANDIDATE_CAP
                )
                tl.debug_barrier()
                sound = sound & (found >= K) & (found <= CANDIDATE_CAP)
                found = tl.where(sound, found, 0)
        live = item < found
        z = tl.load(candidate_ptr + item, mask=live, other=LOWEST)
        ids = tl.load(candidate_id_ptr + item, mask=live, other=0x7FFFFFFF)
        if not SAMPLED:  # noqa: SIM102 (one is decided when compiling)
            if found > K:
                low = _kth(tl.where(live, ordered(z), -(2**31)), found, low, top, K, UNIT)

        # Keys of the candidates that are kept. The tail changes by what the clipped sums lack,
        # entries above the clip that are not certain, and by certain ones that are in them.
        if SAMPLED:
            inclusion = inclusion_of(z - top, log_1, log_s, INVERSE_S, min_prob, threshold)
            inclusion = tl.where(ids == first, 1.0, inclusion)
            certain = inclusion == 1.0
            keep = live & (certain | drawn(key0, key1, ids, inclusion))
        else:
            certain = (tl.exp((z - top) - log_1) >= min_prob) | (ids == first)
            keep = live & certain & (ordered(z) >= low)
            certain = keep
            inclusion = tl.where(keep, 1.0, 0.0)
        slot = tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(key_ptr + slot, sort_key((z - top) - log_1, ids), mask=keep)
        tl.store(chosen_ptr + slot, inclusion, mask=keep)
        kept = tl.sum(keep.to(tl.int32), 0)
        over = z > clip
        used = live & (over != certain)
        edge = tl.maximum(tl.max(tl.where(used, z, LOWEST), 0), clip)
        sign = tl.where(used, tl.where(over, 1.0, -1.0), 0.0)
        u3, u4, u6, u8, u12, u24 = powers(tl.where(used, z - edge, 0.0) * (LOG2E / 12))
        t3 = _total(sign * u3)
        t4 = _total(sign * u4)
        t6 = _total(sign * u6)
        t8 = _total(sign * u8)
        t12 = _total(sign * u12)
        t24 = _total(sign * u24)
        tl.debug_barrier()

        # Rank and write. Top-k: what ties with the Kth but has no room is tail.
        for base in range(0, kept, ITEMS):
            place = base + tl.arange(0, ITEMS)
            keys = tl.load(key_ptr + place, mask=place < kept, other=NO_KEY)
            chosen = tl.load(chosen_ptr + place, mask=place < kept, other=0.0)
            rank = rank_of(key_ptr, keys, kept, 32)
            store_ranked(ids_ptr, logp_ptr, inclusion_ptr, row, keys, rank, chosen, K)
        if not SAMPLED:  # noqa: SIM102 (one is decided when compiling)
            if kept > K:
                # They equal the least candidate from the bound on.
                least = tl.min(tl.where(live & (ordered(z) >= low), z, -LOWEST), 0)
                ties = (kept - K).to(tl.float32)
                v3, v4, v6, v8, v12, v24 = powers((least - edge) * (LOG2E / 12))
                t3 += ties * v3
                t4 += ties * v4
                t6 += ties * v6
                t8 += ties * v8
                t12 += ties * v12
                t24 += ties * v24
                kept = K
        a3, t3, g3 = _tail(a3, num_above, t3, edge - clip, (clip - top) - log_1, 1 / 4)
        a4, t4, g4 = _tail(a4, num_above, t4, edge - clip, (clip - top) - log_1, 1 / 3)
        a6, t6, g6 = _tail(a6, num_above, t6, edge - clip, (clip - top) - log_1, 1 / 2)
        a8, t8, g8 = _tail(a8, num_above, t8, edge - clip, (clip - top) - log_1, 1 / 1.5)
        a12, t12, g12 = _tail(a12, num_above, t12, edge - clip, (clip - top) - log_1, 1.0)
        a24, t24, g24 = _tail(a24, num_above, t24, edge - clip, (clip - top) - log_1, 2.0)
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
        tl.store(count_ptr + row, tl.where(sound, kept, PENDING))
        tl.debug_barrier()


@triton.jit
def _tail(total, num_above, correction, rise, clip_logp, INVERSE_T: tl.constexpr):
    """Give whether the tail is well-conditioned, its sum, and G."""
    tail = total - num_above + correction * tl.exp(rise * INVERSE_T)
    sound = (tail >= LEAST_SHARE * total) & (tail < -LOWEST)
    return sound, tail, clip_logp * INVERSE_T + tl.log(tl.where(sound, tail, 1.0))
