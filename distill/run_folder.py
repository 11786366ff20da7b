"""The folder of a training run: whose it is, and what may be deleted in it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from logitcache.errors import StoreError, UsageError
from logitcache.files import write_atomic

from .state import changed_keys

RUN_FILE, LOG_FILE, RAW_FOLDER, CHECKPOINTS = "run.json", "log.jsonl", "raw", "checkpoints"


def check_out(out: Path, inputs: dict[str, Path | None]) -> None:
    """Refuse an output folder in which --fresh would delete an input, or that lies in a store."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: expected a folder, found a file", "give --out a new folder")
    for name, path in inputs.items():
        if path is not None and path.resolve().is_relative_to(out.resolve()):
            raise UsageError(f"{out}: --out holds the {name} {path}", "give --out a new folder")
        if path is not None and name != "student" and out.resolve().is_relative_to(path.resolve()):
            raise UsageError(f"{out}: --out lies in the {name} {path}", "give --out a new folder")


def existing_run(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the run in a folder; None if the folder is free. UsageError if it is another
    run."""
    path = out / RUN_FILE
    if not path.is_file():
        others = _files_of_others(out)
        if others:
            raise UsageError(
                f"{out}: expected an empty folder or a run, found other files "
                f"({sorted(others)[0]}, ...)",
                "give --out a new folder",
            )
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record["identity"]
    except (json.JSONDecodeError, KeyError) as error:
        raise StoreError(
            f"{path}: not a run record: {error}", "give --fresh to train anew"
        ) from None
    changed = changed_keys(identity, found)
    if changed:
        raise UsageError(
            f"{out}: holds another run:\n  " + "\n  ".join(changed),
            "give --out another folder, or --fresh to delete this run and train anew",
        )
    return record


def _files_of_others(out: Path) -> list[str]:
    """What lies in a folder besides what a run leaves that ended before it wrote its record."""
    return [
        path.name
        for path in out.iterdir()
        if path.suffix not in (".lock", ".tmp")
        and not (path.name == CHECKPOINTS and path.is_dir() and not any(path.iterdir()))
    ]


def check_deletable(out: Path) -> None:
    if not (out / RUN_FILE).is_file() and _files_of_others(out):
        raise UsageError(
            f"{out}: --fresh deletes runs only, found other files", "remove it yourself"
        )


def drop_later_records(path: Path, step: int) -> None:
    """Forget records of steps that a resumed run will take again."""
    if path.is_file():
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line that a killed run did not finish
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        write_atomic(path, "".join(kept))
