"""The gate on one position, for the Triton kernels: which strategy, which weights.

From the teachers' supports alone, at T = 1 and over certain entries (``distill_reference`` has it
to be read):

    m  = (p1 + p2) / 2 over the union of both supports and one tail bucket
    JS = 1/2 sum p1 log2(p1 / m) + 1/2 sum p2 log2(p2 / m)

The union is never built: list 1 is taken whole, with what teacher 2 gives its ids; of list 2 only
what is not in list 1 remains, and there m = p2 / 2, so each such entry adds p2. Both come from a
K1 x K2 table of equal ids, in slices, once for each list.

Bytes moved per row: (4 + 2 + 2) K of each teacher at most, and 20 of results.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of the table of equal ids. All of it at once takes twice the registers at K = 64: with slices
# twice as many programs hide one another's waits.
_SLICE = tl.constexpr(32)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_ids(ids_ptr, first, last, V, KP: tl.constexpr, PAD: tl.constexpr):
    """Ids at offsets first .. last - 1, KP of them; those outside the vocabulary become PAD < 0."""
    at = tl.arange(0, KP) + first
    ids = tl.load(ids_ptr + at, mask=at < last, other=-1)
    return tl.where((ids >= 0) & (ids < V), ids, PAD).to(tl.int32)


@triton.jit
def load_floats(ptr, first, last, valid, other, KP: tl.constexpr):
    """Values beside ids as float32; `other` where the id is padding."""
    at = tl.arange(0, KP) + first
    values = tl.load(ptr + at, mask=at < last, other=0.0).to(tl.float32)
    return tl.where(valid, values, other)


@triton.jit
def load_teacher(
    ids_ptr, logp_ptr, inclusion_ptr, row, ids_stride, logp_stride, inclusion_stride, K, V,
    KP: tl.constexpr, SAMPLED: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Ids (PAD where padding), logp (-inf there) and inclusion (1 there) of one teacher."""
    first = row * ids_stride
    ids = load_ids(ids_ptr, first, first + K, V, KP, PAD)
    first = row * logp_stride
    logp = load_floats(logp_ptr, first, first + K, ids >= 0, float("-inf"), KP)
    inclusion = tl.full([KP], 1.0, tl.float32)
    if SAMPLED:
        first = row * inclusion_stride
        inclusion = load_floats(inclusion_ptr, first, first + K, ids >= 0, 1.0, KP)
    return ids, logp, inclusion


@triton.jit
def match(
    ids1, ids2, ids1_ptr, ids2_ptr, logp2_ptr, inclusion2_ptr, row,
    ids1_stride, ids2_stride, logp2_stride, inclusion2_stride, K1, K2, V,
    KP: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """Teacher 2 on list 1 (logp, -inf for nothing; inclusion); which of list 2 are in list 1.

    An exclusive or of ids is 0 where they are equal, so a minimum finds them: two instructions a
    pair. Tables are reduced along their first axis, which a thread holds whole: no data moves.
    """
    keys1 = ids1.to(tl.uint32, bitcast=True)
    keys2 = ids2.to(tl.uint32, bitcast=True)
    within = tl.arange(0, _SLICE)
    at2 = tl.full([KP], -1, tl.int32)  # where list 2 has an id of list 1
    for start in range(0, K2, _SLICE):
        first, end = row * ids2_stride + start, row * ids2_stride + K2
        keys = load_ids(ids2_ptr, first, end, V, _SLICE, -2).to(tl.uint32, bitcast=True)
        keys = keys * _SLICE + within.to(tl.uint32)
        nearest = tl.min(keys[:, None] ^ (keys1 * _SLICE)[None, :], 0)
        at2 = tl.where(nearest < _SLICE, start + nearest.to(tl.int32), at2)
    found = at2 >= 0
    first = row * logp2_stride
    logp2_on1 = tl.load(logp2_ptr + first + at2, mask=found, other=float("-inf")).to(tl.float32)
    inclusion2_on1 = tl.full([KP], 1.0, tl.float32)
    if SAMPLED:
        first = row * inclusion2_stride
        inclusion2_on1 = tl.load(inclusion2_ptr + first + at2, mask=found, other=1.0)
        inclusion2_on1 = inclusion2_on1.to(tl.float32)
    nearest = tl.full([KP], 1, tl.uint32)
    for start in range(0, K1, _SLICE):
        first, end = row * ids1_stride + start, row * ids1_stride + K1
        keys = load_ids(ids1_ptr, first, end, V, _SLICE, -1).to(tl.uint32, bitcast=True)
        nearest = tl.minimum(nearest, tl.min(keys[:, None] ^ keys2[None, :], 0))
    repeated2 = (nearest == 0).to(tl.int32)
    return logp2_on1, inclusion2_on1, repeated2


@triton.jit
def _add2(a, b, c, d):
    return a + c, b + d


@triton.jit
def sum2(a, b):
    """Two sums for the latency of one: a reduction across warps costs some 250 cycles."""
    return tl.reduce((a, b), 0, _add2)


@triton.jit
def _max2(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def max2(a, b):
    """Two maxima for the latency of one."""
    return tl.reduce((a, b), 0, _max2)


@triton.jit
def _plog(p, q):
    """p * log2(p / q), 0 where p = 0."""
    ratio = p / tl.where(p != 0.0, q, 1.0)
    return tl.where(p != 0.0, p * tl.log2(tl.where(p != 0.0, ratio, 1.0)), 0.0)


@triton.jit
def certain(logp, inclusion):
    """Probabilities of certain entries, 0 elsewhere."""
    return tl.where(inclusion >= 1.0, tl.exp(logp), 0.0)


@triton.jit
def agreement(logp1, inclusion1, logp2, inclusion2, logp2_on1, inclusion2_on1, repeated2):
    """JS of the teachers in bits."""
    p1 = certain(logp1, inclusion1)
    p2 = certain(logp2, inclusion2)
    p2_on1 = certain(logp2_on1, inclusion2_on1)
    mean = 0.5 * (p1 + p2_on1)
    inside = _plog(p1, mean) + _plog(p2_on1, mean) + tl.where(repeated2 > 0, 0.0, p2)
    inside = tl.sum(inside, 0)
    mass1, mass2 = sum2(p1, p2)
    tail1 = tl.maximum(1.0 - mass1, 0.0)
    tail2 = tl.maximum(1.0 - mass2, 0.0)
    tail_mean = 0.5 * (tail1 + tail2)
    js = 0.5 * (inside + _plog(tail1, tail_mean) + _plog(tail2, tail_mean))
    return tl.minimum(tl.maximum(js, 0.0), 1.0)


@triton.jit
def confidences(logp1, logp2, entropy1_ptr, entropy2_ptr, row, log_V, ENTROPY: tl.constexpr):
    """Of both teachers: top-1 probability, or 1 - H / log V."""
    if ENTROPY:
        first = 1.0 - tl.load(entropy1_ptr + row).to(tl.float32) / log_V
        second = 1.0 - tl.load(entropy2_ptr + row).to(tl.float32) / log_V
        first = tl.minimum(tl.maximum(first, 0.0), 1.0)
        second = tl.minimum(tl.maximum(second, 0.0), 1.0)
    else:
        first, second = max2(logp1, logp2)
        first = tl.exp(first)
        second = tl.exp(second)
    return first, second


@triton.jit
def decide(js, confidence1, confidence2, is_valid, has_gold, js_threshold, confidence_threshold,
           gold_weight):  # fmt: skip
    """Strategy, blend weights of both teachers, weight of the position."""
    total = confidence1 + confidence2
    share1 = tl.where(total > 0.0, confidence1 / tl.where(total > 0.0, total, 1.0), 0.5)
    strategy = tl.where(has_gold, 2, 3)
    strategy = tl.where(confidence1 > confidence_threshold, 1, strategy)
    strategy = tl.where(js < js_threshold, 0, strategy)
    strategy = tl.where(is_valid, strategy, 3)
    blend1 = tl.where(strategy == 0, share1, tl.where(strategy == 1, 1.0, 0.0))
    blend2 = tl.where(strategy == 0, 1.0 - share1, 0.0)
    weight = tl.where(strategy == 2, gold_weight, tl.where(strategy == 3, 0.0, 1.0))
    return strategy, blend1, blend2, weight


@triton.jit
def gold_label(labels_ptr, gold_ptr, taboo_ptr, row, taboo_stride, NT, V,
               HAS_GOLD: tl.constexpr, HAS_TABOO: tl.constexpr, TB: tl.constexpr):  # fmt: skip
    """Whether the label counts at all, and the label itself where it is usable gold, else -9."""
    label = tl.load(labels_ptr + row)
    is_valid = label != -100
    usable = (label >= 0) & (label < V)
    if HAS_GOLD:
        usable = usable & (tl.load(gold_ptr + row) != 0)
    if HAS_TABOO:
        hits = tl.zeros([TB], tl.int32)
        for start in range(0, NT, TB):
            at = row * taboo_stride + start
            ids = load_ids(taboo_ptr, at, row * taboo_stride + NT, V, TB, -3)
            hits = tl.maximum(hits, (ids == label).to(tl.int32))
        usable = usable & (tl.max(hits, 0) == 0)
    return is_valid, tl.where(usable, label, -9).to(tl.int32)
