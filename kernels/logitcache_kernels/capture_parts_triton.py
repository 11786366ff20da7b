"""What the capture kernels share: uniforms, order-preserving keys, inclusion, ranking."""

from __future__ import annotations

import triton
import triton.language as tl

from .uniform import GROUP_STEP, ID_STEP, KEY1_SALT

GROUP_STEP_C = tl.constexpr(GROUP_STEP)
ID_STEP_C = tl.constexpr(ID_STEP)
KEY1_SALT_C = tl.constexpr(KEY1_SALT)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # stands for "no logit here" where an infinity would make a NaN
NO_KEY = tl.constexpr(-(2**63))
PENDING = tl.constexpr(-2)  # count of a row that the careful kernel has still to do
BELOW_ONE = tl.constexpr(1.0 - 2.0**-24)  # the largest inclusion of an entry that is not certain


@triton.jit
def mix(x):
    """Scramble uint32 words as ``uniform.mix`` does."""
    x = x ^ (x >> 16)
    x = x * tl.full((), 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def row_keys(start, position):
    """Give both keys of a position; start is mix(mix(seed_low ^ GROUP_STEP) ^ seed_high)."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key0 = mix(mix(start.to(tl.uint32) ^ low) ^ high)
    return key0, mix(key0 ^ low ^ tl.full((), KEY1_SALT_C, tl.uint32))


@triton.jit
def group_of(ids):
    """Give the number of the group of 32 that each id is in."""
    return (ids >> 12) * 128 + ((ids >> 3) & 127)


@triton.jit
def group_words(key0, group):
    """Give the word that a group's least number is made of."""
    return mix(key0 + group.to(tl.uint32) * tl.full((), GROUP_STEP_C, tl.uint32))


@triton.jit
def least_of_groups(key0, group):
    """Give the least number of each group, ``uniform.least_of_groups``, as int64."""
    root = 1.0 - (group_words(key0, group).to(tl.float64) + 0.5) * 2.0**-32
    for _ in tl.static_range(5):
        root = tl.sqrt(root)
    return ((1.0 - root) * 4294967296.0).to(tl.int64)


@triton.jit
def least_bound(key0, ids):
    """Give a bound from below, without roots, of the least number of the group of each id.

    1 - (1 - x)^(1/32) is at least x / 32.
    """
    return (group_words(key0, group_of(ids)) >> 5).to(tl.int64)


@triton.jit
def drawn(key1, ids, least, inclusion):
    """Say which ids have a number below their inclusion; least: that of each one's group.

    A bound from below of ``least`` gives one of the number: then it says which may be drawn.
    """
    step = tl.full((), ID_STEP_C, tl.uint32)
    holder = mix(key1 - (group_of(ids) + 1).to(tl.uint32) * step) >> 27
    member = ((ids >> 10) & 3) * 8 + (ids & 7)
    above = (mix(key1 + ids.to(tl.uint32) * step) >> 1).to(tl.int64)
    above = ((4294967295 - least) * above) >> 31
    number = tl.where(member == holder.to(tl.int32), least, least + 1 + above)
    return number.to(tl.float64) + 0.5 < inclusion.to(tl.float64) * 4294967296.0


@triton.jit
def ordered(x):
    """Map fp32 to int32 so that the order stays."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def inclusion_of(fall, log_1, log_s, inverse_s, min_prob, threshold):
    """Give the sampled estimator's inclusion, 1 where an entry is certain (the top one apart).

    fall: logit minus the largest; log_1, log_s: log sum exp of falls, and of falls / S.
    """
    p = tl.exp(fall - log_1)
    r = tl.maximum(p, tl.exp(fall * inverse_s - log_s))
    certain = (p >= min_prob) | (r >= threshold)
    return tl.where(certain, 1.0, tl.minimum(r / threshold, BELOW_ONE))


@triton.jit
def sort_key(logp, ids):
    """Give int64 keys that fall with falling logp and, among equals, with rising id."""
    return (ordered(logp).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def rank_of(key_ptr, keys, num_keys):
    """Count, for each of keys, the stored keys above it: its place in falling order.

    Eight places behind the stored keys hold NO_KEY.
    """
    rank = tl.zeros_like(keys).to(tl.int32)
    for first in range(0, num_keys, 8):
        for i in tl.static_range(8):
            other = tl.load(key_ptr + first + i)
            rank += (other > keys).to(tl.int32)
    return rank


@triton.jit
def store_padding(
    ids_ptr, logp_ptr, inclusion_ptr, row, kept, K: tl.constexpr, WIDTH: tl.constexpr
):
    """Fill the slots from ``kept`` on."""
    slot = tl.arange(0, WIDTH)
    free = (slot >= kept) & (slot < K)
    tl.store(ids_ptr + row * K + slot, -1, mask=free)
    tl.store(logp_ptr + row * K + slot, float("-inf"), mask=free)
    tl.store(inclusion_ptr + row * K + slot, 0.0, mask=free)


@triton.jit
def store_ranked(ids_ptr, logp_ptr, inclusion_ptr, row, keys, rank, inclusion, K: tl.constexpr):
    """Write entries to the slots of their ranks."""
    bits = (keys >> 32).to(tl.int32)
    logp = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)
    ids = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
    put = (keys != NO_KEY) & (rank < K)
    at = row * K + rank
    tl.store(ids_ptr + at, ids, mask=put)
    tl.store(logp_ptr + at, logp, mask=put)
    tl.store(inclusion_ptr + at, inclusion, mask=put)


@triton.jit
def store_gold(z_row, label_ptr, gold_ptr, row, num_tokens, top, log_1, HAS_LABELS: tl.constexpr):
    """Write the label's logp, NaN where there is none."""
    gold = float("nan")
    if HAS_LABELS:
        label = tl.load(label_ptr + row)
        valid = (label >= 0) & (label < num_tokens)
        z = tl.load(z_row + tl.where(valid, label, 0)).to(tl.float32)
        gold = tl.where(valid, (z - top) - log_1, float("nan"))
    tl.store(gold_ptr + row, gold)
