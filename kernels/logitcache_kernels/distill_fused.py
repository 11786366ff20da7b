"""``distill_loss`` on the kernels: arguments, custom operators, autograd.

The gradient is made in the forward pass, with the loss, scaled by 1 / num_items.
The backward pass multiplies it by the incoming scalar, which a kernel reads on the device: where it
is 1, that kernel returns at once. That product is made in place, so a second backward pass through
the same loss is refused (by the version counter), as is what saved logits that inplace=True
overwrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .distill_launch import INTERPRETED, Row, add_up, launch, new_diagnostics
from .scalars_triton import count_kernel, scale_kernel
from .types import IGNORED_LABEL, DistillOutput, DistillSpec, SparseTeacher


def taboo_list(
    num_rows: int,
    device: torch.device,
    taboo_ids: torch.Tensor | None,
    taboo_RK: torch.Tensor | None,
) -> torch.Tensor | None:
    """Taboo ids of each position, each once, -1 padded; one expanded row where all are alike."""
    parts = []
    if taboo_ids is not None and taboo_ids.numel():
        parts.append(taboo_ids.to(device, torch.int32)[None])
    if taboo_RK is not None and taboo_RK.shape[1]:
        parts.append(taboo_RK.to(torch.int32))
    if not parts:
        return None
    rows = parts[-1].shape[0] if len(parts) == 1 else num_rows
    ids = torch.cat([part.expand(rows, -1) for part in parts], dim=-1)
    ids = ids.sort(dim=-1).values
    repeated = torch.cat((ids[:, :1] < 0, ids[:, 1:] == ids[:, :-1]), dim=-1)
    return ids.masked_fill(repeated, -1).expand(num_rows, -1)


def _last_contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    if x is None:
        return None
    x = x.detach()
    fine = x.shape[-1] <= 1 or x.stride(-1) == 1
    if x.ndim == 1 or not fine:
        return x.contiguous()
    return x


def prepare(
    teachers: Sequence[SparseTeacher],
    labels_R: torch.Tensor,
    gold_R: torch.Tensor | None,
    taboo_ids: torch.Tensor | None,
    taboo_RK: torch.Tensor | None,
    num_items: torch.Tensor | float | None,
    spec: DistillSpec,
) -> Row:
    """Bring the arguments of a call into the shape that kernels read; nothing waits for the GPU."""
    device = labels_R.device
    labels_R = labels_R.contiguous()
    if num_items is None:
        per_item = one_over_count(labels_R)
    elif isinstance(num_items, torch.Tensor):
        per_item = num_items.detach().to(device, torch.float32).reciprocal()
    else:
        per_item = torch.full((), 1.0 / num_items, dtype=torch.float32, device=device)
    cleaned = tuple(SparseTeacher._make(_last_contiguous(x) for x in t) for t in teachers)
    return Row(
        cleaned,
        labels_R,
        None if gold_R is None else gold_R.to(torch.int8),
        taboo_list(len(labels_R), device, taboo_ids, taboo_RK),
        per_item,
        spec,
    )


# The operators take tensors and numbers only; these two turn a Row into them and back.
_SCHEMA = (
    "Tensor{alias} logits, Tensor?[] teachers, Tensor labels, Tensor? gold, Tensor? taboo, "
    "Tensor per_item, float[] numbers, str[] words"
)
_NUMBERS = ("temperature", "alpha", "beta", "gamma", "jsd_beta", "js_threshold",
            "confidence_threshold", "gold_weight")  # fmt: skip
_WORDS = ("divergence", "confidence", "tail", "taboo")


def _flat(row: Row) -> tuple[Any, ...]:
    tensors = [x for teacher in row.teachers for x in teacher]
    numbers = [float(getattr(row.spec, name)) for name in _NUMBERS]
    words = [getattr(row.spec, name) for name in _WORDS]
    return tensors, row.labels_R, row.gold_R, row.taboo_RK, row.per_item, numbers, words


def _row(tensors, labels_R, gold_R, taboo_RK, per_item, numbers, words) -> Row:
    teachers = tuple(SparseTeacher(*tensors[i : i + 5]) for i in range(0, len(tensors), 5))
    options = dict(zip(_NUMBERS, numbers, strict=True)) | dict(zip(_WORDS, words, strict=True))
    return Row(teachers, labels_R, gold_R, taboo_RK, per_item, DistillSpec(**options))


def _run(
    logits_RV: torch.Tensor, gradient_RV: torch.Tensor | None, flat: tuple[Any, ...]
) -> list[torch.Tensor]:
    """The loss (a scalar), then strategy, JS, KD, CE and weight of each position."""
    row = _row(*flat)
    diagnostics = new_diagnostics(logits_RV.shape[0], logits_RV.device)
    launch(logits_RV, gradient_RV, row, diagnostics)
    return [add_up(diagnostics[0], row.per_item), *diagnostics[1:]]


def _rows_in_place(logits_RV: torch.Tensor, *flat: Any) -> list[torch.Tensor]:
    return _run(logits_RV, logits_RV, flat)


def _rows(logits_RV: torch.Tensor, *flat: Any) -> list[torch.Tensor]:
    gradient_RV = torch.empty(logits_RV.shape, dtype=logits_RV.dtype, device=logits_RV.device)
    return [gradient_RV, *_run(logits_RV, gradient_RV, flat)]


def _rows_value(logits_RV: torch.Tensor, *flat: Any) -> list[torch.Tensor]:
    return _run(logits_RV, None, flat)


def _one_over_count(labels_R: torch.Tensor) -> torch.Tensor:
    per_item = torch.empty((), dtype=torch.float32, device=labels_R.device)
    count_kernel[(1,)](
        labels_R, per_item, len(labels_R), IGNORED=IGNORED_LABEL, BLOCK=8192, num_warps=32
    )
    return per_item


def _scale_in_place(gradient_RV: torch.Tensor, factor: torch.Tensor) -> None:
    if gradient_RV.numel():
        programs = min(gradient_RV.shape[0], 1024)
        scale_kernel[(programs,)](
            gradient_RV, factor, *gradient_RV.shape, gradient_RV.stride(0),
            BLOCK=256 if INTERPRETED else 4096, num_warps=4,
        )  # fmt: skip


distill_rows_in_place = torch.library.custom_op(
    "logitcache::distill_rows_in_place",
    _rows_in_place,
    mutates_args=("logits",),
    schema=f"({_SCHEMA.format(alias='(a!)')}) -> Tensor[]",
)
distill_rows = torch.library.custom_op(
    "logitcache::distill_rows",
    _rows,
    mutates_args=(),
    schema=f"({_SCHEMA.format(alias='')}) -> Tensor[]",
)
distill_rows_value = torch.library.custom_op(
    "logitcache::distill_rows_value",
    _rows_value,
    mutates_args=(),
    schema=f"({_SCHEMA.format(alias='')}) -> Tensor[]",
)
one_over_count = torch.library.custom_op(
    "logitcache::one_over_count",
    _one_over_count,
    mutates_args=(),
    schema="(Tensor labels) -> Tensor",
)
scale_in_place = torch.library.custom_op(
    "logitcache::scale_in_place",
    _scale_in_place,
    mutates_args=("gradient",),
    schema="(Tensor(a!) gradient, Tensor factor) -> ()",
)


def _fake_output(logits: torch.Tensor) -> list[torch.Tensor]:
    diagnostics = new_diagnostics(logits.shape[0], logits.device)
    return [diagnostics[0].new_empty(()), *diagnostics[1:]]


@distill_rows_in_place.register_fake
@distill_rows_value.register_fake
def _(logits, *flat):
    return _fake_output(logits)


@distill_rows.register_fake
def _(logits, *flat):
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return [gradient, *_fake_output(logits)]


@one_over_count.register_fake
def _(labels):
    return torch.empty((), dtype=torch.float32, device=labels.device)


@scale_in_place.register_fake
def _(gradient, factor):
    return None


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_RV, inplace, late_factor, *flat):
        if inplace:
            loss, *diagnostics = distill_rows_in_place(logits_RV, *flat)
            gradient_RV = logits_RV.detach()  # a gradient, and no longer anything's result
        else:
            gradient_RV, loss, *diagnostics = distill_rows(logits_RV, *flat)
        ctx.late = late_factor is not None
        ctx.save_for_backward(gradient_RV, *([late_factor] if ctx.late else []))
        ctx.mark_non_differentiable(*diagnostics)
        ctx.set_materialize_grads(False)  # five tensors of zeros for the diagnostics otherwise
        return (loss * late_factor if ctx.late else loss, *diagnostics)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_unused):
        if grad_loss is None:  # nothing came back
            return (None,) * 10
        gradient_RV, *late_factor = ctx.saved_tensors
        if ctx.late:
            grad_loss = grad_loss * late_factor[0]
        if torch.compiler.is_compiling():
            gradient_RV = gradient_RV * grad_loss.to(gradient_RV.dtype)
        else:
            scale_in_place(gradient_RV, grad_loss)
        return (gradient_RV,) + (None,) * 9


def distill_loss_fused(
    logits_RV: torch.Tensor, row: Row, *, inplace: bool = False
) -> DistillOutput:
    """See ``distill_loss``; logits in float32, bfloat16 or float16."""
    needs_gradient = torch.is_grad_enabled() and logits_RV.requires_grad
    if logits_RV.stride(-1) != 1 and logits_RV.shape[-1] > 1:
        logits_RV = logits_RV.contiguous()
    flat = _flat(row)
    if not needs_gradient:
        return DistillOutput(*distill_rows_value(logits_RV.detach(), *flat))
    # Expanded rows share memory and cannot hold a gradient each; a compiler places buffers itself.
    apart = logits_RV.shape[0] <= 1 or logits_RV.stride(0) >= logits_RV.shape[1]
    inplace = inplace and apart and not torch.compiler.is_compiling()
    # 1 / num_items would push float16 gradients below its range: there it is left to the backward
    # pass, where a loss scaler's factor comes in too.
    late_factor = None
    if logits_RV.dtype == torch.float16:
        late_factor = row.per_item
        flat = _flat(row._replace(per_item=torch.ones_like(row.per_item)))
    return DistillOutput(*_Distill.apply(logits_RV, inplace, late_factor, *flat))
