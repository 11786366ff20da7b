"""What benchmarks.train_step trains: students and teachers of given shapes, a store, and the losses
that others would take."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from logitcache.causal_lm import Head, hidden_states

from .models import make_model, save_model, write_text

# In a batch. Steps of 8 rows are so short for 135M that the host cannot launch them in time.
ROWS = {"135M": 32, "0.5B": 8, "1.5B": 8, "smoke": 2}
# About three times the student's weights.
LARGE = {"135M": "0.4B teacher", "0.5B": "1.5B", "1.5B": "4.6B teacher", "smoke": "smoke teacher"}


def make_folders(work: Path, shape: str, source: Path | None, device: torch.device) -> list[Path]:
    """Folders of two generations with a tokenizer of the whole vocabulary: a real model and a
    disturbed copy, or both made. They are teachers 1 and 2; the first is the student too."""
    from logitcache.causal_lm import load_causal_lm
    from logitcache.tokenise import load_tokenizer

    folders = [work / "one", work / "two"]
    if all((folder / "config.json").exists() for folder in folders):
        return folders
    if source is None:
        model = make_model(shape, torch.bfloat16, device)
    else:
        model = load_causal_lm(source, torch.bfloat16, device)
    for number, folder in enumerate(folders):
        with torch.no_grad():
            for parameter in model.parameters():
                if number and parameter.ndim > 1:
                    parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
        if source is None:
            save_model(model, folder)
        else:
            model.save_pretrained(folder)
            load_tokenizer(source).save_pretrained(folder)
    return folders


def make_store(
    work: Path, folders: list[Path], tokens: int, seq_len: int, device: torch.device
) -> Path:
    from logitcache import build

    write_text(folders[0], work / "data.jsonl", tokens)
    build(
        teacher1=folders[0],
        teacher2=folders[1],
        data=[work / "data.jsonl"],
        seq_len=seq_len,
        out=work / "store",
        device=str(device),
        fresh=True,
    )
    return work / "store"


def cross_entropies(smoke: bool) -> dict[str, Callable[[Any, dict[str, Any]], torch.Tensor]]:
    """CE-only fine-tuning by name: functions of a model and its inputs, whole batches averaged.
    Those of packages that are not installed are left out."""

    def parts(
        model: Any, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """In bfloat16 as autocast would have them, which not all of these look at."""
        hidden_RD = hidden_states(
            model,
            *(inputs[name] for name in ("input_ids", "position_ids", "bounds", "longest")),
        ).flatten(0, 1)
        weight_VD = Head.of(model).weight_VD.bfloat16()
        return hidden_RD.bfloat16(), weight_VD, inputs["labels"].flatten()

    def plain(
        hidden_RD: torch.Tensor, weight_VD: torch.Tensor, labels_R: torch.Tensor
    ) -> torch.Tensor:
        return F.cross_entropy((hidden_RD @ weight_VD.T).float(), labels_R)

    compiled = plain if smoke else torch.compile(plain)

    def torch_ce(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        return compiled(*parts(model, inputs))

    found: dict[str, Callable[[Any, dict[str, Any]], torch.Tensor]] = {"ce torch compile": torch_ce}
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()

        def liger(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            hidden_RD, weight_VD, labels_R = parts(model, inputs)
            return fused(weight_VD, hidden_RD, labels_R)

        found["ce liger"] = liger
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy

        def apple(impl: str) -> Callable[[Any, dict[str, Any]], torch.Tensor]:
            def loss(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
                return linear_cross_entropy(*parts(model, inputs), impl=impl)

            return loss

        found |= {"ce apple cce": apple("cce"), "ce apple compile": apple("torch_compile")}
    return found


def online_loss(
    logits_RV: torch.Tensor,
    first_RV: torch.Tensor,
    second_RV: torch.Tensor,
    labels_R: torch.Tensor,
    spec: Any,
) -> torch.Tensor:
    """The gated two-teacher loss with forward KL, top-1 confidence and every label gold, from whole
    logits of the teachers: what a run without a store computes. Averaged over valid positions."""
    p1_RV, p2_RV = first_RV.float().softmax(-1), second_RV.float().softmax(-1)
    mean_RV = (p1_RV + p2_RV) / 2

    def bits(p_RV: torch.Tensor) -> torch.Tensor:
        return (torch.special.xlogy(p_RV, p_RV) - torch.special.xlogy(p_RV, mean_RV)).sum(-1)

    js_R = (bits(p1_RV) + bits(p2_RV)) / (2 * 0.6931471805599453)
    top1_R, top2_R = p1_RV.amax(-1), p2_RV.amax(-1)
    blended_R = js_R < spec.js_threshold
    gold_R = ~blended_R & (top1_R <= spec.confidence_threshold)
    share_R = torch.where(blended_R, top1_R / (top1_R + top2_R), torch.ones_like(top1_R))
    heat = spec.temperature
    target_RV = share_R[:, None] * (first_RV.float() / heat).softmax(-1)
    target_RV += (1 - share_R[:, None]) * (second_RV.float() / heat).softmax(-1)
    logp_RV = (logits_RV.float() / heat).log_softmax(-1)
    cross_R = (torch.special.xlogy(target_RV, target_RV) - target_RV * logp_RV).sum(-1)
    ce_R = F.cross_entropy(logits_RV.float(), labels_R, reduction="none")
    kd_R = torch.where(gold_R, ce_R, heat**2 * cross_R)
    weight_R = torch.where(gold_R, spec.gold_weight, 1.0) * (labels_R != -100)
    total = (weight_R * (spec.alpha * ce_R + spec.beta * kd_R)).sum()
    return total / (labels_R != -100).sum().clamp_min(1)
