"""Settings of ``distill train``: the fields of TrainingArguments and DistillSpec, and a few of our
own."""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments

from logitcache.config import explain
from logitcache.errors import UsageError
from logitcache_kernels import DistillSpec

SPEC_FIELDS = tuple(f.name for f in dataclasses.fields(DistillSpec))


@dataclass
class DistillConfig(TrainingArguments):
    """TrainingArguments with the fields of DistillSpec (see there) and of the averaged weights.

    Unlike TrainingArguments, steps are logged one by one (on a GPU, which must be waited for to
    know a loss, ten together), nothing is reported to outside services, two checkpoints are kept,
    and bf16 autocast is on where a GPU can do it.
    """

    temperature: float = field(default=2.0, metadata={"help": "T of the divergence"})
    alpha: float = field(default=0.1, metadata={"help": "weight of cross entropy with gold labels"})
    beta: float = field(default=0.9, metadata={"help": "weight of T^2 * divergence"})
    gamma: float = field(default=0.0, metadata={"help": "weight of the agreement term"})
    divergence: str = field(default="forward_kl", metadata={"help": "forward_kl, reverse_kl, jsd"})
    jsd_beta: float = field(default=0.5, metadata={"help": "jsd: weight of the target, in (0, 1)"})
    js_threshold: float = field(default=0.1, metadata={"help": "bits below which teachers blend"})
    confidence_threshold: float = field(
        default=0.8, metadata={"help": "confidence above which teacher 1 stands alone"}
    )
    confidence: str = field(default="top1", metadata={"help": "top1 or entropy"})
    gold_weight: float = field(default=0.5, metadata={"help": "weight of GOLD_FALLBACK positions"})
    tail: str = field(
        default="bucket", metadata={"help": "top-k supports: bucket, renormalise, none"}
    )
    taboo: str = field(default="target", metadata={"help": "taboo ids: target or neutral"})
    taboo_words: str | None = field(
        default=None, metadata={"help": "file of words and phrases the student must not say"}
    )
    taboo_variants: bool = field(
        default=False, metadata={"help": "taboo words in lower, upper and title case too"}
    )
    laws: str | None = field(
        default=None, metadata={"help": "file of laws, checked at each evaluation and at the end"}
    )
    suite: str | None = field(
        default=None, metadata={"help": "suite file whose law items are prompts for the laws"}
    )

    ema_decay: float = field(
        default=0.999,
        metadata={
            "help": "of the averaged weights; held to (1 + t) / (10 + t) at step t; 0 is off"
        },
    )
    loss_chunk: int | None = field(
        default=None,
        metadata={
            "help": "positions whose logits exist at once; None: as many as are fastest, with "
            "gradient_checkpointing 1024 at most"
        },
    )

    eval_rows: int = field(
        default=0, metadata={"help": "the last rows of the store, held out and evaluated"}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "sdpa, flash_attention_2, ...; None: transformers' choice, on a GPU varlen "
            "(torch's flash attention, segment by segment) where that is sdpa"
        },
    )
    lora_rank: int = field(default=0, metadata={"help": "of LoRA adapters; 0 trains all weights"})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "LoRA's scale is alpha / rank; None is twice the rank"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "of the adapters' input"})
    lora_targets: str | list[str] = field(
        default="all-linear", metadata={"help": "names of the layers that get adapters"}
    )

    logging_steps: float = field(  # type: ignore[assignment]
        default=None, metadata={"help": "log every N steps; None: 10 on a GPU, 1 on a CPU"}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "newest checkpoints that are kept; None keeps all"}
    )
    # A transformers model asks for a search for unused weights by default, at every step; here all
    # that are trained are used.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "DDP: look for weights without a gradient"}
    )
    fsdp: bool | str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "true: FSDP2, weights in shards over the processes' GPUs"}
    )
    dataloader_num_workers: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "processes that read the store; None: 2 to 4 on a GPU, 0 on a CPU"},
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "must stay off"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay off"})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "see transformers"})
    bf16: bool = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bf16 autocast; None: where it works"}
    )

    def __post_init__(self) -> None:
        import torch

        if self.bf16 is None:
            self.bf16 = not (self.fp16 or self.use_cpu) and (
                torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            )
        if self.logging_steps is None:
            self.logging_steps = 10 if torch.cuda.is_available() and not self.use_cpu else 1
        if self.dataloader_num_workers is None:
            on_gpu = torch.cuda.is_available() and not self.use_cpu
            self.dataloader_num_workers = _readers() if on_gpu else 0
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else the processes of torchrun would not find one another
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor: the distillation loss has none; expected 0")
        if self.deepspeed:
            raise ValueError("deepspeed: its checkpoints are pickles; expected fsdp, or neither")
        if self.save_only_model:
            raise ValueError(
                "save_only_model: a run cannot go on from such a checkpoint; expected false "
                "(the student itself is in --out)"
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                "train_sampling_strategy: rows of a store have one length; expected random or "
                f"sequential, found {self.train_sampling_strategy}"
            )
        if min(self.eval_rows, self.lora_rank, self.dataloader_num_workers) < 0:
            raise ValueError("eval_rows, lora_rank, dataloader_num_workers: expected 0 or more")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected a number in [0, 1), found {self.ema_decay}")
        self.spec()  # refuses what it does not know
        super().__post_init__()
        if self.fsdp and int(self.fsdp_config.get("version", 2)) != 2:  # type: ignore[union-attr]
            raise ValueError(f"fsdp_config: version: expected 2, found {self.fsdp_config}")

    @property
    def n_gpu(self) -> int:
        """One GPU a process: nn.DataParallel would bypass the loss; several GPUs are torchrun's
        job."""
        return min(int(super().n_gpu), 1)

    def spec(self, **changes: Any) -> DistillSpec:
        """The DistillSpec of these settings."""
        return DistillSpec(**{**{name: getattr(self, name) for name in SPEC_FIELDS}, **changes})


def _readers() -> int:
    """Processes that read the store for one that trains on a GPU. Two keep up with most students,
    but not with a compiled one of 135 million weights on an H200."""
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return min(max(cores // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), 2), 4)


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Turn settings from a file or --set into typed values. UsageError names each that is wrong."""
    hints = typing.get_type_hints(DistillConfig)
    known = {f.name for f in dataclasses.fields(DistillConfig) if f.init}
    result, problems = {}, []
    for name, value in settings.items():
        if name == "output_dir":
            problems.append("output_dir: is set by --out")
        elif name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            problems.append(f"{name}: no such setting" + (f"; is it {close[0]}?" if close else ""))
        else:
            try:
                result[name] = TypeAdapter(hints[name]).validate_python(value)
            except ValidationError as error:
                problems.append(f"{name}: {explain(error)}")
    if problems:
        raise UsageError(
            "\n".join(problems), "settings are the fields of TrainingArguments and DistillSpec"
        )
    return result


def distill_config(settings: Mapping[str, Any], output_dir: str) -> DistillConfig:
    """Make the resolved configuration. UsageError for values that do not go together."""
    try:
        return DistillConfig(**check_settings(settings), output_dir=output_dir)
    except (ValueError, ImportError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(str(error)) from None
