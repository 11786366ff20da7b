"""Progress of a build: a bar on a terminal, a plain line every 30 s elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import click

_PLAIN_INTERVAL_S = 30.0


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.2f} TB"


def every_30_s(show: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """Pass on one call in 30 s, for commands whose progress is a plain line."""
    last = time.monotonic()

    def call(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _PLAIN_INTERVAL_S:
            last = time.monotonic()
            show(done, total)

    return call


class TerminalProgress:
    """A bar on a terminal for as long as the context lasts, whose tasks have a field "detail";
    elsewhere there is none, and lines are said."""

    def __init__(self, quiet: bool, name: str, unit: str):
        self.quiet, self._name, self._unit = quiet, name, unit
        self._said = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn(self._name),
                BarColumn(),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f}" + self._unit),
                TextColumn("{task.fields[detail]}", markup=False),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _say(self, now: float, line: str, last: bool) -> bool:
        """A plain line, if the one before is old enough or this is the last; whether it was."""
        due = not self.quiet and (now - self._said >= _PLAIN_INTERVAL_S or last)
        if due:
            self._said = now
            click.echo(line, err=True)
        return due


class BuildProgress(TerminalProgress):
    """Shows tokens/s, time left and bytes written of each teacher; call it as builder.Report.

    rates: tokens per second of each teacher's own run, for the command's result.
    """

    def __init__(self, quiet: bool):
        super().__init__(quiet, "{task.description}", " tokens")
        self.rates: dict[str, float] = {}
        self._start: dict[str, tuple[float, int]] = {}
        self._last_written = 0
        self._tasks: dict[str, Any] = {}

    def __call__(self, teacher: str, done: int, total: int, written: int, shard: int) -> None:
        now = time.monotonic()
        if teacher not in self._start:
            # The first report comes when the model is loaded.
            self._start[teacher] = (now, done)
        since, before = self._start[teacher]
        if now > since and done > before:
            self.rates[teacher] = (done - before) / (now - since)
        rate = self.rates.get(teacher, 0.0)
        detail = f"{rate:,.0f} tokens/s, {_size(written)}"
        if self._bar is not None:
            if teacher not in self._tasks:
                self._tasks[teacher] = self._bar.add_task(teacher, total=total, detail="")
            self._bar.update(self._tasks[teacher], completed=done, detail=detail)
        else:
            last = done == total and written != self._last_written
            left = f", {(total - done) / rate:,.0f} s left" if rate and done < total else ""
            line = f"{teacher}: {done:,} of {total:,} tokens, {detail}{left}"
            if self._say(now, line, last):
                self._last_written = written
