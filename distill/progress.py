"""Progress of training: a bar on a terminal, a plain line every 30 s elsewhere."""

from __future__ import annotations

import time
from typing import Any

import click

from logitcache.progress import TerminalProgress

_SHARES = ("blended", "t1_only", "gold_fallback", "skip")


def describe(logs: dict[str, float]) -> str:
    """Loss, shares of the strategies and speed of one record, on a line."""
    shares = ", ".join(f"{name.upper()} {logs[f'share_{name}']:.0%}" for name in _SHARES)
    return f"loss {logs['loss']:.4f}, {shares}, {logs['tokens_per_second']:,.0f} tokens/s"


class TrainProgress(TerminalProgress):
    """Shows step, loss, what the gate decides, speed and time left; call it as train.Report."""

    def __init__(self, quiet: bool):
        super().__init__(quiet, "step", "")
        self._start: tuple[float, int] | None = None
        self._detail = ""
        self._task: Any = None

    def note(self, text: str) -> None:
        """Say something without disturbing the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self.quiet:
            click.echo(text, err=True)

    def __call__(self, step: int, total: int, logs: dict[str, float] | None) -> None:
        now = time.monotonic()
        if logs is not None:
            self._detail = describe(logs)
        if self._start is None:  # the first step, which compiles and opens files, is no measure
            self._start = (now, step)
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("", total=total, detail="")
            self._bar.update(self._task, completed=step, detail=self._detail)
            return
        if not self._detail:
            return
        since, first = self._start
        left = ""
        if step > first and step < total:
            left = f", {(now - since) / (step - first) * (total - step):,.0f} s left"
        last = step == total and logs is not None
        self._say(now, f"step {step:,} of {total:,}: {self._detail}{left}", last)
