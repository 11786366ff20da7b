"""Exponential moving average of the weights, kept in float32.

``torch.optim.swa_utils.AveragedModel`` on a float32 copy: in bfloat16 a decay of 0.999 moves
nothing, the change of a step is below half a unit in the last place. Only weights that are trained
are averaged: of a student with adapters, the adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from .processes import like


def trained_weights(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters of a model that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class WeightAverage:
    """Average of a model's trained weights, d * average + (1 - d) * weights, d = min(decay,
    (1 + t) / (10 + t)), t updates after the first weights."""

    def __init__(self, model: Any, decay: float):
        self.decay = decay
        self._parameters = trained_weights(model)
        self._live = torch.nn.ParameterList(self._parameters.values())
        self._all_float32 = all(p.dtype == torch.float32 for p in self._live)
        self._kept = 0.0
        # All weights in a few kernels. The factor is a number of the host: as a tensor of the
        # device it would have to be waited for at every step.
        self.averaged = AveragedModel(
            self._as_float32(),
            multi_avg_fn=lambda old, new, _: torch._foreach_lerp_(old, new, 1.0 - self._kept),
        )
        self.averaged.requires_grad_(False)
        self.averaged.n_averaged.fill_(1)  # the initial weights were the first

    def _as_float32(self) -> torch.nn.ParameterList:
        return torch.nn.ParameterList(
            torch.nn.Parameter(p.detach().float(), requires_grad=False) for p in self._live
        )

    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        step = self.updates
        self._kept = min(self.decay, (1.0 + step) / (10.0 + step))
        self.averaged.update_parameters(self._live if self._all_float32 else self._as_float32())

    @property
    def updates(self) -> int:
        return int(self.averaged.n_averaged) - 1  # on the host: nothing is waited for

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The averaged weights by the names of the model."""
        return dict(zip(self._parameters, self.averaged.module, strict=True))  # type: ignore[call-overload]

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the averaged weights into the model for as long as the context lasts."""
        pairs = list(zip(self._live, self.weights.values(), strict=True))
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

    def load(self, weights: Mapping[str, torch.Tensor], updates: int) -> None:
        """Take up averaged weights where they were left."""
        self.averaged.n_averaged.fill_(updates + 1)
        with torch.no_grad():
            for name, averaged in self.weights.items():
                averaged.copy_(like(weights[name], averaged))
