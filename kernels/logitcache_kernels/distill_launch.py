"""From tensors to the kernels of the loss: arguments, sizes, launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from .distill_plan_triton import NUMBERS, plan_kernel
from .distill_rows_triton import rows_kernel
from .distill_slice_triton import BF16_PAIRS, FP16_PAIRS, SINGLE
from .distill_terms_triton import T_1, T_2, T_3, T_3_2, T_4, T_ANY, UNIT
from .scalars_triton import kept_kernel, sum_kernel
from .types import SKIP, DistillSpec, SparseTeacher

IN_PLACE, COPY, NO_GRADIENT = 0, 1, 2  # where the gradient goes
_MODES = {1.0: T_1, 1.5: T_3_2, 2.0: T_2, 3.0: T_3, 4.0: T_4}
_DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
_TAILS = {"bucket": 0, "renormalise": 1, "none": 2}
_TABOO_SLICE = 32
_ALIGNMENT = 64  # elements at which a slice may begin: whole lines of memory
_PAIRS = {torch.bfloat16: BF16_PAIRS, torch.float16: FP16_PAIRS}
INTERPRETED = not hasattr(rows_kernel, "warmup") or type(rows_kernel).__name__ != "JITFunction"


class RowConfig(NamedTuple):
    """How rows are cut into slices, and how programs share the device."""

    tile: int  # elements loaded at once, a power of two
    tiles: int  # of a slice, at most
    warps: int
    per_multiprocessor: int  # programs; times warps * 32 * registers at most 65536
    registers: int  # at most, a thread


class Row(NamedTuple):
    """What the kernels read beside the logits; tensors on one device, teachers' rows contiguous."""

    teachers: tuple[SparseTeacher, ...]
    labels_R: torch.Tensor
    gold_R: torch.Tensor | None
    taboo_RK: torch.Tensor | None  # unique ids of each position, -1 padded; its rows may be one
    per_item: torch.Tensor  # float32, 1 / num_items
    spec: DistillSpec


def gpu_config(vocab_size: int, paired: bool, capped: bool) -> RowConfig:
    """The fastest of a sweep on an H200 (docs/kernels.md); frozen, as tuning in place corrupts.

    paired: whether a register holds two elements. The slices of a row, as a power of two, must be
    fewer than the threads of a program: Triton 3.6 cannot compile their sums otherwise. A thread
    loads eight paired elements of a tile at once; more tiles do not fit its registers, of logits
    with a cap (capped) fewer.
    """
    if not paired:
        if vocab_size <= 2**18:
            return RowConfig(1024, 4, 4, 3, 168)
        return RowConfig(2048, 4, 8, 1, 168)
    tiles = 12 if capped else 14
    for warps in (2, 4):
        if triton.cdiv(vocab_size, 256 * warps * tiles) <= 16 * warps:
            return RowConfig(256 * warps, tiles, warps, 8 // warps, 255)
    return RowConfig(2048, tiles, 8, 1, 255)


def choose_config(vocab_size: int, paired: bool, capped: bool) -> RowConfig:
    """How the rows of a vocabulary are cut, on a GPU or in the interpreter."""
    if INTERPRETED:
        # Programs run one after the other, so none may wait for another: three have whole rows, or,
        # where a row is longer than a slice must be, one has both halves of every row.
        whole = vocab_size <= _ALIGNMENT
        tile = triton.next_power_of_2(vocab_size) // (2 if whole else 4)
        return RowConfig(max(tile, 16), 2, 4, 3 if whole else 1, 0)
    return gpu_config(vocab_size, paired, capped)


def _stride(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _padded(width: int) -> int:
    return max(16 if INTERPRETED else 32, triton.next_power_of_2(width))


def _sampled(row: Row) -> bool:
    return row.teachers[0].inclusion_RK is not None


def _shared_constants(row: Row, num_taboo: int, mode: int, softcap: float | None) -> dict[str, Any]:
    """Compile-time arguments of both kernels."""
    spec = row.spec
    return {
        "TB": _TABOO_SLICE,
        "TABOO": {"target": 1, "neutral": 2}[spec.taboo] if num_taboo else 0,
        "TAIL": 2 if _sampled(row) else _TAILS[spec.tail],
        "KIND": _DIVERGENCES[spec.divergence],
        "HAS_R": spec.gamma != 0 and len(row.teachers) == 2,
        "MODE": mode,
        "SOFTCAP": softcap is not None,
    }


class _Plan(NamedTuple):
    """Memory between the two kernels; None where neither uses it."""

    numbers: torch.Tensor | None
    kind: torch.Tensor | None
    list_ids: torch.Tensor | None
    list_z: torch.Tensor | None
    list_p: torch.Tensor | None
    list_r: torch.Tensor | None
    slots: torch.Tensor | None
    partial: torch.Tensor | None


def _run_plan(
    logits_RV: torch.Tensor | None,
    vocab_size: int,
    num_rows: int,
    row: Row,
    diagnostics: Sequence[torch.Tensor | None],
    plan: _Plan,
    shared: dict[str, Any],
    index_R: torch.Tensor | None,
    softcap: float | None,
) -> None:
    spec = row.spec
    arguments: list[Any] = []
    for teacher in (row.teachers[0], row.teachers[-1]):  # teacher 1 stands in for one not there
        arguments += [
            teacher.ids_RK, teacher.logp_RK, teacher.inclusion_RK, teacher.log_partition_R,
            teacher.entropy_R, teacher.ids_RK.stride(0), teacher.logp_RK.stride(0),
            _stride(teacher.inclusion_RK),
        ]  # fmt: skip
    plan_kernel[(num_rows,)](
        logits_RV, index_R, _stride(logits_RV), *arguments,
        row.labels_R, row.gold_R, row.taboo_RK, _stride(row.taboo_RK), *diagnostics, *plan,
        row.teachers[0].ids_RK.shape[1], row.teachers[-1].ids_RK.shape[1],
        0 if row.taboo_RK is None else row.taboo_RK.shape[1], vocab_size,
        1.0 / spec.temperature, math.log2(math.e) / UNIT[shared["MODE"]], spec.js_threshold,
        spec.confidence_threshold, spec.gold_weight, math.log(max(vocab_size, 2)),
        1.0 if softcap is None else softcap,
        **shared,
        KP=_padded(max(teacher.ids_RK.shape[1] for teacher in row.teachers)),
        TEACHERS=len(row.teachers),
        SAMPLED=_sampled(row),
        ENTROPY=spec.confidence == "entropy",
        HAS_GOLD=row.gold_R is not None,
        LOGITS=logits_RV is not None,
        HAS_INDEX=index_R is not None,
        PARTIALS=0 if plan.partial is None else plan.partial.shape[1],
        num_warps=1,  # a row's reductions stay within a warp: no barriers
    )  # fmt: skip


def gate(row: Row, vocab_size: int) -> list[torch.Tensor]:
    """The diagnostics of each position before there are any logits: strategy, JS and weight; loss,
    KD and CE are 0."""
    num_rows, device = len(row.labels_R), row.labels_R.device
    diagnostics = new_diagnostics(num_rows, device)
    if num_rows:
        num_taboo = 0 if row.taboo_RK is None else row.taboo_RK.shape[1]
        shared = _shared_constants(row, num_taboo, T_1, None)
        _run_plan(
            None, vocab_size, num_rows, row, diagnostics,
            _Plan(*[None] * 8), shared, None, None,
        )  # fmt: skip
    return diagnostics


def launch(
    logits_RV: torch.Tensor,
    gradient_RV: torch.Tensor | None,
    row: Row,
    diagnostics: Sequence[torch.Tensor],
    *,
    index_R: torch.Tensor | None = None,
    softcap: float | None = None,
    config: RowConfig | None = None,
) -> None:
    """Run both kernels over logits_RV, whose row i is position index_R[i] (None: i).

    gradient_RV: where the gradient goes, logits_RV itself for in place, or None for the loss alone.
    """
    num_rows, vocab_size = logits_RV.shape
    if num_rows == 0:
        return
    spec, device = row.spec, logits_RV.device
    paired = _has_pairs(logits_RV) and (gradient_RV is None or _has_pairs(gradient_RV))
    config = config or choose_config(vocab_size, paired, softcap is not None)
    most = config.tile * config.tiles
    slices = triton.cdiv(vocab_size, most)
    size = triton.cdiv(triton.cdiv(vocab_size, slices), _ALIGNMENT) * _ALIGNMENT
    programs = _num_programs(num_rows * slices, device, config)
    if gradient_RV is None:
        out = NO_GRADIENT
        gradient_RV = logits_RV.new_empty(2 * programs, most)
    else:
        out = IN_PLACE if gradient_RV.data_ptr() == logits_RV.data_ptr() else COPY
    x_format, per = SINGLE, 1
    x, work_x = logits_RV, gradient_RV
    if paired:
        x_format, per = _PAIRS[logits_RV.dtype], 2
        x, work_x = x.view(torch.int32), work_x.view(torch.int32)

    num_taboo = 0 if row.taboo_RK is None else row.taboo_RK.shape[1]
    mode = _MODES.get(spec.temperature, T_ANY)
    shared = _shared_constants(row, num_taboo, mode, softcap)
    width = len(row.teachers) * _padded(max(t.ids_RK.shape[1] for t in row.teachers))

    def new(columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(num_rows, columns, dtype=dtype, device=device)

    slots = triton.cdiv(num_taboo, _TABOO_SLICE) * _TABOO_SLICE
    padded = triton.next_power_of_2(slices)
    plan = _Plan(
        new(NUMBERS.value),
        new(1, torch.int8),
        new(width, torch.int32),
        new(width),
        new(width),
        new(width) if shared["HAS_R"] else None,
        new(slots) if shared["TABOO"] == 1 else None,
        new(2 * padded, torch.int64),
    )
    _run_plan(
        logits_RV, vocab_size, num_rows, row, diagnostics, plan, shared, index_R, softcap,
    )  # fmt: skip
    launched: dict[str, Any] = {"num_warps": config.warps}
    if not INTERPRETED:
        # Slices of a row wait for one another: all programs must run at once, or none.
        launched.update(maxnreg=config.registers, launch_cooperative_grid=slices > 1)
    rows_kernel[(programs,)](
        x, work_x, gradient_RV, index_R, num_rows, x.stride(0), work_x.stride(0),
        gradient_RV.stride(0), size // per, x.shape[1], row.taboo_RK, _stride(row.taboo_RK),
        row.per_item, diagnostics[0], diagnostics[3], diagnostics[4], *plan,
        num_taboo, vocab_size,
        spec.temperature, 1.0 / spec.temperature, math.log2(math.e) / UNIT[mode], spec.alpha,
        spec.beta, spec.gamma, spec.jsd_beta, 1.0 if softcap is None else softcap,
        **shared,
        WIDTH=width,
        OUT=out,
        HAS_INDEX=index_R is not None,
        C=slices,
        CP=padded,
        TILES=min(triton.cdiv(size, config.tile), config.tiles),
        BLOCK=config.tile // per,
        FORMAT=x_format,
        OPAQUE=not INTERPRETED,
        **launched,
    )  # fmt: skip


def _has_pairs(x: torch.Tensor) -> bool:
    """Whether its rows are whole 32-bit words of two elements."""
    return x.dtype in _PAIRS and x.shape[1] % 2 == x.stride(0) % 2 == x.storage_offset() % 2 == 0


def _num_programs(num_items: int, device: torch.device, config: RowConfig) -> int:
    """A program for each place on the device, not more than slices."""
    processors = 1
    if device.type == "cuda" and not INTERPRETED:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(num_items, processors * config.per_multiprocessor)


def new_diagnostics(num_rows: int, device: torch.device) -> list[torch.Tensor]:
    """Loss, strategy, JS, KD, CE and weight of each position; the kernels write every element."""
    kinds = (torch.float32, torch.int8) + (torch.float32,) * 4
    return [torch.empty(num_rows, dtype=kind, device=device) for kind in kinds]


def positions_kept(strategy_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions carry a loss, int32 [R] in order, zeros behind them; how many, int64."""
    index_R = torch.empty(strategy_R.shape, dtype=torch.int32, device=strategy_R.device)
    count = torch.empty((), dtype=torch.int64, device=strategy_R.device)
    kept_kernel[(1,)](
        strategy_R, index_R, count, len(strategy_R), SKIPPED=SKIP, BLOCK=8192, num_warps=32
    )
    return index_R, count


def add_up(loss_R: torch.Tensor, per_item: torch.Tensor) -> torch.Tensor:
    """The batch's loss, a scalar."""
    total = torch.empty((), dtype=torch.float32, device=loss_R.device)
    sum_kernel[(1,)](loss_R, per_item, total, len(loss_R), BLOCK=8192, num_warps=32)
    return total
