"""The student: a transformers causal language model whose own forward computes the distillation
loss.

The loss is computed inside forward(), so that whatever wraps the model (DDP, FSDP, PEFT, autocast,
gradient checkpointing) sees an ordinary forward pass, and chunk by chunk, so that R x V logits
never exist at once. A model whose logits are not those of its decoder and output head gives them
whole, to the same loss.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

from logitcache.causal_lm import Head, hidden_states
from logitcache.errors import UsageError
from logitcache.packed_attention import known_bounds, longest_segment, segment_bounds
from logitcache.reader import TeacherBatch
from logitcache_kernels import (
    STRATEGY_NAMES,
    DistillOutput,
    DistillSpec,
    SparseTeacher,
    distill_loss,
    head_logits,
    linear_distill_loss,
)

from .source_loss import source_sums

_BySource = tuple[torch.Tensor | None, int]  # the source of each position, and how many there are

# What forward() sums over a batch, in this order; see batch_sums.
SUM_NAMES = ("valid", *STRATEGY_NAMES, "js", "ce", "kd", "ce_valid", "kl", "kl_positions")

# The most positions in a chunk of logits where activations are recomputed. 4096, which are fastest,
# would be a tenth of all that is in memory there (1.2 GiB); these cost 1 % of a step.
CHUNK_BESIDE_RECOMPUTED = 1024


def to_inputs(batch: TeacherBatch, temperature: float) -> dict[str, Any]:
    """Turn a batch of a store into keyword arguments of the student's forward."""
    bounds = segment_bounds(batch.positions)
    return {
        "input_ids": torch.from_numpy(batch.rows.tokens.astype("int64")),
        "position_ids": torch.from_numpy(batch.positions),
        "labels": torch.from_numpy(batch.labels),  # already shifted
        "gold": torch.from_numpy(batch.gold),
        # Plain dicts: accelerate and DDP move them to the device, named tuples they cannot rebuild.
        "teachers": [t.sparse_teacher(temperature)._asdict() for t in batch.teachers],
        "num_tokens": int(batch.rows.lengths().sum()),
        "bounds": torch.from_numpy(bounds),
        "longest": longest_segment(bounds),
    }


def compile_layers(model: Any, backend: Any = "inductor", mode: str | None = None) -> None:
    """Compile each layer of a model in place. All share one graph, which is there in seconds; that
    of a whole model was not in a minute. UsageError for a model without a list of layers."""
    found: list[Any] = []

    def look(module: Any) -> None:
        for child in module.children():
            if isinstance(child, torch.nn.ModuleList):  # not those inside a layer: its experts
                found.extend(child)
            else:
                look(child)

    look(model)
    if not found:
        raise UsageError(f"torch_compile: {type(model).__name__} has no list of layers")
    for layer in found:
        layer.compile(backend=backend, mode=mode)


def attach_loss(
    model: Any,
    spec: DistillSpec,
    chunk: int | None = None,
    dense: bool = False,
    max_chunk: int | None = None,
) -> None:
    """Make model(..., teachers=..., labels=..., num_items=...) compute the loss; other calls stay
    as they are.

    With teachers the forward returns {"loss": scalar, "sums": float64 tensor in the order of
    SUM_NAMES, "row_losses": [B], the part of each row in the loss's sum without the agreement
    term}; with evaluate=True it also fills the sums of plain cross entropy and KL, without
    gradients. Given sources, the sums end with those of ``source_sums``: of the parts CE and KD of
    the loss, or of plain cross entropy with evaluate=True. dense: from the model's own logits, all
    at once; check_model says for which models. chunk, max_chunk: of linear_distill_loss.
    """
    plain_forward = model.forward
    chunks = {"chunk": chunk, "max_chunk": max_chunk}

    def forward(self: Any, *args: Any, teachers: Any = None, **kwargs: Any) -> Any:
        if teachers is None:
            return plain_forward(*args, **kwargs)
        return _distill_forward(
            self, spec, chunks, teachers, plain_forward if dense else None, **kwargs
        )

    model.forward = MethodType(forward, model)


def _distill_forward(
    model: Any,
    spec: DistillSpec,
    chunks: dict[str, Any],
    teachers: Any,
    plain_forward: Any,
    *,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    labels: torch.Tensor,
    gold: torch.Tensor,
    num_items: torch.Tensor | float | None = None,
    evaluate: bool = False,
    num_tokens: int = 0,
    bounds: torch.Tensor | None = None,
    longest: int | None = None,
    sources: torch.Tensor | None = None,
    num_sources: int = 0,
    taboo_ids: torch.Tensor | None = None,
    taboo_BLK: torch.Tensor | None = None,
    **others: Any,
) -> dict[str, torch.Tensor]:
    # Adapters (PEFT) pass on every argument of a forward, as None where it was not given.
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise TypeError(f"unexpected with teachers: {', '.join(given)}")
    shared = {
        "teachers": [SparseTeacher(**teacher) for teacher in teachers],
        "labels_R": labels.flatten(),
        "spec": spec,
        "gold_R": gold.flatten(),
        "taboo_ids": taboo_ids,
        "taboo_RK": None if taboo_BLK is None else taboo_BLK.flatten(0, 1),
        "num_items": num_items,
    }
    by_source = (None if sources is None else sources.flatten(), num_sources)
    if plain_forward is not None:
        with known_bounds(bounds, len(input_ids), longest):
            output = plain_forward(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        logits_RV = output.logits.flatten(0, 1)
        return _from_logits(logits_RV, labels, evaluate, shared, by_source)
    hidden_RD = hidden_states(model, input_ids, position_ids, bounds, longest).flatten(0, 1)
    return _from_head(model, hidden_RD, labels, evaluate, chunks, shared, by_source)


# Compilers see the decoder: they have nothing to add to kernels, and would trace into them.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _from_logits(
    logits_RV: torch.Tensor,
    labels_BL: torch.Tensor,
    evaluate: bool,
    shared: dict[str, Any],
    by_source: _BySource,
) -> dict[str, torch.Tensor]:
    cross_entropy_R = None
    if evaluate:
        cross_entropy_R = torch.nn.functional.cross_entropy(
            logits_RV.float(), shared["labels_R"], reduction="none"
        )
    output = distill_loss(logits_RV, **shared)
    return _result(output, labels_BL, shared["spec"], cross_entropy_R, by_source)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _from_head(
    model: Any,
    hidden_RD: torch.Tensor,
    labels_BL: torch.Tensor,
    evaluate: bool,
    chunks: dict[str, Any],
    shared: dict[str, Any],
    by_source: _BySource,
) -> dict[str, torch.Tensor]:
    """The loss as what the output head gives for hidden states, in a call of the head: only there
    do wrappers (FSDP2 shards heads on their own) have its weight in one piece."""

    def forward(hidden_RD: torch.Tensor) -> dict[str, torch.Tensor]:
        head = Head.of(model)
        output = linear_distill_loss(
            hidden_RD,
            head.weight_VD,
            bias_V=head.bias_V,
            softcap=head.softcap,
            scale=head.scale,
            logits_dtype=_linear_dtype(hidden_RD),
            **chunks,
            **shared,
        )
        cross_entropy_R = None
        if evaluate:
            cross_entropy_R = _cross_entropy(hidden_RD, head, shared["labels_R"])
        return _result(output, labels_BL, shared["spec"], cross_entropy_R, by_source)

    module = model.get_output_embeddings()
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        return module(hidden_RD)
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _linear_dtype(hidden_RD: torch.Tensor) -> torch.dtype:
    """Of what a linear layer makes of hidden states: under autocast these are float32 themselves,
    and products in float32 would take as long as all the rest of the step."""
    device = hidden_RD.device.type
    if hidden_RD.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden_RD.dtype


def _result(
    output: DistillOutput,
    labels_BL: torch.Tensor,
    spec: DistillSpec,
    cross_entropy_R: torch.Tensor | None,
    by_source: _BySource,
) -> dict[str, torch.Tensor]:
    labels_R = labels_BL.flatten()
    sums = batch_sums(output, labels_R, spec, cross_entropy_R)
    sources_R, num_sources = by_source
    if sources_R is not None:
        loss_R = cross_entropy_R
        if loss_R is None:
            loss_R = output.weight_R * (spec.alpha * output.ce_R + spec.beta * output.kd_R)
        found = source_sums(loss_R.detach(), labels_R != -100, sources_R, num_sources)
        sums = torch.cat((sums, found))
    return {
        "loss": output.loss,
        "sums": sums,
        "row_losses": row_losses(output, labels_BL, spec),
    }


@torch.no_grad()
def row_losses(output: DistillOutput, labels_BL: torch.Tensor, spec: DistillSpec) -> torch.Tensor:
    """What each row adds to the sum of the losses, [B]; which row is to blame if it is not
    finite."""
    parts_R = output.weight_R * (spec.alpha * output.ce_R + spec.beta * output.kd_R)
    return parts_R.view(labels_BL.shape).masked_fill(labels_BL == -100, 0.0).sum(1)


def zero_sums(num_sources: int, device: torch.device) -> torch.Tensor:
    """What sums of batches with so many sources are added to."""
    return torch.zeros(len(SUM_NAMES) + 2 * num_sources, dtype=torch.float64, device=device)


@torch.no_grad()
def batch_sums(
    output: DistillOutput,
    labels_R: torch.Tensor,
    spec: DistillSpec,
    cross_entropy_R: torch.Tensor | None,
) -> torch.Tensor:
    """Sums over a batch in the order of SUM_NAMES: valid positions, positions of each strategy, JS
    in bits, the parts alpha * CE and beta * T^2 D of the loss, cross entropy of all valid
    positions (0 unless given), and KL = T^2 D over the positions with a teacher target
    (kl_positions: BLENDED and T1_ONLY).
    """
    valid_R = labels_R != -100
    strategy_R = output.strategy_R.masked_fill(~valid_R, -1)
    weight_R = output.weight_R.double()
    has_target_R = (strategy_R == 0) | (strategy_R == 1)
    sums = [
        valid_R.sum(),
        *((strategy_R == number).sum() for number in range(len(STRATEGY_NAMES))),
        output.js_R.double().sum(),
        spec.alpha * (weight_R * output.ce_R).sum(),
        spec.beta * (weight_R * output.kd_R).sum(),
        weight_R.new_zeros(()) if cross_entropy_R is None else cross_entropy_R.double().sum(),
        (output.kd_R.double() * has_target_R).sum(),
        has_target_R.sum(),
    ]
    return torch.stack([value.double() for value in sums])


def _cross_entropy(hidden_RD: torch.Tensor, head: Head, labels_R: torch.Tensor) -> torch.Tensor:
    """Cross entropy at T = 1, float32, 0 where there is no label; in chunks."""
    (kept,) = (labels_R != -100).nonzero(as_tuple=True)
    chunk = max(2**25 // head.weight_VD.shape[0], 16)
    found_R = torch.zeros(labels_R.shape, dtype=torch.float32, device=hidden_RD.device)
    for rows in kept.split(chunk):
        logits_RV = head_logits(
            hidden_RD[rows], head.weight_VD, head.bias_V, head.softcap, head.scale
        ).float()
        found_R[rows] = torch.nn.functional.cross_entropy(
            logits_RV, labels_R[rows], reduction="none"
        )
    return found_R


def as_metrics(sums: torch.Tensor) -> dict[str, float]:
    """Shares, mean JS and parts of the loss from summed SUM_NAMES."""
    value = dict(zip(SUM_NAMES, sums[: len(SUM_NAMES)].tolist(), strict=True))
    valid = max(value["valid"], 1.0)
    metrics = {f"share_{name.lower()}": value[name] / valid for name in STRATEGY_NAMES}
    metrics["mean_js"] = value["js"] / valid
    metrics["loss_ce"] = value["ce"] / valid
    metrics["loss_kd"] = value["kd"] / valid
    return metrics
