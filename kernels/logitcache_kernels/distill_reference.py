"""The oracle of the distillation loss: gate, blend, divergence, cross entropy; made to be read.

Per position, with teachers g = 1, 2 (DESIGN section 4):

    p_g^T(v)  = exp(logp_g(v)/T - F_g(T))        on its support; certain entries leave the tail
    JS        = 1/2 KL(p1||m) + 1/2 KL(p2||m)    bits, T = 1, certain entries and one tail bucket
    strategy  = BLENDED if JS < js_threshold, else T1_ONLY if conf_1 > confidence_threshold,
                else GOLD_FALLBACK if there is a gold label, else SKIP
    target    = w1 p1^T + w2 p2^T (BLENDED), p1^T (T1_ONLY)
    l         = w (alpha CE(z, y) [gold] + beta T^2 D(target || softmax(z/T)) + gamma R)
    R         = (1 - JS) KL(p1^T || softmax(z/T)) where JS < js_threshold, else 0

The student enters through lse(z/T), lse(z), its logits at support ids, and the mass outside the
support (summed over the tail itself, so without cancellation). Autograd gives the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .types import (
    BLENDED,
    GOLD_FALLBACK,
    IGNORED_LABEL,
    PROBABILITY_FLOOR,
    SKIP,
    T1_ONLY,
    DistillOutput,
    DistillSpec,
    SparseTeacher,
)


class Gate(NamedTuple):
    """Strategy (int8), JS in bits, blend weights of both teachers, weight of the position."""

    strategy_R: torch.Tensor
    js_R: torch.Tensor
    blend1_R: torch.Tensor
    blend2_R: torch.Tensor
    weight_R: torch.Tensor


def _log(x: torch.Tensor) -> torch.Tensor:
    """Logarithm with its argument held at the floor, gradient zero there."""
    return x.clamp_min(PROBABILITY_FLOOR).log()


def _times(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x * y where 0 times anything is 0, in the value and in the gradient; NaN stays NaN."""
    alive = x != 0
    return torch.where(alive, x * torch.where(alive, y, 0.0), 0.0)


def _scatter(ids_RK: torch.Tensor, values_RK: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Dense R x V tensor of values at ids, 0 elsewhere; ids outside the vocabulary are dropped."""
    inside_RK = (ids_RK >= 0) & (ids_RK < vocab_size)
    dense = values_RK.new_zeros(ids_RK.shape[0], vocab_size + 1)
    dense.scatter_(-1, torch.where(inside_RK, ids_RK, vocab_size).long(), values_RK)
    return dense[:, :vocab_size]


def _lookup(dense_RV: torch.Tensor, ids_RK: torch.Tensor) -> torch.Tensor:
    """Values at ids; entries outside the vocabulary read id 0 and must be masked by the caller."""
    return dense_RV.gather(
        -1, torch.where((ids_RK >= 0) & (ids_RK < dense_RV.shape[1]), ids_RK, 0).long()
    )


class _Teacher:
    """One teacher's support with its masks, in the dtype of the computation."""

    def __init__(self, teacher: SparseTeacher, vocab_size: int, dtype: torch.dtype):
        teacher = SparseTeacher._make(None if x is None else x.detach() for x in teacher)
        self.ids_RK = teacher.ids_RK
        self.valid_RK = (teacher.ids_RK >= 0) & (teacher.ids_RK < vocab_size)
        self.logp_RK = torch.where(self.valid_RK, teacher.logp_RK.to(dtype), -torch.inf)
        self.log_partition_R = teacher.log_partition_R.to(dtype)
        self.entropy_R = None if teacher.entropy_R is None else teacher.entropy_R.to(dtype)
        if teacher.inclusion_RK is None:
            self.inclusion_RK = torch.ones_like(self.logp_RK)
        else:
            self.inclusion_RK = torch.where(self.valid_RK, teacher.inclusion_RK.to(dtype), 1.0)
        self.certain_RK = self.valid_RK & (self.inclusion_RK >= 1.0)
        self.p_RK = torch.where(self.certain_RK, self.logp_RK.exp(), 0.0)  # T = 1, certain

    def confidence(self, kind: str, vocab_size: int) -> torch.Tensor:
        if kind == "top1":
            return torch.where(self.valid_RK, self.logp_RK.exp(), 0.0).amax(-1)
        assert self.entropy_R is not None  # checked with the arguments
        return (1.0 - self.entropy_R / math.log(vocab_size)).clamp(0.0, 1.0)

    def target(self, temperature: float, taboo_RV: torch.Tensor | None) -> torch.Tensor:
        """p^T on the support, 0 at taboo ids and renormalised over what is left."""
        tempered_RK = (self.logp_RK / temperature - self.log_partition_R[:, None]).exp()
        if taboo_RV is None:
            return tempered_RK
        taboo_RK = _lookup(taboo_RV, self.ids_RK)
        lost_R = torch.where(taboo_RK & self.certain_RK, tempered_RK, 0.0).sum(-1)
        left_R1 = (1.0 - lost_R).clamp_min(PROBABILITY_FLOOR)[:, None]
        return torch.where(taboo_RK, 0.0, tempered_RK / left_R1)


def confidence_reference(
    teacher: SparseTeacher, kind: str, vocab_size: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """How sure a teacher is at each position [R], as the gate sees it: kind "top1" or "entropy"."""
    return _Teacher(teacher, vocab_size, dtype).confidence(kind, vocab_size)


def gate_reference(
    teachers: Sequence[SparseTeacher],
    labels_R: torch.Tensor,
    spec: DistillSpec,
    vocab_size: int,
    gold_R: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> Gate:
    """Decide each position's strategy from the teachers alone. gold_R: has a usable gold label."""
    first = _Teacher(teachers[0], vocab_size, dtype)
    valid_R = labels_R != IGNORED_LABEL
    one_R = torch.ones(len(labels_R), dtype=dtype, device=labels_R.device)
    if len(teachers) == 1:
        strategy_R = torch.where(valid_R, T1_ONLY, SKIP).to(torch.int8)
        return Gate(strategy_R, one_R * 0, one_R, one_R * 0, valid_R.to(dtype))

    second = _Teacher(teachers[1], vocab_size, dtype)
    p1_RV = _scatter(first.ids_RK, first.p_RK, vocab_size)
    p2_RV = _scatter(second.ids_RK, second.p_RK, vocab_size)
    mean1_RK = 0.5 * (first.p_RK + _lookup(p2_RV, first.ids_RK))
    mean2_RK = 0.5 * (second.p_RK + _lookup(p1_RV, second.ids_RK))
    tail1_R = (1.0 - first.p_RK.sum(-1)).clamp_min(0.0)
    tail2_R = (1.0 - second.p_RK.sum(-1)).clamp_min(0.0)
    tail_mean_R = 0.5 * (tail1_R + tail2_R)
    js_R = 0.5 * (
        _times(first.p_RK, (first.p_RK / mean1_RK).log2()).sum(-1)
        + _times(second.p_RK, (second.p_RK / mean2_RK).log2()).sum(-1)
        + _times(tail1_R, (tail1_R / tail_mean_R).log2())
        + _times(tail2_R, (tail2_R / tail_mean_R).log2())
    )
    js_R = js_R.clamp(0.0, 1.0)

    conf1_R = first.confidence(spec.confidence, vocab_size)
    conf2_R = second.confidence(spec.confidence, vocab_size)
    total_R = conf1_R + conf2_R
    share1_R = torch.where(total_R > 0, conf1_R / total_R, 0.5)

    strategy_R = torch.where(gold_R, GOLD_FALLBACK, SKIP)
    strategy_R = torch.where(conf1_R > spec.confidence_threshold, T1_ONLY, strategy_R)
    strategy_R = torch.where(js_R < spec.js_threshold, BLENDED, strategy_R)
    strategy_R = torch.where(valid_R, strategy_R, SKIP).to(torch.int8)
    blended_R, alone_R = strategy_R == BLENDED, strategy_R == T1_ONLY
    blend1_R = torch.where(blended_R, share1_R, alone_R.to(dtype))
    blend2_R = torch.where(blended_R, 1.0 - share1_R, 0.0)
    weight_R = torch.where(strategy_R == GOLD_FALLBACK, spec.gold_weight, one_R)
    weight_R = torch.where(strategy_R == SKIP, 0.0, weight_R)
    return Gate(strategy_R, torch.where(valid_R, js_R, 0.0), blend1_R, blend2_R, weight_R)


class _Student:
    """The student's log-probabilities at T, read at ids and summed outside a support."""

    def __init__(self, z_RV: torch.Tensor, temperature: float):
        self.scaled_RV = z_RV / temperature
        self.lse_R = self.scaled_RV.logsumexp(-1)
        self._tempered_RV: torch.Tensor | None = None

    def logq(self, ids_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log softmax(z/T) at ids, and which of them the student can reach (logit not -inf)."""
        logits_RK = _lookup(self.scaled_RV, ids_RK)
        reach_RK = ~torch.isneginf(logits_RK)
        return torch.where(reach_RK, logits_RK, 0.0) - self.lse_R[:, None], reach_RK

    def outside(self, ids_RK: torch.Tensor) -> torch.Tensor:
        """Mass outside the given ids (padding among them is ignored), summed over the tail."""
        if self._tempered_RV is None:
            self._tempered_RV = (self.scaled_RV - self.lse_R[:, None]).exp()
        ones_RK = torch.ones(ids_RK.shape, dtype=torch.bool, device=ids_RK.device)
        support_RV = _scatter(ids_RK, ones_RK, self.scaled_RV.shape[1])
        return self._tempered_RV.masked_fill(support_RV, 0.0).sum(-1)


def _divergence(
    spec: DistillSpec,
    kind: str,
    student: _Student,
    ids_RK: torch.Tensor,
    used_RK: torch.Tensor,
    target_RK: torch.Tensor,
) -> torch.Tensor:
    """D(target || student) over the used ids and, with spec.tail="bucket", all others as one."""
    logq_RK, reach_RK = student.logq(ids_RK)
    reach_RK = reach_RK & used_RK
    logq_RK = torch.where(reach_RK, logq_RK, 0.0)
    q_RK = torch.where(reach_RK, logq_RK.exp(), 0.0)
    target_RK = torch.where(used_RK, target_RK, 0.0)
    mass_R1 = target_RK.sum(-1, keepdim=True)
    if kind == "forward_kl":
        # What a target asks of a token masked in the student (q = 0) cannot be had: that term goes,
        # and the tail does not inherit its mass.
        target_RK = torch.where(reach_RK, target_RK, 0.0)
    terms_q, terms_logq, terms_p = [q_RK], [logq_RK], [target_RK]
    if spec.tail == "renormalise":
        kept_R1 = q_RK.sum(-1, keepdim=True).clamp_min(PROBABILITY_FLOOR)
        terms_p, terms_q = [target_RK / mass_R1.clamp_min(PROBABILITY_FLOOR)], [q_RK / kept_R1]
        terms_logq = [logq_RK - kept_R1.log()]
    elif spec.tail == "bucket":
        outside_R1 = student.outside(torch.where(used_RK, ids_RK, -1))[:, None]
        terms_p.append((1.0 - mass_R1).clamp_min(0.0))
        terms_q.append(outside_R1)
        terms_logq.append(_log(outside_R1))
    p, q, logq = (torch.cat(x, dim=-1) for x in (terms_p, terms_q, terms_logq))
    if kind == "forward_kl":
        return _times(p, _log(p) - logq).sum(-1)
    if kind == "reverse_kl":
        return _times(q, logq - _log(p)).sum(-1)
    mean = spec.jsd_beta * p + (1.0 - spec.jsd_beta) * q
    to_target = _times(p, _log(p) - _log(mean)).sum(-1)
    return spec.jsd_beta * to_target + (1.0 - spec.jsd_beta) * _times(q, logq - _log(mean)).sum(-1)


class _Position:
    """Positions that carry a loss: the student's logits, the teachers, the gate's decision."""

    def __init__(
        self,
        z_RV: torch.Tensor,
        teachers: Sequence[SparseTeacher],
        gate: Gate,
        forbidden_RK: torch.Tensor | None,
        taboo_RV: torch.Tensor | None,
        spec: DistillSpec,
    ):
        self.z_RV, self.gate, self.spec, self.taboo_RV = z_RV, gate, spec, taboo_RV
        self.vocab_size = z_RV.shape[1]
        self.student = _Student(z_RV, spec.temperature)
        self.teachers = [_Teacher(t, self.vocab_size, z_RV.dtype) for t in teachers]
        self.sampled = teachers[0].inclusion_RK is not None
        ids_RK = self.teachers[0].ids_RK
        self.forbidden_RK = ids_RK[:, :0] if forbidden_RK is None else forbidden_RK.to(ids_RK.dtype)

    def cross_entropy(self, labels_R: torch.Tensor, gold_R: torch.Tensor) -> torch.Tensor:
        """CE at T = 1 where there is a gold label that the student can reach, else 0."""
        gold_logit_R = _lookup(self.z_RV, labels_R[:, None])[:, 0]
        gold_R = gold_R & ~torch.isneginf(gold_logit_R)
        lse_R = self.student.lse_R if self.spec.temperature == 1 else self.z_RV.logsumexp(-1)
        return torch.where(gold_R, lse_R - torch.where(gold_R, gold_logit_R, 0.0), 0.0)

    def support(self, with_second: bool) -> tuple[torch.Tensor, ...]:
        """The target's support: ids, which are used, their weight in the target, plain probability.

        Weight and plain probability differ by the inclusion of sampled entries. Teacher 1's
        entries come first, with teacher 2's share of the ids that both keep; then teacher 2's
        others, then taboo ids.
        """
        spec, first = self.spec, self.teachers[0]
        plain_RK = first.target(spec.temperature, self.taboo_RV)
        if with_second:
            plain_RK = self.gate.blend1_R[:, None] * plain_RK
        columns = [(first.ids_RK, first.valid_RK, plain_RK / first.inclusion_RK, plain_RK)]
        listed_RV = _scatter(first.ids_RK, first.valid_RK, self.vocab_size)
        if with_second:
            second = self.teachers[1]
            plain2_RK = self.gate.blend2_R[:, None] * second.target(spec.temperature, self.taboo_RV)
            plain2_RK = torch.where(second.valid_RK, plain2_RK, 0.0)
            weight2_RK = plain2_RK / second.inclusion_RK
            shared = [
                first.valid_RK * _lookup(_scatter(second.ids_RK, x, self.vocab_size), first.ids_RK)
                for x in (weight2_RK, plain2_RK)
            ]
            ids_RK, used_RK, weight_RK, plain_RK = columns[0]
            columns[0] = (ids_RK, used_RK, weight_RK + shared[0], plain_RK + shared[1])
            blended_R1 = (self.gate.strategy_R == BLENDED)[:, None]
            only_RK = second.valid_RK & ~_lookup(listed_RV, second.ids_RK) & blended_R1
            columns.append((second.ids_RK, only_RK, weight2_RK, plain2_RK))
            listed_RV = listed_RV | _scatter(second.ids_RK, only_RK, self.vocab_size)
        inside_RK = (self.forbidden_RK >= 0) & (self.forbidden_RK < self.vocab_size)
        none_RK = torch.zeros(inside_RK.shape, dtype=self.z_RV.dtype, device=self.z_RV.device)
        inside_RK = inside_RK & ~_lookup(listed_RV, self.forbidden_RK)
        columns.append((self.forbidden_RK, inside_RK, none_RK, none_RK))
        return tuple(torch.cat(x, dim=-1) for x in zip(*columns, strict=True))

    def divergence(self, kind: str, with_second: bool) -> torch.Tensor:
        """D of the blended target, or of teacher 1's alone, against the student at T."""
        ids_RK, used_RK, weight_RK, plain_RK = self.support(with_second)
        if not self.sampled:
            return _divergence(self.spec, kind, self.student, ids_RK, used_RK, weight_RK)
        # Sampled: sum q (log target - log student), linear in q, hence unbiased; no bucket.
        logq_RK, reach_RK = self.student.logq(ids_RK)
        used_RK = used_RK & reach_RK
        logq_RK = torch.where(used_RK, logq_RK, 0.0)
        return _times(torch.where(used_RK, weight_RK, 0.0), _log(plain_RK) - logq_RK).sum(-1)


def _taboo_ids(
    num_rows: int,
    device: torch.device,
    taboo_ids: torch.Tensor | None,
    taboo_RK: torch.Tensor | None,
) -> torch.Tensor | None:
    """Taboo ids of each position, padded with -1, each id once per position."""
    parts = [] if taboo_RK is None else [taboo_RK.to(torch.int64)]
    if taboo_ids is not None:
        parts.append(taboo_ids.to(device, torch.int64).expand(num_rows, -1))
    if not parts or sum(part.shape[1] for part in parts) == 0:
        return None
    ids, _ = torch.cat(parts, dim=-1).sort(dim=-1)
    repeated = torch.cat((ids[:, :1] < 0, ids[:, 1:] == ids[:, :-1]), dim=-1)
    return ids.masked_fill(repeated, -1)


def usable_gold(
    labels_R: torch.Tensor,
    gold_R: torch.Tensor | None,
    taboo_RV: torch.Tensor | None,
    vocab_size: int,
) -> torch.Tensor:
    """Which positions have a gold label: in the vocabulary, marked as gold, not taboo."""
    usable_R = (labels_R >= 0) & (labels_R < vocab_size)  # an ignored label is negative
    if gold_R is not None:
        usable_R = usable_R & gold_R.bool()
    if taboo_RV is not None:
        usable_R = usable_R & ~_lookup(taboo_RV, labels_R[:, None])[:, 0]
    return usable_R


def taboo_mask(
    vocab_size: int,
    num_rows: int,
    device: torch.device,
    taboo_ids: torch.Tensor | None,
    taboo_RK: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Taboo ids per position (unique, -1 padded) and the same as a bool R x V mask, if any."""
    ids_RK = _taboo_ids(num_rows, device, taboo_ids, taboo_RK)
    if ids_RK is None:
        return None, None
    return ids_RK, _scatter(ids_RK, torch.ones_like(ids_RK, dtype=torch.bool), vocab_size)


def distill_loss_reference(
    logits_RV: torch.Tensor,
    teachers: Sequence[SparseTeacher],
    labels_R: torch.Tensor,
    spec: DistillSpec,
    *,
    gold_R: torch.Tensor | None = None,
    taboo_ids: torch.Tensor | None = None,
    taboo_RK: torch.Tensor | None = None,
    num_items: torch.Tensor | float | None = None,
) -> DistillOutput:
    """See ``distill_loss``. Computes in float64 for float64 logits, else in float32."""
    dtype = torch.float64 if logits_RV.dtype == torch.float64 else torch.float32
    num_rows, vocab_size = logits_RV.shape
    valid_R = labels_R != IGNORED_LABEL
    if num_items is None:
        num_items = valid_R.sum().clamp_min(1)
    forbidden_RK, taboo_RV = taboo_mask(vocab_size, num_rows, logits_RV.device, taboo_ids, taboo_RK)
    gold_R = usable_gold(labels_R, gold_R, taboo_RV, vocab_size)
    gate = gate_reference(teachers, labels_R, spec, vocab_size, gold_R, dtype)

    # Nothing of an ignored or SKIP position is looked at: a NaN there may not spoil the sum.
    (rows,) = (gate.strategy_R != SKIP).nonzero(as_tuple=True)
    z_RV = logits_RV[rows].to(dtype)
    if taboo_RV is not None and forbidden_RK is not None:
        forbidden_RK, taboo_RV = forbidden_RK[rows], taboo_RV[rows]
        if spec.taboo == "neutral":
            z_RV = z_RV.masked_fill(taboo_RV, -torch.inf)
    masked_R = torch.isneginf(z_RV).all(-1)  # a fully masked row: loss 0, gradient 0, still counted
    position = _Position(
        z_RV.masked_fill(masked_R[:, None], 0.0),
        [SparseTeacher._make(None if x is None else x[rows] for x in t) for t in teachers],
        Gate(*(x[rows] for x in gate)),
        forbidden_RK,
        taboo_RV,
        spec,
    )
    ce_r = position.cross_entropy(labels_R[rows], gold_R[rows] & ~masked_R)
    kd_r = spec.temperature**2 * position.divergence(
        spec.divergence, with_second=len(teachers) == 2
    )
    kd_r = torch.where(position.gate.strategy_R == GOLD_FALLBACK, ce_r, kd_r)
    kd_r = torch.where(masked_R, 0.0, kd_r)
    loss_r = spec.alpha * ce_r + spec.beta * kd_r
    if spec.gamma and len(teachers) == 2:
        agree_r = (position.gate.strategy_R == BLENDED) & ~masked_R
        agreement_r = (1.0 - position.gate.js_R) * position.divergence(
            "forward_kl", with_second=False
        )
        loss_r = loss_r + spec.gamma * torch.where(agree_r, agreement_r, 0.0)
    loss = (position.gate.weight_R * loss_r).sum() / num_items

    zeros_R = torch.zeros(num_rows, dtype=dtype, device=logits_RV.device)
    return DistillOutput(
        loss,
        gate.strategy_R,
        gate.js_R,
        zeros_R.index_copy(0, rows, kd_r.detach()),
        zeros_R.index_copy(0, rows, ce_r.detach()),
        gate.weight_R,
    )
