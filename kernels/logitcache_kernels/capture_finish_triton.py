"""What follows from the sweep of ``capture_triton``: the support and the statistics of each row.

Small lists per row, hence long chains of short steps: many programs of a few warps hide each
other's waits. A row that this cannot do exactly is left PENDING for ``capture_careful``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .capture_lists_triton import (
    list_scores,
    list_words,
    other_bound,
    places,
    read_groups,
    read_row,
    read_segments,
)
from .capture_parts_triton import (
    LN2,
    LOG2E,
    LOWEST,
    NO_KEY,
    PENDING,
    drawn,
    group_of,
    inclusion_of,
    least_bound,
    least_of_groups,
    ordered,
    rank_of,
    row_keys,
    sort_key,
    store_gold,
    store_padding,
    store_ranked,
)
from .capture_sweep_triton import LANES, SUMS

# Below this share of the accumulated sum a tail would have lost too many digits to a subtraction.
LEAST_SHARE = tl.constexpr(0.01)
NUM_T = tl.constexpr(6)  # temperatures of the grid, in the order of the sums


@triton.jit
def _listed_logits(z_row, id_ptr, count, item):
    """Give logits, ids and whether there is one, for places ``item`` of a list."""
    live = item < count
    ids = tl.load(id_ptr + item, mask=live, other=0x7FFFFFFF)
    return tl.load(z_row + ids, mask=live, other=LOWEST).to(tl.float32), ids, live


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


@triton.jit(do_not_specialize=["start", "num_rows"])
def capture_finish(
    z_ptr, stride, label_ptr, position_ptr,
    ids_ptr, logp_ptr, inclusion_ptr, tail_ptr, entropy_ptr, top1_ptr, gold_ptr, count_ptr,
    sums_ptr, bits_ptr, score_ptr,
    list_ptr, candidate_ptr, near_ptr, key_ptr, chosen_ptr,
    num_rows, num_tokens, num_words, num_segments,
    min_prob, log_min_prob, threshold, log_threshold, start,
    SAMPLED: tl.constexpr, HAS_LABELS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    INVERSE_S: tl.constexpr, UNIT: tl.constexpr, LIST_CAP: tl.constexpr, NEAR_CAP: tl.constexpr,
    CANDIDATE_CAP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Finish every row, or leave its count PENDING. Scratch per program: the lists."""
    program = tl.program_id(0)
    list_ptr += program * LIST_CAP
    candidate_ptr += program * CANDIDATE_CAP
    near_ptr += program * NEAR_CAP
    key_ptr += program * (CANDIDATE_CAP + 8)
    chosen_ptr += program * CANDIDATE_CAP
    # One item of each 128 to a thread: see ``capture_lists_triton``.
    item = tl.max_contiguous(tl.arange(0, CANDIDATE_CAP), 1)
    for row32 in range(program, num_rows, tl.num_programs(0)):
        row = tl.full((), 0, tl.int64) + row32
        z_row = z_ptr + row * stride
        key0, key1 = row_keys(start, tl.load(position_ptr + row))
        sums_row = sums_ptr + row * SUMS
        bits_row = bits_ptr + row * num_words
        score_row = score_ptr + row * num_segments
        a12 = tl.load(sums_row + 1)
        h = tl.load(sums_row + 6)
        clip = tl.load(sums_row + 7)
        # A NaN anywhere makes h NaN, an infinity makes it infinite.
        sound = (clip < 1e5) & (tl.abs(h) < 1e30)

        # Candidates: everything above the clip.
        listed = list_words(bits_row, list_ptr, tl.where(sound, num_words, 0), 8, LIST_CAP)
        sound = sound & (listed <= LIST_CAP)
        tl.debug_barrier()
        low = ordered(clip) + 1
        found = read_groups(
            z_row,
            list_ptr,
            tl.where(sound, listed, 0),
            clip,
            num_tokens,
            candidate_ptr,
            CANDIDATE_CAP,
        )
        tl.debug_barrier()
        sound = sound & (found > 0) & (found <= CANDIDATE_CAP)
        found = tl.where(sound, found, 0)

        # The partition functions over all entries, and the entropy, scaled by the top.
        z, ids, live = _listed_logits(z_row, candidate_ptr, found, item)
        top = tl.max(z, 0)
        sound = sound & (top < 1e5)
        top = tl.where(sound, top, clip)
        first = tl.min(tl.where(live & (z == top), ids, 0x7FFFFFFF), 0)
        e = tl.where(live, tl.exp(z - top), 0.0)
        e_above = tl.sum(e, 0)
        x_above = tl.sum(e * tl.maximum(z - top, -200.0), 0)
        y_above = tl.sum(tl.where(live, tl.fma(z, LOG2E / 12, clip * (-LOG2E / 12)), 0.0), 0)
        num_above = found.to(tl.float32)
        shift = tl.exp(clip - top)
        below = shift * (a12 - num_above)
        e_total = e_above + below
        x_total = x_above + below * (clip - top) + shift * (h - y_above) * (12 * LN2)
        log_1 = tl.log(tl.where(sound, e_total, 1.0))
        log_s = 0.0
        entropy = log_1 - x_total / tl.where(sound, e_total, 1.0)

        # Candidates again: for top-k at least K, for the sampled support every certain entry and
        # the drawn ones. Where the clip lay too high for that, the row is read once more.
        if SAMPLED:
            if INVERSE_S == 1.0:
                a_s = a12
            elif INVERSE_S == 1 / 1.5:
                a_s = tl.load(sums_row + 2)
            elif INVERSE_S == 0.5:
                a_s = tl.load(sums_row + 3)
            elif INVERSE_S == 1 / 3:
                a_s = tl.load(sums_row + 4)
            else:
                a_s = tl.load(sums_row + 5)
            s_above = tl.sum(tl.where(live, tl.exp((z - top) * INVERSE_S), 0.0), 0)
            s_total = s_above + tl.exp((clip - top) * INVERSE_S) * (a_s - num_above)
            log_s = tl.log(tl.where(sound, s_total, 1.0))
            bound = log_1 + tl.minimum(log_min_prob, log_threshold)
            bound = top + tl.minimum(bound, (log_s + log_threshold) / INVERSE_S) - 1e-2
            if sound & (bound <= clip):
                low = ordered(bound)
                tl.debug_barrier()
                found = read_row(z_row, low, num_tokens, candidate_ptr, SIZE, CANDIDATE_CAP)
                sound = sound & (found <= CANDIDATE_CAP)
                found = tl.where(sound, found, 0)
            # Up to the clip, r(z) <= max(p, p^S)(clip) e^((z - clip) / S).
            most = (
                tl.maximum((clip - top) - log_1, (clip - top) * INVERSE_S - log_s) - log_threshold
            )
            score_bound = -most * LOG2E
            # A score is kept in bf16: rounded by at most 2^-9 of itself.
            score_bound = score_bound - 0.01 - tl.abs(score_bound) / 256
            num_tiles = tl.where(sound, num_segments // LANES, 0)
            listed = list_scores(score_row, list_ptr, num_tiles, score_bound, LIST_CAP)
            tl.debug_barrier()
            sound = sound & (listed <= LIST_CAP)
            near = read_segments(
                z_row, list_ptr, tl.where(sound, listed, 0), num_tokens, key0, clip,
                top + log_1, top * INVERSE_S + log_s, log_threshold, near_ptr, INVERSE_S, NEAR_CAP,
            )  # fmt: skip
            tl.debug_barrier()
            sound = sound & (near <= NEAR_CAP)
            # Of them, what a lower bound of its number leaves.
            for base in range(0, tl.where(sound, near, 0), CANDIDATE_CAP):
                z_near, near_ids, live = _listed_logits(z_row, near_ptr + base, near - base, item)
                chance = inclusion_of(z_near - top, log_1, log_s, INVERSE_S, min_prob, threshold)
                hit = live & drawn(key1, near_ids, least_bound(key0, near_ids), chance)
                slot, hits = places(hit & (ordered(z_near) < low), CANDIDATE_CAP // LANES)
                put = hit & (ordered(z_near) < low) & (found + slot < CANDIDATE_CAP)
                tl.store(candidate_ptr + found + slot, near_ids, mask=put)
                found += hits
            tl.debug_barrier()
            sound = sound & (found <= CANDIDATE_CAP)
            found = tl.where(sound, found, 0)
        else:
            if sound & (found < K) & (tl.exp((clip - top) - log_1) >= min_prob):
                low, _ = other_bound(z_row, num_tokens, low, found, K, CANDIDATE_CAP, 2 * SIZE)
                tl.debug_barrier()
                found = read_row(z_row, low, num_tokens, candidate_ptr, SIZE, CANDIDATE_CAP)
                tl.debug_barrier()
                sound = sound & (found >= K) & (found <= CANDIDATE_CAP)
                found = tl.where(sound, found, 0)
        z, ids, live = _listed_logits(z_row, candidate_ptr, found, item)
        if not SAMPLED:  # noqa: SIM102 (one is decided when compiling)
            if found > K:
                low = _kth(tl.where(live, ordered(z), -(2**31)), found, low, top, K, UNIT)

        # Keys of the candidates that are kept. The tail changes by what the clipped sums lack,
        # entries above the clip that are not certain, and by certain ones that are in them.
        if SAMPLED:
            inclusion = inclusion_of(z - top, log_1, log_s, INVERSE_S, min_prob, threshold)
            inclusion = tl.where(ids == first, 1.0, inclusion)
            certain = inclusion == 1.0
            keep = live & (certain | drawn(key1, ids, least_bound(key0, ids), inclusion))
        else:
            certain = (tl.exp((z - top) - log_1) >= min_prob) | (ids == first)
            keep = live & certain & (ordered(z) >= low)
            certain = keep
            inclusion = tl.where(keep, 1.0, 0.0)
        slot, kept = places(keep, CANDIDATE_CAP // LANES)
        tl.store(key_ptr + slot, sort_key((z - top) - log_1, ids), mask=keep)
        tl.store(chosen_ptr + slot, inclusion, mask=keep)
        tl.store(key_ptr + kept + tl.arange(0, 8), NO_KEY)
        over = z > clip
        used = live & (over != certain)
        edge = tl.maximum(tl.max(tl.where(used, z, LOWEST), 0), clip)
        sign = tl.where(used, tl.where(over, 1.0, -1.0), 0.0)
        below_edge = tl.where(used, z - edge, 0.0) * LOG2E
        t_lane = tl.arange(0, 8)
        # 1 / T of the grid.
        inverse_t = tl.where(t_lane < 2, 2.0 - t_lane, tl.where(t_lane == 2, 1 / 1.5, 0.5))
        inverse_t = tl.where(t_lane == 4, 1 / 3, tl.where(t_lane == 5, 0.25, inverse_t))
        changes = tl.exp2(below_edge[:, None] * inverse_t[None, :]) * sign[:, None]
        change = tl.sum(changes, 0)
        tl.debug_barrier()

        stored = kept
        if SAMPLED:
            # The few that are left: by their numbers themselves.
            for base in range(0, stored, LANES):
                place = base + tl.arange(0, LANES)
                live_key = place < stored
                key = tl.load(key_ptr + place, mask=live_key, other=NO_KEY)
                chance = tl.load(chosen_ptr + place, mask=live_key, other=1.0)
                key_ids = 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)
                exact = least_of_groups(key0, group_of(key_ids))
                wrong = live_key & (chance < 1.0) & ~drawn(key1, key_ids, exact, chance)
                tl.store(key_ptr + place, NO_KEY, mask=wrong)
                kept -= tl.sum(wrong.to(tl.int32), 0)
            tl.debug_barrier()

        # Rank and write. Top-k: what ties with the Kth but has no room is tail.
        for base in range(0, stored, LANES):
            place = base + tl.arange(0, LANES)
            keys = tl.load(key_ptr + place, mask=place < stored, other=NO_KEY)
            chosen = tl.load(chosen_ptr + place, mask=place < stored, other=0.0)
            rank = rank_of(key_ptr, keys, stored)
            store_ranked(ids_ptr, logp_ptr, inclusion_ptr, row, keys, rank, chosen, K)
        if not SAMPLED:  # noqa: SIM102 (one is decided when compiling)
            if kept > K:
                # They equal the least candidate from the bound on.
                least_z = tl.min(tl.where(live & (ordered(z) >= low), z, -LOWEST), 0)
                ties = (kept - K).to(tl.float32)
                change += ties * tl.exp2((least_z - edge) * LOG2E * inverse_t)
                kept = K
        t_live = t_lane < NUM_T
        total = tl.load(sums_row + t_lane, mask=t_live, other=1.0)
        tail = total - num_above + change * tl.exp((edge - clip) * inverse_t)
        exact = (tail >= LEAST_SHARE * total) & (tail < -LOWEST)
        sound = sound & (tl.min((exact | (t_lane >= NUM_T)).to(tl.int32), 0) == 1)
        g = ((clip - top) - log_1) * inverse_t + tl.log(tl.where(exact, tail, 1.0))
        tl.store(tail_ptr + row * NUM_T + t_lane, g, mask=t_live)
        tl.store(entropy_ptr + row, entropy)
        tl.store(top1_ptr + row, -log_1)
        store_gold(z_row, label_ptr, gold_ptr, row, num_tokens, top, log_1, HAS_LABELS)
        store_padding(ids_ptr, logp_ptr, inclusion_ptr, row, kept, K, WIDTH)
        tl.store(count_ptr + row, tl.where(sound, kept, PENDING))
        tl.debug_barrier()
