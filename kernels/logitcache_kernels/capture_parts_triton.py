"""What the capture kernels share: uniforms, order-preserving keys, inclusion, ranking."""

from __future__ import annotations

import triton
import triton.language as tl

from .uniform import KEY1_SALT, LOW_STEP, PAIR_STEP

PAIR_STEP_C = tl.constexpr(PAIR_STEP)
LOW_STEP_C = tl.constexpr(LOW_STEP)
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
    """Give both keys of a position; start is mix(mix(seed_low ^ PAIR_STEP) ^ seed_high)."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key0 = mix(mix(start.to(tl.uint32) ^ low) ^ high)
    return key0, mix(key0 ^ low ^ tl.full((), KEY1_SALT_C, tl.uint32))


@triton.jit
def pair_words(key0, pair):
    """Give the word whose halves are the high bits of ids 2 * pair and 2 * pair + 1."""
    return mix(key0 + pair.to(tl.uint32) * tl.full((), PAIR_STEP_C, tl.uint32))


@triton.jit
def drawn(key0, key1, ids, inclusion):
    """Say which ids have a uniform number below their inclusion, in the oracle's arithmetic."""
    word = pair_words(key0, ids >> 1)
    high = tl.where((ids & 1) == 1, word >> 16, word & 0xFFFF)
    low = mix(key1 + ids.to(tl.uint32) * tl.full((), LOW_STEP_C, tl.uint32)) >> 16
    uniform = ((high << 16) | low).to(tl.float64) + 0.5
    return uniform < inclusion.to(tl.float64) * 4294967296.0


@triton.jit
def ordered(x):
    """Map fp32 to int32 so that the order stays."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def powers(y):
    """Give u^3, u^4, u^6, u^8, u^12, u^24 of u = 2^y: temperatures 4, 3, 2, 1.5, 1, 0.5."""
    u = tl.exp2(y)
    u2 = u * u
    u3 = u2 * u
    u4 = u2 * u2
    u6 = u3 * u3
    u12 = u6 * u6
    return u3, u4, u6, u4 * u4, u12, u12 * u12


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
def rank_of(key_ptr, keys, num_keys, BLOCK: tl.constexpr):
    """Count, for each of keys, the stored keys above it: its place in falling order."""
    rank = tl.zeros_like(keys).to(tl.int32)
    for first in range(0, num_keys, BLOCK):
        other = first + tl.arange(0, BLOCK)
        others = tl.load(key_ptr + other, mask=other < num_keys, other=NO_KEY)
        rank += tl.sum((others[:, None] > keys[None, :]).to(tl.int32), 0)
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
