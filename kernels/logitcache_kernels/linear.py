"""The distillation loss on hidden states and an output projection, without the full R x V logits.

Positions are taken in chunks. Each chunk's logits, its gradient and that gradient's two matrix
products are computed in the forward pass, while the chunk is there (as Liger's fused linear cross
entropy does); the backward pass only multiplies by the incoming scalar. Positions without loss
(ignored or SKIP) are dropped before the first product. Weight gradients accumulate in float32
(float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .dispatch import choose_impl
from .distill import check_arguments
from .distill_reference import (
    distill_loss_reference,
    gate_reference,
    taboo_mask,
    usable_gold,
)
from .types import IGNORED_LABEL, SKIP, DistillOutput, DistillSpec, SparseTeacher

# Elements of one chunk of eager logits. On a CPU a chunk's temporaries should fit the cache (twice
# as fast as 2^23 with V = 2048); elsewhere about ten float32 temporaries of this size are alive.
_CHUNK_ELEMENTS = {"cpu": 2**21, "other": 2**25}


def head_logits(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Logits of a projection: softcap * tanh(scale * (h W' + b) / softcap), the cap optional."""
    dtype = hidden_RD.dtype if logits_dtype is None else logits_dtype
    logits_RV = hidden_RD.to(dtype) @ weight_VD.to(dtype).T
    if bias_V is not None:
        logits_RV = logits_RV + bias_V.to(dtype)
    if scale != 1.0:
        logits_RV = logits_RV * scale
    if softcap is not None:
        logits_RV = softcap * torch.tanh(logits_RV / softcap)
    return logits_RV


class _Inputs:
    """Everything of the call that has no gradient; rows can be picked."""

    def __init__(self, teachers, labels_R, gold_R, taboo_RK):
        self.teachers, self.labels_R = teachers, labels_R
        self.gold_R, self.taboo_RK = gold_R, taboo_RK

    def rows(self, index: Any) -> _Inputs:
        def pick(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x[index]

        teachers = tuple(SparseTeacher._make(pick(x) for x in teacher) for teacher in self.teachers)
        return _Inputs(teachers, self.labels_R[index], pick(self.gold_R), pick(self.taboo_RK))


class _LinearDistill(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, bias_V, inputs, spec, head, chunk, taboo_ids, num_items):
        # needs_input_grad, not requires_grad: inside forward() tensors look detached.
        wants = [ctx.needs_input_grad[i] for i in range(3)]
        total_dtype = torch.float64 if hidden_RD.dtype == torch.float64 else torch.float32
        grad_hidden = torch.zeros_like(hidden_RD) if wants[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=total_dtype) if wants[1] else None
        grad_bias = torch.zeros_like(bias_V, dtype=total_dtype) if wants[2] else None
        loss = hidden_RD.new_zeros((), dtype=total_dtype)
        kd_R = torch.zeros(hidden_RD.shape[0], dtype=total_dtype, device=hidden_RD.device)
        ce_R = torch.zeros_like(kd_R)
        for start in range(0, hidden_RD.shape[0], chunk):
            rows = slice(start, start + chunk)
            part = inputs.rows(rows)
            leaf_RD = hidden_RD[rows].detach()
            raw_RV = head_logits(
                leaf_RD, weight_VD.detach(), bias_V, logits_dtype=head["logits_dtype"]
            )
            with torch.enable_grad():
                raw_RV = raw_RV.detach().requires_grad_(any(wants))
                logits_RV = raw_RV if head["scale"] == 1.0 else raw_RV * head["scale"]
                if head["softcap"] is not None:
                    logits_RV = head["softcap"] * torch.tanh(logits_RV / head["softcap"])
                output = distill_loss_reference(
                    logits_RV,
                    part.teachers,
                    part.labels_R,
                    spec,
                    gold_R=part.gold_R,
                    taboo_ids=taboo_ids,
                    taboo_RK=part.taboo_RK,
                    num_items=num_items,
                )
            loss += output.loss.detach()
            kd_R[rows], ce_R[rows] = output.kd_R, output.ce_R
            if not any(wants):
                continue
            (grad_RV,) = torch.autograd.grad(output.loss, raw_RV)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_RV @ weight_VD.to(grad_RV.dtype)).to(grad_hidden.dtype)
            if grad_weight is not None:
                grad_weight += grad_RV.T.to(total_dtype) @ leaf_RD.to(total_dtype)
            if grad_bias is not None:
                grad_bias += grad_RV.sum(0, dtype=total_dtype)
        ctx.grads = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VD.dtype),
            None if grad_bias is None else grad_bias.to(bias_V.dtype),
        )
        ctx.mark_non_differentiable(kd_R, ce_R)
        return loss, kd_R, ce_R

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _kd, _ce):
        # A scalar tensor does not change the other factor's dtype, and is not rounded to it either.
        grads = [None if grad is None else grad * grad_loss for grad in ctx.grads]
        return (*grads, None, None, None, None, None, None)


def linear_distill_loss(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    teachers: Sequence[SparseTeacher],
    labels_R: torch.Tensor,
    spec: DistillSpec,
    *,
    bias_V: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
    max_chunk: int | None = None,
    logits_dtype: torch.dtype | None = None,
    gold_R: torch.Tensor | None = None,
    taboo_ids: torch.Tensor | None = None,
    taboo_RK: torch.Tensor | None = None,
    num_items: torch.Tensor | float | None = None,
    inplace: bool = False,
    impl: str = "auto",
) -> DistillOutput:
    """Give the loss of ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``.

    hidden_RD, weight_VD, bias_V: floating; gradients flow to each that asks for one. chunk:
    positions per chunk (None: by the size of the vocabulary, but not more than max_chunk).
    logits_dtype: of a chunk's logits (None: the hidden states'). The other arguments, and the
    errors, are those of ``distill_loss``.
    """
    num_rows, vocab_size = hidden_RD.shape[0], weight_VD.shape[0]
    has_taboo = taboo_ids is not None or taboo_RK is not None
    check_arguments(num_rows, teachers, labels_R, spec, gold_R, has_taboo)
    if weight_VD.ndim != 2 or hidden_RD.ndim != 2 or hidden_RD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            "hidden_RD, weight_VD: expected shapes (R, D) and (V, D), "
            f"found {tuple(hidden_RD.shape)} and {tuple(weight_VD.shape)}"
        )
    if bias_V is not None and bias_V.shape != (vocab_size,):
        raise ValueError(f"bias_V: expected shape ({vocab_size},), found {tuple(bias_V.shape)}")
    for name, positions in (("chunk", chunk), ("max_chunk", max_chunk)):
        if positions is not None and positions < 1:
            raise ValueError(f"{name}: expected a positive number of positions, found {positions}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number or None, found {softcap}")
    logits_dtype = hidden_RD.dtype if logits_dtype is None else logits_dtype
    sample = (
        hidden_RD
        if hidden_RD.dtype == torch.float64
        else hidden_RD.new_empty(0, dtype=logits_dtype)
    )
    if choose_impl(impl, sample) == "triton":
        from .distill_fused import prepare
        from .linear_fused import Head, linear_distill_loss_fused

        row = prepare(teachers, labels_R, gold_R, taboo_ids, taboo_RK, num_items, spec)
        narrow = logits_dtype if logits_dtype.itemsize == 2 else hidden_RD.dtype
        head = Head(softcap, scale, logits_dtype, narrow)
        with torch.autocast(hidden_RD.device.type, enabled=False):
            return linear_distill_loss_fused(
                hidden_RD, weight_VD, bias_V, row, head, chunk, max_chunk
            )

    # The gate needs the teachers alone: decide first which positions go through the products.
    wide = torch.float64 if logits_dtype == torch.float64 else torch.float32
    elements = _CHUNK_ELEMENTS["cpu" if hidden_RD.device.type == "cpu" else "other"]
    step = chunk or min(max(elements // vocab_size, 16), max_chunk or num_rows + 1)
    everything = _Inputs(tuple(teachers), labels_R, gold_R, taboo_RK)
    gates = []
    for start in range(0, max(num_rows, 1), step):
        part = everything.rows(slice(start, start + step))
        _, taboo_RV = taboo_mask(
            vocab_size, len(part.labels_R), hidden_RD.device, taboo_ids, part.taboo_RK
        )
        gold = usable_gold(part.labels_R, part.gold_R, taboo_RV, vocab_size)
        gates.append(gate_reference(part.teachers, part.labels_R, spec, vocab_size, gold, wide))
    gate = [torch.cat(columns) for columns in zip(*gates, strict=True)]
    strategy_R, js_R, weight_R = gate[0], gate[1], gate[4]
    if num_items is None:
        num_items = (labels_R != IGNORED_LABEL).sum().clamp_min(1)

    if not torch.is_grad_enabled():  # else the weight's gradient would be computed and thrown away
        weight_VD, bias_V = weight_VD.detach(), None if bias_V is None else bias_V.detach()
    (kept,) = (strategy_R != SKIP).nonzero(as_tuple=True)
    # Autocast must not reach into the products below: their dtypes are chosen here.
    with torch.autocast(hidden_RD.device.type, enabled=False):
        loss, kd, ce = _LinearDistill.apply(
            hidden_RD.index_select(0, kept),
            weight_VD,
            bias_V,
            everything.rows(kept),
            spec,
            {"softcap": softcap, "scale": scale, "logits_dtype": logits_dtype},
            step,
            taboo_ids,
            num_items,
        )
    kd_R = torch.zeros(num_rows, dtype=kd.dtype, device=kd.device).index_copy(0, kept, kd)
    ce_R = torch.zeros(num_rows, dtype=ce.dtype, device=ce.device).index_copy(0, kept, ce)
    return DistillOutput(loss, strategy_R, js_R, kd_R, ce_R, weight_R)
