"""The distillation loss on given logits: checks of its arguments, choice of implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .dispatch import choose_impl
from .distill_reference import distill_loss_reference
from .types import DistillOutput, DistillSpec, SparseTeacher


def check_arguments(
    num_rows: int,
    teachers: Sequence[SparseTeacher],
    labels_R: torch.Tensor,
    spec: DistillSpec,
    gold_R: torch.Tensor | None,
    has_taboo: bool,
) -> None:
    """Refuse what no implementation computes; looks at shapes and options only, never at values."""
    if len(teachers) not in (1, 2):
        raise ValueError(f"teachers: expected one or two SparseTeacher, found {len(teachers)}")
    for name, tensor in (("labels_R", labels_R), ("gold_R", gold_R)):
        if tensor is not None and tensor.shape != (num_rows,):
            raise ValueError(f"{name}: expected shape ({num_rows},), found {tuple(tensor.shape)}")
    for number, teacher in enumerate(teachers, start=1):
        for name, tensor in teacher._asdict().items():
            if tensor is None:
                continue
            shape = tuple(teacher.ids_RK.shape) if name.endswith("_RK") else (num_rows,)
            if tuple(tensor.shape) != shape or shape[0] != num_rows:
                raise ValueError(
                    f"teacher {number}: {name}: expected {num_rows} rows and shape {shape}, "
                    f"found {tuple(tensor.shape)}"
                )
        if spec.confidence == "entropy" and len(teachers) == 2 and teacher.entropy_R is None:
            raise ValueError(f'teacher {number}: confidence="entropy" needs entropy_R')
    sampled = {teacher.inclusion_RK is not None for teacher in teachers}
    if len(sampled) == 2:
        raise ValueError(
            "teachers: one support is sampled (inclusion_RK given) and the other is top-k; "
            "the tail of the second would be lost: capture both with the same estimator"
        )
    if sampled == {True} and spec.divergence != "forward_kl":
        raise ValueError(
            f'divergence="{spec.divergence}" needs a top-k support: a sampled one estimates only '
            'sums that are linear in the target; use "forward_kl", or build with --estimator topk'
        )
    if spec.divergence == "reverse_kl" and has_taboo and spec.taboo == "target":
        raise ValueError(
            'divergence="reverse_kl" with taboo ids is infinite where taboo="target"; '
            'use taboo="neutral"'
        )


def distill_loss(
    logits_RV: torch.Tensor,
    teachers: Sequence[SparseTeacher],
    labels_R: torch.Tensor,
    spec: DistillSpec,
    *,
    gold_R: torch.Tensor | None = None,
    taboo_ids: torch.Tensor | None = None,
    taboo_RK: torch.Tensor | None = None,
    num_items: torch.Tensor | float | None = None,
    inplace: bool = False,
    impl: str = "auto",
) -> DistillOutput:
    """Give the loss of student logits against one or two teachers; see ``distill_reference``.

    logits_RV: floating. teachers: teacher 1 first. labels_R: next tokens, already shifted; -100 is
    ignored. gold_R: bool, which labels are gold (None: all that are not -100). taboo_ids: 1-D ids
    forbidden everywhere; taboo_RK: further ids per position, -1 padded. num_items: what the sum
    over positions is divided by, the number of valid positions of the whole global batch; None
    counts those of this call. inplace: allows an implementation to overwrite logits_RV with its
    gradient. Gradients flow to the logits alone.

    ValueError for shapes or options that do not fit (sampled supports with another divergence than
    forward KL).
    """
    has_taboo = taboo_ids is not None or taboo_RK is not None
    check_arguments(logits_RV.shape[0], teachers, labels_R, spec, gold_R, has_taboo)
    if choose_impl(impl, logits_RV) == "triton":
        from .distill_fused import distill_loss_fused, prepare

        row = prepare(teachers, labels_R, gold_R, taboo_ids, taboo_RK, num_items, spec)
        return distill_loss_fused(logits_RV, row, inplace=inplace)
    return distill_loss_reference(
        logits_RV,
        teachers,
        labels_R,
        spec,
        gold_R=gold_R,
        taboo_ids=taboo_ids,
        taboo_RK=taboo_RK,
        num_items=num_items,
    )
