"""Held-out metrics of a model on a store: its loss, and its divergence from the gated target at T =
1."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import send_to_device

from logitcache_kernels import DistillSpec

from .student import SUM_NAMES, as_metrics, attach_loss, to_inputs, zero_sums


@torch.no_grad()
def summed(
    model: Any, batches: Iterable[dict[str, Any]], device: torch.device, num_sources: int = 0
) -> torch.Tensor:
    """Sums in the order of SUM_NAMES of a model with attached loss over batches of inputs; then
    those of the sources that the inputs have."""
    total = zero_sums(num_sources, device)
    for inputs in batches:
        inputs = {k: v for k, v in inputs.items() if k not in ("rows", "num_valid")}
        total += model(**send_to_device(inputs, device), evaluate=True, num_items=1.0)["sums"]
    return total


def held_out_metrics(sums: torch.Tensor) -> dict[str, float]:
    """What is reported of an evaluation.

    loss: cross entropy in nats per valid token. kl: KL(gated target || model) at T = 1 in nats,
    averaged over the positions that have a teacher target (BLENDED and T1_ONLY). Then the shares
    and the mean JS.
    """
    value = dict(zip(SUM_NAMES, sums[: len(SUM_NAMES)].tolist(), strict=True))
    metrics = {
        "loss": value["ce_valid"] / max(value["valid"], 1.0),
        "kl": value["kl"] / max(value["kl_positions"], 1.0),
    }
    shares = as_metrics(sums)
    return metrics | {k: v for k, v in shares.items() if k.startswith("share_") or k == "mean_js"}


def evaluation_spec(spec: DistillSpec) -> DistillSpec:
    """The gate of training at T = 1, with forward KL over the whole vocabulary alone."""
    changes = {"temperature": 1.0, "alpha": 0.0, "beta": 1.0, "gamma": 0.0, "tail": "bucket"}
    return DistillSpec(**{**spec.__dict__, **changes, "divergence": "forward_kl"})


def evaluate_on_store(
    model: Any, reader: Any, spec: DistillSpec, batch_rows: int = 8
) -> dict[str, float]:
    """Evaluate a model that is not in training on all rows of a store; see held_out_metrics."""
    device = next(model.parameters()).device
    plain_forward = model.forward
    attach_loss(model, evaluation_spec(spec))
    try:
        batches = (
            to_inputs(reader[start : start + batch_rows], 1.0)
            for start in range(0, len(reader), batch_rows)
        )
        return held_out_metrics(summed(model, batches, device))
    finally:
        model.forward = plain_forward
