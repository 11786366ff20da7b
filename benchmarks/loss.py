"""The loss on given logits: time over reading and writing them once (2 * R * V * itemsize bytes).

What is timed is loss and gradient, in place: distill_loss and torch.autograd.grad of its loss.
Peers get the same logits; Liger's cross entropy does less (one label, no teacher).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from logitcache_kernels import (
    DistillSpec,
    SparseTeacher,
    capture,
    distill_loss,
    log_partition,
)

from .common import KEPT, ROWS, TEMPERATURES, VOCABULARIES, Bench, Record, largest_error
from .inputs import teacher_logits

_MOST_BYTES = 2**33  # of logits
_CHECKED_ROWS = 8
# Clock cycles that the GPU sleeps before each timed call, for the host to get ahead of it as it
# does in training; otherwise Python's part of a call is what a short kernel's time shows.
HEAD_START = 4_000_000


def run(bench: Bench) -> list[Record]:
    """Time the loss over shapes, temperatures and supports; its variants on the first shape."""
    shapes = [(8192, 151936), (8192, 32000), (4096, 262144)]
    kept: tuple[int, ...] = (64,)
    if not bench.quick:
        shapes = shapes[:1] + [(rows, vocab) for vocab in VOCABULARIES for rows in ROWS]
        kept = KEPT
    records = []
    for number, (num_rows, vocab) in enumerate(dict.fromkeys(shapes)):
        if num_rows * vocab * 2 > _MOST_BYTES:
            continue
        records += _measure(bench, num_rows, vocab, kept, variants=number == 0)
        torch.cuda.empty_cache()
    return records


def make_teachers(
    logits_RV: torch.Tensor, kept: int, temperature: float, *, sampled: bool = False
) -> tuple[SparseTeacher, SparseTeacher]:
    """Keep the given distribution and a disturbed one (mean KL about 0.5), as a store would."""
    teachers = []
    for number in range(2):
        if number:
            logits_RV = logits_RV + 0.5 * torch.randn_like(logits_RV)
        options: dict[str, Any] = {"estimator": "sampled"}
        if not sampled:
            options = {"estimator": "topk", "top_k": kept, "min_prob": 0.0}
        found = capture(logits_RV, **options)
        certain_RK = (found.inclusion_RK >= 1.0) & (found.ids_RK >= 0)
        partition_R = log_partition(
            found.logp_RK, certain_RK, found.tail_log_partition_RT, temperature
        )
        teachers.append(
            SparseTeacher(
                found.ids_RK[:, :kept].contiguous(),
                found.logp_RK[:, :kept].half(),
                partition_R,
                None,
                found.inclusion_RK[:, :kept].half() if sampled else None,
            )
        )
    return teachers[0], teachers[1]


def _measure(
    bench: Bench, num_rows: int, vocab: int, kept: tuple[int, ...], *, variants: bool
) -> list[Record]:
    teacher_RV = teacher_logits(num_rows, vocab, "web", seed=vocab, device=bench.device)
    logits_RV = teacher_RV + torch.randn_like(teacher_RV)
    labels_R = teacher_RV.argmax(-1)
    labels_R[::7] = torch.randint(0, vocab, labels_R[::7].shape, device=bench.device)
    cases: list[tuple[dict[str, Any], DistillSpec, int, bool, float]] = []
    for temperature in TEMPERATURES:
        spec = DistillSpec(temperature=temperature)
        cases += [({"T": temperature}, spec, k, False, 0.0) for k in kept]
    if variants:
        for divergence in ("reverse_kl", "jsd"):
            cases.append(({"T": 2.0}, DistillSpec(divergence=divergence), 64, False, 0.0))
        cases.append(({"T": 2.0, "support": "sampled"}, DistillSpec(), 32, True, 0.0))
        cases.append(({"T": 2.0, "ignored": 0.3}, DistillSpec(), 64, False, 0.3))
    work_RV = torch.empty_like(logits_RV)

    def setup() -> None:
        work_RV.copy_(logits_RV)
        torch.cuda._sleep(HEAD_START)

    peers = _peers(bench, work_RV, labels_R, setup)
    records = []
    for options, spec, k, sampled, ignored in cases:
        teachers = make_teachers(teacher_RV, k, spec.temperature, sampled=sampled)
        some_R = labels_R.clone()
        some_R[torch.rand(num_rows, device=bench.device) < ignored] = -100
        ours = _call(work_RV, teachers, some_R, spec)
        timing = bench.time({"ours": ours}, setup)["ours"]
        setup()
        torch.cuda.synchronize()
        records.append(
            Record(
                suite="loss",
                name="distill_loss",
                shape={"R": num_rows, "V": vocab, "K": k},
                options={**options, "divergence": spec.divergence},
                timing=timing,
                floor="read once + write once",
                floor_ms=bench.copy_ms(2 * num_rows * vocab * logits_RV.element_size()),
                peak_bytes=bench.peak_bytes(ours),
                error=_error(logits_RV, teachers, some_R, spec),
                peers=peers,
            )
        )
    return records


def _call(
    work_RV: torch.Tensor,
    teachers: tuple[SparseTeacher, SparseTeacher],
    labels_R: torch.Tensor,
    spec: DistillSpec,
    **options: Any,
) -> Callable[[], object]:
    def call() -> object:
        leaf_RV = work_RV.detach().requires_grad_()
        output = distill_loss(leaf_RV, teachers, labels_R, spec, inplace=True, **options)
        return torch.autograd.grad(output.loss, leaf_RV)

    return call


def _error(
    logits_RV: torch.Tensor,
    teachers: tuple[SparseTeacher, SparseTeacher],
    labels_R: torch.Tensor,
    spec: DistillSpec,
) -> dict[str, float]:
    """Largest error of the gradient against float64, and eager float32's; the largest gradient."""
    few = slice(0, _CHECKED_ROWS)
    some = tuple(
        SparseTeacher(*(None if x is None else x[few] for x in teacher)) for teacher in teachers
    )
    found = []
    for dtype, impl in (
        (torch.float64, "eager"),
        (torch.float32, "eager"),
        (logits_RV.dtype, "triton"),
    ):
        leaf_RV = logits_RV[few].to(dtype, copy=True).requires_grad_()
        output = distill_loss(leaf_RV, some, labels_R[few], spec, impl=impl)
        found.append(torch.autograd.grad(output.loss, leaf_RV)[0])
    return {
        "gradient": largest_error(found[2], found[0]),
        "eager float32": largest_error(found[1], found[0]),
        "largest gradient": float(found[0].abs().max()),
    }


def _peers(
    bench: Bench, work_RV: torch.Tensor, labels_R: torch.Tensor, setup: Callable[[], None]
) -> dict[str, Any]:
    """Cross entropy alone: Liger's in place, torch's eager and compiled."""

    def by(cross_entropy: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def call() -> object:
            leaf_RV = work_RV.detach().requires_grad_()
            return torch.autograd.grad(cross_entropy(leaf_RV, labels_R), leaf_RV)

        return call

    functions = {}
    if not bench.quick:  # compiling takes longer than all the rest
        functions["torch compile CE"] = by(torch.compile(torch.nn.functional.cross_entropy))
    if work_RV.numel() <= 2**31:
        functions["torch eager CE"] = by(torch.nn.functional.cross_entropy)
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        functions["liger CE"] = by(LigerCrossEntropyLoss())
    return bench.time(functions, setup)
