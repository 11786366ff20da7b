"""The loss on hidden states and a head: time over the three bare GEMMs (6 * R * V * D operations).

What is timed is loss and the gradients of hidden states and weight. Peers do cross entropy only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from logitcache_kernels import DistillSpec, linear_distill_loss

from .common import Bench, Record
from .inputs import teacher_logits
from .loss import HEAD_START, make_teachers

_KEPT = 64


def run(bench: Bench) -> list[Record]:
    """Time the linear loss whole, in small chunks, with positions left out, with a frozen head."""
    shapes = [(8192, 151936, 896), (8192, 151936, 2048)]
    if not bench.quick:
        shapes += [(8192, 32000, 2048), (16384, 49152, 576), (8192, 128256, 2048)]
        shapes += [(4096, 262144, 640)]
    records = []
    for num_rows, vocab, width in shapes:
        records += _measure(bench, num_rows, vocab, width)
        torch.cuda.empty_cache()
    return records


def _measure(bench: Bench, num_rows: int, vocab: int, width: int) -> list[Record]:
    teacher_RV = teacher_logits(num_rows, vocab, "web", seed=vocab, device=bench.device)
    labels_R = teacher_RV.argmax(-1)
    teachers = make_teachers(teacher_RV, _KEPT, 2.0)
    del teacher_RV
    hidden_RD = torch.randn(num_rows, width, device=bench.device, dtype=torch.bfloat16)
    weight_VD = torch.randn(vocab, width, device=bench.device, dtype=torch.bfloat16) * width**-0.5
    hidden_RD, weight_VD = hidden_RD.requires_grad_(), weight_VD.requires_grad_()
    some_R = labels_R.clone()
    some_R[torch.rand(num_rows, device=bench.device) < 0.3] = -100
    frozen_VD = weight_VD.detach()

    def ours(
        labels_R: torch.Tensor = labels_R, weight_VD: torch.Tensor = weight_VD, **options: Any
    ) -> Callable[[], object]:
        leaves = [x for x in (hidden_RD, weight_VD) if x.requires_grad]

        def call() -> object:
            output = linear_distill_loss(
                hidden_RD, weight_VD, teachers, labels_R, DistillSpec(), **options
            )
            return torch.autograd.grad(output.loss, leaves)

        return call

    cases: dict[str, tuple[dict[str, Any], Callable[[], object], bool]] = {
        "whole": ({}, ours(), True),
        "chunk": ({"chunk": 1024}, ours(chunk=1024), True),
        "ignored": ({"ignored": 0.3}, ours(some_R), True),
        "frozen": ({"head": "frozen"}, ours(weight_VD=frozen_VD), False),
    }
    functions = {name: call for name, (_, call, _) in cases.items()}
    functions.update(_products(hidden_RD.detach(), frozen_VD))
    functions.update(_peers(bench, hidden_RD, weight_VD, labels_R))
    timings = bench.time(functions, lambda: torch.cuda._sleep(HEAD_START))
    bare = {name: timings.pop(name).median for name in ("logits", "dX", "dW")}
    peers = {name: timing for name, timing in timings.items() if name not in cases}
    return [
        Record(
            suite="linear",
            name="linear_distill_loss",
            shape={"R": num_rows, "V": vocab, "D": width, "K": _KEPT},
            options={"T": 2.0, **options},
            timing=timings[name],
            floor="three GEMMs" if trained else "two GEMMs",
            floor_ms=sum(bare.values()) - (0.0 if trained else bare["dW"]),
            # Beyond the gradient of the hidden states and a float32 gradient of the head.
            peak_bytes=bench.peak_bytes(call)
            - num_rows * width * 2
            - (vocab * width * 4 if trained else 0),
            peers=peers if name == "whole" else {},
        )
        for name, (options, call, trained) in cases.items()
    ]


def _products(hidden_RD: torch.Tensor, weight_VD: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The bare products, each in one piece, timed in turn with the rest: after the same pauses.

    Timed one after the other they run hotter, hence slower, than a call that follows a pause
    (H200, 2026-11: by 7 %).
    """
    logits_RV = torch.randn(
        len(hidden_RD), len(weight_VD), device=hidden_RD.device, dtype=hidden_RD.dtype
    )
    return {
        "logits": lambda: hidden_RD @ weight_VD.T,
        "dX": lambda: logits_RV @ weight_VD,
        "dW": lambda: logits_RV.T @ hidden_RD,
    }


def _peers(
    bench: Bench, hidden_RD: torch.Tensor, weight_VD: torch.Tensor, labels_R: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """Cross entropy of a linear head: torch compiled, Liger's and Apple's where installed."""

    def plain(hidden_RD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy((hidden_RD @ weight_VD.T).float(), labels_R)

    def by(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(hidden_RD, weight_VD), (hidden_RD, weight_VD))

    functions = {}
    if not bench.quick:
        functions["torch compile CE"] = by(torch.compile(plain))
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()
        functions["liger fused linear CE"] = by(lambda h, w: fused(w, h, labels_R))
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy

        functions["apple CCE"] = by(lambda h, w: linear_cross_entropy(h, w, labels_R))
    return functions
