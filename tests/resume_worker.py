"""Run by test_resume in a process of its own: a training run that dies at each point where it
changes the disk, and the same command after that. Prints one JSON document.

Arguments: a folder with a store and a student; a folder to work in. What a
process that died would leave is copied while one run goes on; forked processes that really die
there leave the same, which is tried at some of the points.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from crash_worker import failpoints, forked, state
from training_runs import request, same_run

from distill.checkpoint import checkpoints, find_checkpoint
from distill.run_folder import CHECKPOINTS
from distill.train import train
from logitcache.command import explain_error
from logitcache.errors import LogitCacheError

# The second checkpoint is written over the first, which is deleted then.
SHORT = {"max_steps": 2, "save_total_limit": 1}


def put_back(path: Path, snapshot: Path | None) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if snapshot is not None:
        shutil.copytree(snapshot, path)


def every_point(inputs: Path, work: Path) -> dict:
    """Die at each point, run the command again, compare."""
    path, folder = work / "out", work / "snapshots"
    folder.mkdir()
    names: list[str] = []

    def keep(name: str, _: Path) -> None:
        if path.exists():
            shutil.copytree(path, folder / str(len(names)))
        names.append(name)

    with failpoints(keep):
        train(request(inputs, path, **SHORT))
    result = {"names": sorted(set(names)), "points": len(names)}
    result |= {"unlike": [], "without_a_good_one": [], "differing": [], "runs": 0}
    step = len(names) // 6
    for point in range(step, len(names), step):
        put_back(path, None)
        if forked(lambda p: train(request(inputs, p, **SHORT)), path, str(point + 1)) != 137:
            result["unlike"].append([point, "did not die"])
        elif _names(path) != _names(folder / str(point)):
            result["unlike"].append(point)
    seen: set[object] = set()
    had_one = False
    for point, name in enumerate(names):
        snapshot = folder / str(point)
        if not snapshot.exists():
            continue
        put_back(path, snapshot)
        complete = [p.name for p in checkpoints(path / CHECKPOINTS)]
        had_one = had_one or bool(complete)
        if had_one and not complete:
            result["without_a_good_one"].append([point, name])
        # What the command finds once it has cleared away what was not finished. From states that
        # are equal by then it goes on equally.
        find_checkpoint(path / CHECKPOINTS, lambda _: None)
        found = state(path)
        if found in seen:
            continue
        seen.add(found)
        result["runs"] += 1
        put_back(path, snapshot)
        try:
            train(request(inputs, path, **SHORT, dataloader_num_workers=result["runs"] % 3))
        except LogitCacheError as error:
            result["differing"].append([point, name, str(error)])
        else:
            different = same_run(work / "undisturbed", path)
            if different:
                result["differing"].append([point, name, different])
    return result


def _names(path: Path) -> set[str]:
    return {name for name, _ in state(path)}


def full_disk(inputs: Path, work: Path) -> dict:
    """A disk that is full at each file of the second checkpoint and of the student."""
    path = work / "full"
    result: dict = {"codes": [], "messages": [], "lost": [], "differing": []}
    names: list[tuple[str, str]] = []
    # Below the folder: its own name is random, and may hold what is looked for.
    with failpoints(lambda name, p: names.append((name, str(Path(p).relative_to(path.parent))))):
        train(request(inputs, path, **SHORT))
    second = [n for n, (name, p) in enumerate(names) if name == "write" and "-2" in p]
    for point in second:
        passed = itertools.count()

        def fail(_: str, p: Path, passed=passed, point=point) -> None:
            if next(passed) == point:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(p))

        put_back(path, None)
        try:
            with failpoints(fail):
                train(request(inputs, path, **SHORT))
            result["codes"].append(0)
        except LogitCacheError as error:
            code, message, _ = explain_error(error)
            result["codes"].append(code)
            result["messages"].append(message)
        with contextlib.suppress(IndexError):
            if [p.name for p in checkpoints(path / CHECKPOINTS)] != ["checkpoint-1"]:
                result["lost"].append(point)
    train(request(inputs, path, **SHORT))
    result["differing"] = same_run(work / "undisturbed", path)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)  # no threads of its own: they would not survive a fork
    inputs, work = Path(sys.argv[1]), Path(sys.argv[2])
    train(request(inputs, work / "undisturbed", **SHORT))
    gc.collect()
    gc.freeze()  # else the Trainer walks through all of torch at every run
    results = {"points": every_point(inputs, work), "full": full_disk(inputs, work)}
    print(json.dumps(results))
