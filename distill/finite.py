"""Losses and gradients that are not finite: found without making the host wait for the GPU.

On a CPU a step is checked before its optimizer step. On a GPU the answer is copied to the host
while work goes on and read one step later: waiting for it would leave the GPU idle once a step. In
the meantime nothing of the bad step counts: optimizers that know found_inf, as the fused ones do
(the default), skip it on the device, and before weights are saved, evaluated or given back the
answer is waited for. So no checkpoint and no student ever holds the effect of such a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from logitcache.errors import NonFiniteError

_MOST_NAMED = 20


class FiniteCheck:
    """Collects a step's losses by row and its gradient norm; raises NonFiniteError."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.last_losses: list[float] = []
        self._rows: list[list[int]] = []
        self._row_losses: list[torch.Tensor] = []
        self._pending: tuple[int, list[list[int]], torch.Tensor, Any] | None = None

    def add(self, rows: Sequence[int], row_losses_B: torch.Tensor) -> None:
        """Take in the losses of a micro-batch."""
        self._rows.append(list(rows))
        self._row_losses.append(row_losses_B.detach()[: max(len(rows), 1)])

    def close_step(self, step: int, gradient_norm: torch.Tensor | float | None) -> torch.Tensor:
        """Before the optimizer step: check it, or on a GPU the one before it.

        gradient_norm: None where the gradient scaler looks at it. Returns whether all is finite, a
        bool tensor on the device.
        """
        self.wait()
        losses = torch.cat(self._row_losses).float()
        if not isinstance(gradient_norm, torch.Tensor):  # filled on the device: no copy to wait for
            gradient_norm = torch.full((), gradient_norm or 0.0, device=losses.device)
        values = torch.cat((losses, gradient_norm.float().to(losses.device).reshape(1)))
        event = None
        host = values
        if self.on_gpu:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.current_stream().record_event()
        self._pending = (step, self._rows, host, event)
        self._rows, self._row_losses = [], []
        if not self.on_gpu:
            self.wait()
        return values.isfinite().all()

    def wait(self) -> None:
        """Raise if the last step was not finite. On a GPU this waits until that is known."""
        if self._pending is None:
            return
        step, rows, values, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        if bool(values.isfinite().all()):
            return
        every = [row for part in rows for row in part]
        losses, norm = values[:-1].tolist(), float(values[-1])
        flat: list[int | None] = [
            row for part in rows for row in (*part, *([] if part else [None]))
        ]
        bad = [r for r, loss in zip(flat, losses, strict=True) if loss - loss != 0]
        if bad:
            what = f"loss is {next(x for x in losses if x - x != 0)} in row {_listed(bad)}"
        else:
            what = f"the gradient norm is {norm}; the rows of this step are {_listed(every)}"
        last = ", ".join(f"{loss:.4g}" for loss in self.last_losses[-_MOST_NAMED:]) or "none"
        raise NonFiniteError(
            f"step {step}: {what}; nothing of it was saved; last losses: {last}",
            "lower learning_rate, or look at these rows (logitcache inspect); checkpoints are as "
            "they were",
        )


def _listed(rows: Sequence[int | None]) -> str:
    named = ", ".join(map(str, rows[:_MOST_NAMED]))
    return named if len(rows) <= _MOST_NAMED else f"{named} and {len(rows) - _MOST_NAMED} more"


def skip_if(optimizer: Any, is_finite: torch.Tensor) -> None:
    """Make an optimizer that can take no step where is_finite is false, on the device."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~is_finite).float()
