"""The trained student as an ordinary transformers folder, averaged and raw, with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig

from logitcache.causal_lm import load_causal_lm
from logitcache.errors import ResourceError
from logitcache.files import delete, make_folder, move_files

from .adapters import with_adapters
from .card import CARD, model_card
from .ema import trained_weights
from .fit import core_model
from .processes import agreed, gathered
from .run_folder import RAW_FOLDER


def save_student(trainer: Any, source: Path, out: Path, record: Mapping[str, Any]) -> None:
    """Save the averaged weights as the student and the raw ones beside it, in the student's own
    dtype; adapters are merged. Each file is whole or not there. ResourceError on a full disk.

    Every process calls this; the first writes. The folders are made from the source's model with
    the trained weights put in, so that wrappers and shards of training need not be undone.
    """
    first = trainer.args.process_index == 0
    raw = gathered(trained_weights(trainer._core), first)
    averaged = raw if trainer.average is None else gathered(trainer.average.weights, first)

    def write() -> None:
        staged = out / ".student.tmp"
        delete(staged)
        make_folder(staged)
        for folder, weights in ((staged / RAW_FOLDER, raw), (staged, averaged)):
            _save(_filled(source, weights, trainer.args), folder)
            trainer.processing_class.save_pretrained(folder)
        (staged / CARD).write_text(model_card(record, trainer.reader.manifest), encoding="utf-8")
        move_files(staged, out)

    agreed(trainer.args, write)


@torch.no_grad()
def _filled(source: Path, weights: Mapping[str, torch.Tensor], args: Any) -> Any:
    """The source's model with the trained weights in it."""
    model = with_adapters(load_causal_lm(source, torch.float32, torch.device("cpu")), args)
    targets = trained_weights(core_model(model))
    for name, weight in weights.items():
        targets[name].copy_(weight)
    if args.lora_rank:
        model = model.merge_and_unload()
    dtype = getattr(AutoConfig.from_pretrained(source, local_files_only=True), "dtype", None)
    return model.to(dtype) if isinstance(dtype, torch.dtype) else model


def _save(model: Any, folder: Path) -> None:
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        if "os error 28" not in str(error):  # ENOSPC, in the words of its Rust
            raise
        raise ResourceError(
            f"disk full: {folder.parent}", "free some space, then run the same command again"
        ) from error
