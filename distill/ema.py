"""Exponential moving average of the weights, kept in float32.

``torch.optim.swa_utils.AveragedModel`` on a float32 copy: in bfloat16 a decay of 0.999 moves
nothing, the change of a step is below half a unit in the last place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

EMA_FILE = "ema.safetensors"


class WeightAverage:
    """Average of a model's parameters, d * average + (1 - d) * weights, d = min(decay, (1 + t) /
    (10 + t))."""

    def __init__(self, model: Any, decay: float):
        self.decay = decay
        self.model = model

        def average(old: Any, new: Any, num_averaged: Any) -> torch.Tensor:
            step = float(num_averaged) - 1.0  # the initial weights were the first
            kept = min(decay, (1.0 + step) / (10.0 + step))
            return old + (1.0 - kept) * (new.to(old.dtype) - old)

        self.averaged = AveragedModel(model, avg_fn=average).float()
        self.averaged.requires_grad_(False)
        self.averaged.n_averaged.fill_(1)

    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        self.averaged.update_parameters(self.model)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the averaged weights into the model for as long as the context lasts."""
        pairs = list(zip(self.model.parameters(), self.averaged.module.parameters(), strict=True))
        raw = [parameter.detach().clone() for parameter, _ in pairs]
        with torch.no_grad():
            for parameter, averaged in pairs:
                parameter.copy_(averaged)
        try:
            yield
        finally:
            with torch.no_grad():
                for (parameter, _), weights in zip(pairs, raw, strict=True):
                    parameter.copy_(weights)

    def save(self, folder: Path) -> None:
        """Write the averaged weights and their count into a checkpoint folder."""
        tensors = {
            name: parameter.detach().cpu().contiguous()
            for name, parameter in self.averaged.module.named_parameters()
        }
        tensors["n_averaged"] = self.averaged.n_averaged.detach().cpu()
        save_file(tensors, folder / EMA_FILE)

    def load(self, folder: Path) -> None:
        """Take up the averaged weights of a checkpoint folder."""
        tensors = load_file(folder / EMA_FILE)
        self.averaged.n_averaged.copy_(tensors.pop("n_averaged"))
        with torch.no_grad():
            for name, parameter in self.averaged.module.named_parameters():
                parameter.copy_(tensors[name])
