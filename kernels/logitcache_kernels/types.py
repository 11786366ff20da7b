"""Tensors and options that the kernels take and give.

Shape suffixes used throughout this package: R rows (token positions), K kept entries of one
teacher, V vocabulary, D hidden size, T points of the temperature grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

BLENDED, T1_ONLY, GOLD_FALLBACK, SKIP = 0, 1, 2, 3
STRATEGY_NAMES = ("BLENDED", "T1_ONLY", "GOLD_FALLBACK", "SKIP")
IGNORED_LABEL = -100
TEMPERATURES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
# Below this, a tail or a target probability is a rounding error of fp32 sums (eps 6e-8 times a few
# terms); it is held there inside logarithms and denominators, with zero gradient.
PROBABILITY_FLOOR = 1e-7


class SparseTeacher(NamedTuple):
    """One teacher's distribution at R positions, kept sparsely.

    ids_RK: int32 token ids, unique within a position; -1 (or any id outside the vocabulary) is
        padding.
    logp_RK: floating, natural log under the full vocabulary at temperature 1; -inf at padding.
    log_partition_R: floating, F(T) = log sum_v exp(logp_v / T) at the temperature of the loss;
        F(1) = 0.
    entropy_R: floating, nats at temperature 1; only ``confidence="entropy"`` needs it.
    inclusion_RK: floating in (0, 1], the probability with which the entry was kept; 1 means kept
        for certain. ``None`` says that this is a top-k support: all entries certain, the rest a
        tail bucket.
    """

    ids_RK: torch.Tensor
    logp_RK: torch.Tensor
    log_partition_R: torch.Tensor
    entropy_R: torch.Tensor | None = None
    inclusion_RK: torch.Tensor | None = None


class DistillOutput(NamedTuple):
    """Loss (scalar, differentiable) and diagnostics per position (detached).

    strategy_R: int8, 0 BLENDED, 1 T1_ONLY, 2 GOLD_FALLBACK, 3 SKIP (ignored positions are SKIP).
    js_R: Jensen-Shannon divergence of the teachers in bits.
    kd_R: T^2 * D, the term that beta multiplies (cross entropy where GOLD_FALLBACK).
    ce_R: cross entropy with the gold label in nats; 0 where there is none.
    weight_R: weight of the position, 1, gold_weight or 0. All but loss are 0 at ignored positions.
    """

    loss: torch.Tensor
    strategy_R: torch.Tensor
    js_R: torch.Tensor
    kd_R: torch.Tensor
    ce_R: torch.Tensor
    weight_R: torch.Tensor


class Capture(NamedTuple):
    """What is kept of one teacher's logits at R positions.

    ids_RK: int32, by falling logp, ties by the lower id; -1 is padding.
    logp_RK: floating, natural log at temperature 1; -inf at padding.
    inclusion_RK: floating, 1 for entries kept for certain; 0 at padding.
    tail_log_partition_RT: G(T) = log sum over entries not certain of exp(logp / T); -inf if there
        are none.
    entropy_R: nats. top1_logp_R: largest logp.
    gold_logp_R: logp of the label, NaN where there is none.
    count_R: int32, entries that belong to the support (more than K says that entries were cut off);
        -1 flags a row with NaN, +inf or nothing but -inf: its ids are -1 and its statistics NaN.
    """

    ids_RK: torch.Tensor
    logp_RK: torch.Tensor
    inclusion_RK: torch.Tensor
    tail_log_partition_RT: torch.Tensor
    entropy_R: torch.Tensor
    top1_logp_R: torch.Tensor
    gold_logp_R: torch.Tensor
    count_R: torch.Tensor


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}], found {value!r}")


@dataclass(frozen=True)
class DistillSpec:
    """Gate, blend and loss of one position; the formulas stand in ``distill_reference``.

    temperature: T of the divergence. alpha, beta, gamma: weights of cross entropy, T^2 *
    divergence and the agreement term. jsd_beta: weight of the target in the mixture of
    ``divergence="jsd"``, in (0, 1). js_threshold: bits; below it the teachers are blended.
    confidence_threshold: teacher 1 above it stands alone. confidence: "top1" or "entropy".
    gold_weight: weight of GOLD_FALLBACK positions. tail: what a top-k support does with the rest,
    "bucket", "renormalise" or "none". taboo: "target" pushes the student off taboo ids, "neutral"
    leaves those logits alone.
    """

    temperature: float = 2.0
    alpha: float = 0.1
    beta: float = 0.9
    gamma: float = 0.0
    divergence: str = "forward_kl"
    jsd_beta: float = 0.5
    js_threshold: float = 0.1
    confidence_threshold: float = 0.8
    confidence: str = "top1"
    gold_weight: float = 0.5
    tail: str = "bucket"
    taboo: str = "target"

    def __post_init__(self) -> None:
        _one_of("divergence", self.divergence, ("forward_kl", "reverse_kl", "jsd"))
        _one_of("confidence", self.confidence, ("top1", "entropy"))
        _one_of("tail", self.tail, ("bucket", "renormalise", "none"))
        _one_of("taboo", self.taboo, ("target", "neutral"))
        _within("temperature", self.temperature, 1e-2, 1e2)
        for name in ("alpha", "beta", "gamma", "gold_weight"):
            _within(name, getattr(self, name), 0.0, 1e6)
        # 0 switches BLENDED off; anything above 1 bit blends everywhere.
        _within("js_threshold", self.js_threshold, 0.0, 2.0)
        _within("confidence_threshold", self.confidence_threshold, 0.0, 1.0)
        if not 0.0 < self.jsd_beta < 1.0:
            raise ValueError(
                f"jsd_beta: expected a number above 0 and below 1, found {self.jsd_beta!r}"
            )
