"""Progress of training: a bar on a terminal, a plain line every 30 s elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import click

from logitcache.progress import terminal_bar

_PLAIN_INTERVAL_S = 30.0
_SHARES = ("blended", "t1_only", "gold_fallback", "skip")


def describe(logs: dict[str, float]) -> str:
    """Loss, shares of the strategies and speed of one record, on a line."""
    shares = ", ".join(f"{name.upper()} {logs[f'share_{name}']:.0%}" for name in _SHARES)
    return f"loss {logs['loss']:.4f}, {shares}, {logs['tokens_per_second']:,.0f} tokens/s"


class TrainProgress:
    """Shows step, loss, what the gate decides, speed and time left; call it as train.Report."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self._start: tuple[float, int] | None = None
        self._said = time.monotonic()
        self._detail = ""
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> TrainProgress:
        self._bar = terminal_bar(self.quiet, "step", "")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

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
        last = step == total and logs is not None
        if self.quiet or not self._detail or not (now - self._said >= _PLAIN_INTERVAL_S or last):
            return
        self._said = now
        since, first = self._start
        left = ""
        if step > first and step < total:
            left = f", {(now - since) / (step - first) * (total - step):,.0f} s left"
        click.echo(f"step {step:,} of {total:,}: {self._detail}{left}", err=True)
