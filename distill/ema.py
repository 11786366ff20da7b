"""Exponential moving average of the weights, kept in float32.

In bfloat16 a decay of 0.999 moves nothing: the change of a step is below half a unit in the last
place. Only weights that are trained are averaged: of a student with adapters, the adapters.
torch's AveragedModel does the same and waits for the GPU at every step, as its factor is a tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .processes import like


def trained_weights(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters of a model that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class WeightAverage:
    """Average of a model's trained weights, d * average + (1 - d) * weights, d = min(decay,
    (1 + t) / (10 + t)), t updates after the first weights.

    weights: the averaged weights by the names of the model, float32. updates: t.
    """

    def __init__(self, model: Any, decay: float):
        self.decay, self.updates = decay, 0
        self._live = trained_weights(model)
        self.weights = {name: p.detach().float().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        kept = min(self.decay, (1.0 + self.updates) / (10.0 + self.updates))
        live = [p.detach().float() for p in self._live.values()]
        torch._foreach_lerp_(list(self.weights.values()), live, 1.0 - kept)
        self.updates += 1

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the averaged weights into the model for as long as the context lasts."""
        raw = {name: p.detach().clone() for name, p in self._live.items()}
        self._set(self.weights)
        try:
            yield
        finally:
            self._set(raw)

    @torch.no_grad()
    def _set(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._live.items():
            parameter.copy_(weights[name])

    @torch.no_grad()
    def load(self, weights: Mapping[str, torch.Tensor], updates: int) -> None:
        """Take up averaged weights where they were left."""
        self.updates = updates
        for name, averaged in self.weights.items():
            averaged.copy_(like(weights[name], averaged))
