"""What every command of ``logitcache`` and ``distill`` shares: options, errors, exit codes,
signals."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import click

from .errors import LogitCacheError
from .files import DISK_FULL

_RESOURCE_ERRORS = {
    **DISK_FULL,
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "read-only file system",
    errno.EMFILE: "too many open files",
    errno.ENOMEM: "out of memory",
    errno.EIO: "input/output error",
}
_PATH_ERRORS = (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


@dataclass(frozen=True)
class Options:
    """The options that every command has."""

    as_json: bool
    quiet: bool
    verbose: bool
    debug: bool

    def result(self, document: dict[str, Any], text: str) -> None:
        """Print a command's result to stdout: one JSON document with --json, else text. Under
        torchrun rank 0 does."""
        if os.environ.get("RANK", "0") != "0":
            return
        click.echo(json.dumps(document, indent=1) if self.as_json else text)

    def note(self, text: str) -> None:
        """Say something on stderr, unless --quiet."""
        if not self.quiet:
            click.echo(text, err=True)


class ManyFiles(click.Command):
    """A command that reads ``--data A B``, as a shell makes of ``--data *.jsonl``, as two."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        values = 0  # of the --data being read, 0 outside of one
        for argument in args:
            if argument.startswith("-"):
                values = int(argument == "--data")
            elif values:
                if values > 1:
                    spread.append("--data")
                values += 1
            spread.append(argument)
        return super().parse_args(ctx, spread)


def common_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add --json, --quiet, -v and --debug; the function gets them as its first argument."""

    @click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
    @click.option("--quiet", is_flag=True, help="No progress and no notes on stderr.")
    @click.option("-v", "verbose", is_flag=True, help="Log more to stderr.")
    @click.option("--debug", is_flag=True, help="Log all, and show tracebacks of errors.")
    @functools.wraps(function)
    def wrapper(
        *args: Any, as_json: bool, quiet: bool, verbose: bool, debug: bool, **kwargs: Any
    ) -> None:
        options = Options(as_json, quiet, verbose, debug)
        _set_up_logging(options)
        try:
            function(options, *args, **kwargs)
        except BaseException as error:
            if isinstance(error, (click.exceptions.Exit, SystemExit)):
                raise
            _fail(error, options)

    return wrapper


def quiet_libraries() -> None:
    """Stop transformers' loading bars and advice, which would mix with our own output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def run_group(group: click.Group, name: str) -> NoReturn:
    """Run a command line and exit with the code that DESIGN gives it."""
    try:
        code = group.main(prog_name=name, standalone_mode=False)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:  # wrong flags: 2
        if "--json" in sys.argv:
            _print_error(error.format_message(), None, error.exit_code)
        error.show()
        code = error.exit_code
    except click.exceptions.Abort:
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _set_up_logging(options: Options) -> None:
    level = logging.WARNING
    if options.debug:
        level = logging.DEBUG
    elif options.verbose:
        level = logging.INFO
    elif options.quiet:
        level = logging.ERROR
    logging.basicConfig(
        stream=sys.stderr, level=level, format="%(levelname)s %(name)s: %(message)s"
    )
    for noisy in ("asyncio", "filelock", "urllib3", "httpx", "fsspec"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))


def explain_error(error: BaseException) -> tuple[int, str, str | None]:
    """Exit code, message and next step of any error."""
    if isinstance(error, LogitCacheError):
        return error.exit_code, str(error), error.hint
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted", None
    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message(), None
    if isinstance(error, OSError) and error.errno in _RESOURCE_ERRORS:
        where = f" {error.filename}" if error.filename else ""
        return 6, f"{_RESOURCE_ERRORS[error.errno]}:{where} ({os.strerror(error.errno)})", None
    if isinstance(error, OSError) and error.errno in _PATH_ERRORS:
        return 2, f"{error.filename}: {os.strerror(error.errno)}", "check the paths of this command"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        first = str(error).splitlines()[0] if str(error) else ""
        return 6, f"out of memory: {first}", "use smaller batches"
    kind = type(error).__name__
    return (
        1,
        f"{kind}: {error}",
        "this is a bug of ours: run it again with --debug and report what it says",
    )


def _fail(error: BaseException, options: Options) -> NoReturn:
    code, message, hint = explain_error(error)
    if options.debug:
        import traceback

        traceback.print_exception(error)
    if options.as_json:
        _print_error(message, hint, code)
    click.echo(f"error: {message}" + (f"\n  next: {hint}" if hint else ""), err=True)
    raise click.exceptions.Exit(code)


def _print_error(message: str, hint: str | None, code: int) -> None:
    """The one JSON document of a command that failed; under torchrun it is rank 0's to print."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(json.dumps({"error": message, "hint": hint, "exit_code": code}, indent=1))


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a wish to stop; the second ends the process with code
    130.

    Yields a function that says whether stopping was asked for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked: list[float] = []
    owner = os.getpid()

    def handle(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked data worker: a Ctrl-C is its parent's business
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if asked:
            # torchrun passes on a Ctrl-C that the terminal has sent to every process already.
            if "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - asked[0] < 1.0:
                return
            # Every file on disk is whole at any time, so there is nothing to clean up.
            os._exit(130)
        asked.append(time.monotonic())
        name = signal.Signals(number).name
        click.echo(f"{name}: stopping at the next safe point; once more to stop at once", err=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
