"""``distill_loss`` on the row kernel: launch, custom operators, autograd.

The gradient is made in the forward pass, in the same launch as the loss, scaled by 1 / num_items.
The backward pass multiplies it by the incoming scalar, which a kernel reads on the device: where it
is 1, that kernel returns at once. That product is made in place, so a second backward pass through
the same loss is refused (by the version counter), as is what saved logits that inplace=True
overwrote.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from .distill_terms_triton import T_1, T_2, T_3, T_3_2, T_4, T_ANY, UNIT
from .distill_triton import distill_kernel
from .scale_triton import scale_kernel
from .types import IGNORED_LABEL, DistillOutput, DistillSpec, SparseTeacher

IN_PLACE, COPY, NO_GRADIENT = 0, 1, 2
_MODES = {1.0: T_1, 1.5: T_3_2, 2.0: T_2, 3.0: T_3, 4.0: T_4}
_DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
_TAILS = {"bucket": 0, "renormalise": 1, "none": 2}
_TABOO_SLICE = 32
INTERPRETED = (
    not hasattr(distill_kernel, "warmup") or type(distill_kernel).__name__ != "JITFunction"
)


class RowConfig(NamedTuple):
    """How a row is swept: elements of a tile, and how programs share the device."""

    block: int
    warps: int
    per_multiprocessor: int
    stages: int = 1
    registers: int | None = None  # at most, a thread


class Row(NamedTuple):
    """What the kernel reads beside the logits; tensors on one device, teachers' rows contiguous."""

    teachers: tuple[SparseTeacher, ...]
    labels_R: torch.Tensor
    gold_R: torch.Tensor | None
    taboo_RK: torch.Tensor | None  # unique ids of each position, -1 padded; its rows may be one
    per_item: torch.Tensor  # float32, 1 / num_items
    spec: DistillSpec


def choose_config(vocab_size: int, element_size: int) -> RowConfig:
    """The fastest of a sweep on an H200 (docs/kernels.md); frozen, as tuning in place corrupts."""
    if INTERPRETED:
        return RowConfig(64, 4, 1)
    if element_size > 2:
        return RowConfig(4096, 8, 2, stages=3, registers=128)
    if vocab_size <= 65536:
        return RowConfig(4096, 4, 5, stages=4, registers=96)
    return RowConfig(16384, 8, 1, stages=4, registers=255)


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
    if num_items is None:
        num_items = (labels_R != IGNORED_LABEL).sum().clamp_min(1)
    if isinstance(num_items, torch.Tensor):
        per_item = num_items.detach().to(device, torch.float32).reciprocal()
    else:
        per_item = torch.full((), 1.0 / num_items, dtype=torch.float32, device=device)
    cleaned = tuple(SparseTeacher._make(_last_contiguous(x) for x in t) for t in teachers)
    return Row(
        cleaned,
        labels_R.contiguous(),
        None if gold_R is None else gold_R.to(torch.int8),
        taboo_list(len(labels_R), device, taboo_ids, taboo_RK),
        per_item,
        spec,
    )


def _stride(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def teacher_arguments(row: Row) -> list[Any]:
    """Pointers and strides of both teachers; teacher 1 stands in for one that is not there."""
    arguments: list[Any] = []
    for teacher in (row.teachers[0], row.teachers[-1]):
        arguments += [
            teacher.ids_RK,
            teacher.logp_RK,
            teacher.inclusion_RK,
            teacher.log_partition_R,
            teacher.entropy_R,
            teacher.ids_RK.stride(0),
            teacher.logp_RK.stride(0),
            _stride(teacher.inclusion_RK),
        ]
    return arguments


def _padded(width: int) -> int:
    # With 32, one warp's worth, the whole kernel was a fifth slower (H200, 2026-11).
    return max(16 if INTERPRETED else 64, triton.next_power_of_2(width))


def gate_constants(row: Row) -> dict[str, Any]:
    """Compile-time arguments that the gate and the row kernel share."""
    return {
        "KP": _padded(max(teacher.ids_RK.shape[1] for teacher in row.teachers)),
        "TB": _TABOO_SLICE,
        "TEACHERS": len(row.teachers),
        "SAMPLED": row.teachers[0].inclusion_RK is not None,
        "ENTROPY": row.spec.confidence == "entropy",
        "HAS_GOLD": row.gold_R is not None,
    }


def launch(
    logits_RV: torch.Tensor,
    work_RV: torch.Tensor,
    row: Row,
    diagnostics: Sequence[torch.Tensor],
    out: int,
    *,
    index_R: torch.Tensor | None = None,
    softcap: float | None = None,
    config: RowConfig | None = None,
) -> None:
    """Run the row kernel over logits_RV, whose row i is position index_R[i] (None: i)."""
    num_rows, vocab_size = logits_RV.shape
    if num_rows == 0:
        return
    spec, device = row.spec, logits_RV.device
    config = config or choose_config(vocab_size, logits_RV.element_size())
    programs = num_programs(num_rows, device, config)
    mode = _MODES.get(spec.temperature, T_ANY)
    num_taboo = 0 if row.taboo_RK is None else row.taboo_RK.shape[1]
    taboo = {"target": 1, "neutral": 2}[spec.taboo] if num_taboo else 0
    slots = None
    if taboo == 1:
        width = triton.cdiv(num_taboo, _TABOO_SLICE) * _TABOO_SLICE
        slots = torch.empty(programs * width, dtype=torch.float32, device=device)
    sampled = row.teachers[0].inclusion_RK is not None
    distill_kernel[(programs,)](
        logits_RV, work_RV, index_R, num_rows, logits_RV.stride(0), work_RV.stride(0),
        *teacher_arguments(row),
        row.labels_R, row.gold_R, row.taboo_RK, _stride(row.taboo_RK), slots, row.per_item,
        *diagnostics,
        row.teachers[0].ids_RK.shape[1], row.teachers[-1].ids_RK.shape[1], num_taboo, vocab_size,
        spec.temperature, 1.0 / spec.temperature, math.log2(math.e) / UNIT[mode], spec.alpha,
        spec.beta, spec.gamma, spec.jsd_beta, spec.js_threshold, spec.confidence_threshold,
        spec.gold_weight, math.log(max(vocab_size, 2)), 1.0 if softcap is None else softcap,
        **gate_constants(row),
        TABOO=taboo,
        TAIL=2 if sampled else _TAILS[spec.tail],
        KIND=_DIVERGENCES[spec.divergence],
        HAS_R=spec.gamma != 0 and len(row.teachers) == 2,
        MODE=mode,
        SOFTCAP=softcap is not None,
        OUT=out,
        HAS_INDEX=index_R is not None,
        BLOCK=config.block,
        STAGES=config.stages,
        OPAQUE=not INTERPRETED,
        num_warps=config.warps,
        **({} if config.registers is None or INTERPRETED else {"maxnreg": config.registers}),
    )  # fmt: skip


def num_programs(num_rows: int, device: torch.device, config: RowConfig) -> int:
    """A program for each place on the device, not more than rows."""
    if device.type != "cuda":
        return min(num_rows, 3)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(num_rows, processors * config.per_multiprocessor)


def new_diagnostics(num_rows: int, device: torch.device) -> list[torch.Tensor]:
    """Loss, strategy, JS, KD, CE and weight of each position; the kernel writes every element."""
    kinds = (torch.float32, torch.int8) + (torch.float32,) * 4
    return [torch.empty(num_rows, dtype=kind, device=device) for kind in kinds]


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


def _rows_in_place(logits_RV: torch.Tensor, *flat: Any) -> list[torch.Tensor]:
    diagnostics = new_diagnostics(logits_RV.shape[0], logits_RV.device)
    launch(logits_RV, logits_RV, _row(*flat), diagnostics, IN_PLACE)
    return diagnostics


def _rows(logits_RV: torch.Tensor, *flat: Any) -> list[torch.Tensor]:
    diagnostics = new_diagnostics(logits_RV.shape[0], logits_RV.device)
    gradient_RV = torch.empty(logits_RV.shape, dtype=logits_RV.dtype, device=logits_RV.device)
    launch(logits_RV, gradient_RV, _row(*flat), diagnostics, COPY)
    return [gradient_RV, *diagnostics]


def _rows_value(logits_RV: torch.Tensor, *flat: Any) -> list[torch.Tensor]:
    num_rows, vocab_size = logits_RV.shape
    diagnostics = new_diagnostics(num_rows, logits_RV.device)
    config = choose_config(vocab_size, logits_RV.element_size())
    programs = num_programs(max(num_rows, 1), logits_RV.device, config)
    width = triton.cdiv(vocab_size, 64) * 64
    scratch = torch.empty(programs, width, dtype=logits_RV.dtype, device=logits_RV.device)
    launch(logits_RV, scratch, _row(*flat), diagnostics, NO_GRADIENT)
    return diagnostics


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
scale_in_place = torch.library.custom_op(
    "logitcache::scale_in_place",
    _scale_in_place,
    mutates_args=("gradient",),
    schema="(Tensor(a!) gradient, Tensor factor) -> ()",
)


@distill_rows_in_place.register_fake
@distill_rows_value.register_fake
def _(logits, *flat):
    return new_diagnostics(logits.shape[0], logits.device)


@distill_rows.register_fake
def _(logits, *flat):
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return [gradient, *new_diagnostics(logits.shape[0], logits.device)]


@scale_in_place.register_fake
def _(gradient, factor):
    return None


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_RV, inplace, late_factor, *flat):
        if inplace:
            diagnostics = distill_rows_in_place(logits_RV, *flat)
            gradient_RV = logits_RV.detach()  # a gradient, and no longer anything's result
        else:
            gradient_RV, *diagnostics = distill_rows(logits_RV, *flat)
        ctx.late = late_factor is not None
        per_item = late_factor if ctx.late else flat[4]
        ctx.save_for_backward(gradient_RV, per_item)
        ctx.mark_non_differentiable(*diagnostics[1:])
        return (diagnostics[0].sum() * per_item, *diagnostics[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_unused):
        gradient_RV, per_item = ctx.saved_tensors
        if ctx.late:
            grad_loss = grad_loss * per_item
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
        diagnostics = distill_rows_value(logits_RV.detach(), *flat)
        return DistillOutput(diagnostics[0].sum() * row.per_item, *diagnostics[1:])
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
