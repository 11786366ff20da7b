"""Run by test_crash in a process of its own: builds that die at a given point, and what follows.

One process forks for every crash, after the imports and with the models loaded, so that a crash
costs milliseconds. Prints one JSON document. Arguments: a folder with teacher1, teacher2 and
data.jsonl; a folder to work in; SCENARIO:MODE...
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from power_loss import Disk, losses, recorded

import logitcache.builder
import logitcache.files
import logitcache.layout
import logitcache.teacher
from logitcache import build, open_store
from logitcache.cli import cli
from logitcache.command import explain_error
from logitcache.errors import LogitCacheError, StoreError
from logitcache.files import FAILPOINT
from logitcache.info import describe_store
from logitcache.repair import repair, repair_settings
from logitcache.verify import verify_store

SEQ_LEN = 32
SHARD_POSITIONS = SEQ_LEN * 2  # the last of two shards is shorter
Action = Callable[[Path], object]


def contents(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def models_are_loaded_once() -> None:
    """What is read is the same in every process; only writing is under test."""
    load, plan = logitcache.teacher.load_causal_lm, logitcache.builder.plan
    logitcache.teacher.load_causal_lm = cache(load)
    plans: dict[object, object] = {}

    def plan_once(config, stop=lambda: False):
        key = config.model_copy(update={"out": Path(), "shard": None}).model_dump_json()
        if key not in plans:
            plans[key] = plan(config, stop)
        return plans[key]

    logitcache.builder.plan = plan_once
    sys.modules["logitcache.repair"].plan = plan_once


def forked(action: Action, path: Path, failpoint: str | None) -> int:
    """Run an action in a process of its own; its exit code."""
    child = os.fork()
    if child == 0:
        try:
            if failpoint is not None:
                os.environ[FAILPOINT] = failpoint
            action(path)
            os._exit(0)
        except LogitCacheError as error:
            os._exit(error.exit_code)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def scenarios(inputs: Path, work: Path) -> dict[str, tuple[Action, Path | None, list[Action]]]:
    """By name: the command under test, the folder that it finds, and the builds of every store
    that may be called complete while it runs, the finished one last."""
    common = {"data": (inputs / "data.jsonl",), "seq_len": SEQ_LEN, "device": "cpu"}
    one = {"teacher1": inputs / "teacher1", **common}
    two = {**one, "teacher2": inputs / "teacher2"}

    def shares(path: Path) -> None:
        for share in ("0/2", "1/2"):
            build(out=path, shard=share, **one)

    def prepared(name: str, make: Action) -> Path:
        make(work / name)
        return work / name

    def damaged(path: Path) -> None:
        build(out=path, **two)
        (path / "teacher1/certain/c.1.0.0").write_bytes(b"")
        (path / "rows/tokens/c.0.0").unlink()
        (path / "commits/teacher2-000001.json").write_text("{")
        (path / "teacher2/fields/zarr.json").write_text("{")
        (path / "teacher2/stray").write_bytes(b"x")

    def only(path: Path) -> object:
        return build(out=path, **one)

    def both(path: Path) -> object:
        return build(out=path, **two)

    def other(path: Path) -> object:
        return build(out=path, **{**two, "seq_len": SEQ_LEN // 2})

    return {
        "build": (both, None, [only, both]),
        "first": (only, None, [only]),
        "second": (both, prepared("first", only), [only, both]),
        "shares": (shares, None, [only]),
        "repair": (
            lambda path: repair(repair_settings(path, two)),
            prepared("damaged", damaged),
            [both],
        ),
        "fresh": (
            lambda path: build(out=path, fresh=True, **one),
            prepared("other", other),
            [other, only],
        ),
    }


def taken_for_complete(path: Path, verified: bool) -> list[str]:
    """Which readers take what is there for a complete store; verify, the slow one, on request."""
    said = []
    try:
        if describe_store(path)["complete"]:
            said.append("info")
    except StoreError:
        pass
    try:
        open_store(path)[:]
        said.append("open_store")
    except StoreError:
        pass
    if (said or verified) and not verify_store(path)[1]:
        said.append("verify")
    return said


def state(path: Path) -> frozenset[tuple[str, bytes | None]]:
    """All that is on disk, folders too."""
    return frozenset(
        (str(p.relative_to(path)), None if p.is_dir() else p.read_bytes())
        for p in path.rglob("*")
        if p.suffix != ".lock"
    )


class Trial:
    """A scenario and its undisturbed stores; counts what went wrong."""

    def __init__(self, inputs: Path, work: Path, name: str):
        self.action, self.start, legitimate = scenarios(inputs, work)[name]
        self.path = work / "store"
        self.seen: set[object] = set()
        self.stores = []
        for number, make in enumerate(legitimate):
            make(work / f"undisturbed{number}")
            self.stores.append(contents(work / f"undisturbed{number}"))
        self.result = {"points": 0, "states": 0, "differing": [], "misread": []}

    def again(self, start: Path | None = None) -> None:
        """Put back what the command finds."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.with_name("store.run.json").unlink(missing_ok=True)
        start = start or self.start
        if start is not None and start.is_dir():
            shutil.copytree(start, self.path)

    def check(self, point: object) -> None:
        """Of an interrupted store: nobody misreads it, and the same command finishes it."""
        self.result["points"] += 1
        found = state(self.path)
        if found in self.seen:
            return
        self.seen.add(found)
        self.result["states"] += 1
        said = taken_for_complete(self.path, verified=self.result["states"] % 4 == 0)
        if said and not self.is_one_of_ours(exactly="verify" in said):
            self.result["misread"].append([point, said])
        try:
            self.action(self.path)
        except LogitCacheError as error:
            self.result["differing"].append([point, str(error)])
        else:
            if contents(self.path) != self.stores[-1]:
                self.result["differing"].append(point)

    def is_one_of_ours(self, exactly: bool) -> bool:
        found = contents(self.path)
        if not exactly:  # a temporary file beside a complete store harms nobody
            found = {name: data for name, data in found.items() if not name.endswith(".tmp")}
        return found in self.stores


def snapshots(trial: Trial, folder: Path) -> list[str]:
    """Run the command once, keeping what is on disk at each failpoint: what a process that died
    there would leave. Gives their names, in order."""
    names: list[str] = []
    folder.mkdir()

    def keep(name: str, path: Path) -> None:
        if trial.path.exists():
            shutil.copytree(trial.path, folder / str(len(names)))
        else:
            (folder / str(len(names))).mkdir()
        names.append(name)

    trial.again()
    with failpoints(keep):
        trial.action(trial.path)
    return names


@contextlib.contextmanager
def failpoints(replacement: Callable[[str, Path], None]) -> Iterator[None]:
    before = logitcache.files.failpoint
    logitcache.files.failpoint = replacement
    try:
        yield
    finally:
        logitcache.files.failpoint = before


def every_point(trial: Trial, folder: Path, step: int) -> None:
    """What a crash leaves at every failpoint, or at every step-th."""
    names = snapshots(trial, folder)
    trial.result["names"] = sorted(set(names))
    for point in range(0, len(names), step):
        trial.again(folder / str(point))
        trial.check(point)


def every_death(trial: Trial, folder: Path) -> None:
    """The same with processes that die at the failpoint; they leave what the snapshots hold."""
    trial.result["unlike"] = []
    points = len(snapshots(trial, folder))
    for point in range(points + 1):
        trial.again()
        code = forked(trial.action, trial.path, str(point + 1))
        if code != (137 if point < points else 0):
            trial.result["unlike"].append([point, code])
        elif point < points:
            kept = state(folder / str(point))
            if (state(trial.path) if trial.path.exists() else frozenset()) != kept:
                trial.result["unlike"].append([point, "another state"])
            trial.check(point)
    draw = random.Random(0)
    for _ in range(10):  # die, go on, die again
        trial.again()
        deaths = draw.sample(range(1, points + 1), 2)
        for point in deaths:
            forked(trial.action, trial.path, str(point))
        trial.check(deaths)


def every_loss(trial: Trial, step: int = 1) -> None:
    """What a power loss may leave after each change of the disk, or after every step-th."""
    trial.again()
    disk = Disk(trial.path, trial.start)
    with recorded() as log:
        trial.action(trial.path)
    for stop in range(1, len(log) + 1, step):
        for lost, share in losses(log[:stop], seed=stop):
            trial.again(Path(os.devnull))
            disk.write(disk.after(log[:stop], lost, share))
            trial.check([stop, sorted(lost), share])


def every_error(trial: Trial, folder: Path, code: int) -> None:
    """A system call that fails wherever something is written: exit code 6, and then all is well."""
    names = snapshots(trial, folder)
    trial.result["codes"] = []
    for point, name in enumerate(names):
        if name not in ("write", "make folder"):
            continue
        passed = itertools.count()

        def fail(name: str, path: Path, passed=passed, point=point) -> None:
            if next(passed) == point:
                raise OSError(code, os.strerror(code), str(path))

        trial.again()
        try:
            with failpoints(fail):
                trial.action(trial.path)
        except (LogitCacheError, OSError) as error:
            trial.result["codes"].append(explain_error(error)[0])
        trial.check(point)


def random_kills(trial: Trial, inputs: Path, number: int) -> None:
    """kill -9 of the command line at random times."""
    arguments = ["build", "--quiet", "--teacher1", inputs / "teacher1", "--seq-len", SEQ_LEN]
    arguments += ["--teacher2", inputs / "teacher2", "--data", inputs / "data.jsonl"]
    arguments += ["--set", "device=cpu", "--out", trial.path]
    draw = random.Random(0)
    trial.result["killed"] = 0
    took = 0.0
    for attempt in range(number + 1):
        trial.again()
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            cli.main([str(a) for a in arguments], standalone_mode=False)
            os._exit(0)
        if attempt:
            while (
                not trial.path.exists()
                and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            ):
                time.sleep(0.0005)
            time.sleep(draw.random() * took)
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        took = took or (time.monotonic() - started) / 2  # the first one wrote for about as long
        trial.result["killed"] += code == -signal.SIGKILL
        trial.check(attempt)


if __name__ == "__main__":
    inputs, work = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)  # no threads of its own: they would not survive a fork
    logitcache.layout.SHARD_POSITIONS = SHARD_POSITIONS
    models_are_loaded_once()
    results = {}
    for job in sys.argv[3:]:
        name, mode = job.split(":")
        folder = work / job
        folder.mkdir()
        trial = Trial(inputs, folder, name)
        started = time.monotonic()
        if mode == "points":
            every_point(trial, folder / "snapshots", step=2 if name == "fresh" else 1)
        elif mode == "deaths":
            every_death(trial, folder / "snapshots")
        elif mode == "loss":
            every_loss(trial, step=4 if trial.start else 1)
        elif mode == "kill":
            random_kills(trial, inputs, 15)
        else:
            every_error(trial, folder / "snapshots", getattr(errno, mode))
        results[job] = {**trial.result, "seconds": round(time.monotonic() - started, 1)}
    print(json.dumps(results))
