"""Capture: from a teacher's logits to the sparse support and statistics that a store keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .capture_reference import capture_reference
from .dispatch import choose_impl
from .types import TEMPERATURES, Capture, _one_of, _within


def capture(
    logits_RV: torch.Tensor,
    *,
    estimator: str = "sampled",
    min_prob: float = 0.005,
    threshold: float = 0.05,
    sample_temperature: float = 2.0,
    top_k: int = 128,
    temperatures: Sequence[float] = TEMPERATURES,
    labels_R: torch.Tensor | None = None,
    num_tokens: int | None = None,
    seed: int = 0,
    position_ids_R: torch.Tensor | None = None,
    impl: str = "auto",
) -> Capture:
    """Keep a teacher's distribution sparsely; see ``Capture`` for what comes back.

    logits_RV: floating, any strides. estimator: "sampled", "topk" or "full" (DESIGN section 5).
    labels_R: next tokens, -100 for none. num_tokens: size of the tokenizer; ids at or above it
    (padding of the embedding) leave the softmax altogether. position_ids_R: int64 numbers of the
    positions, by which sampling is keyed (0..R-1 by default). K is min(256, V) for sampled,
    min(top_k, V) for topk.

    ValueError for options out of range.
    """
    _one_of("estimator", estimator, ("sampled", "topk", "full"))
    _within("min_prob", min_prob, 0.0, 1.0)
    _within("threshold", threshold, 1e-6, 1.0)
    _within("sample_temperature", sample_temperature, 1.0, 100.0)
    _within("top_k", top_k, 1, 256)
    if logits_RV.ndim != 2 or not logits_RV.is_floating_point():
        raise ValueError(
            "logits_RV: expected a floating R x V tensor, "
            f"found {logits_RV.dtype} {tuple(logits_RV.shape)}"
        )
    num_rows, width = logits_RV.shape
    num_tokens = width if num_tokens is None else num_tokens
    _within("num_tokens", num_tokens, 1, width)
    if position_ids_R is None:
        position_ids_R = torch.arange(num_rows, device=logits_RV.device)
    for name, tensor in (("labels_R", labels_R), ("position_ids_R", position_ids_R)):
        if tensor is not None and tensor.shape != (num_rows,):
            raise ValueError(f"{name}: expected shape ({num_rows},), found {tuple(tensor.shape)}")
    if choose_impl(impl, logits_RV) == "eager" or estimator == "full":
        run = capture_reference
    else:
        from .capture_triton import capture_triton as run  # not before it is wanted: needs triton
    return run(
        logits_RV,
        estimator=estimator,
        min_prob=min_prob,
        threshold=threshold,
        sample_temperature=sample_temperature,
        top_k=top_k,
        temperatures=temperatures,
        labels_R=labels_R,
        num_tokens=num_tokens,
        seed=seed,
        position_ids_R=position_ids_R,
    )
