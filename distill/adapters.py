"""LoRA adapters on a student, by peft: trained alone, merged into the student that is saved."""

from __future__ import annotations

from typing import Any

from transformers import set_seed

from logitcache.errors import UsageError

from .config import DistillConfig


def with_adapters(model: Any, config: DistillConfig) -> Any:
    """The model itself, or with lora_rank a PeftModel around it; UsageError where the adapters do
    not fit it."""
    if not config.lora_rank:
        return model
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError:
        raise UsageError(
            "lora_rank: adapters need the package peft", "pip install 'logitcache[peft]'"
        ) from None
    set_seed(config.seed)  # the adapters' first weights are drawn
    rank = config.lora_rank
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=2 * rank if config.lora_alpha is None else config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_targets,
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise UsageError(f"lora_targets: {error}") from None
