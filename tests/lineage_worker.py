"""Run by test_lineage in a process of its own: writers of a lineage that die at every failpoint or
lose power, and what the same command makes of what they leave.

One process forks for every death. Prints one JSON document. Argument: a folder to work in.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from crash_worker import forked
from power_loss import Disk, losses, recorded

from distill.gates import GATE_NAMES
from distill.lineage import GENERATIONS, Lineage, Member, open_lineage, register, rollback, writing
from distill.promote import Candidate, admit
from logitcache.causal_lm import model_identity
from logitcache.errors import LogitCacheError

Action = Callable[[Path], object]


def make_folder(folder: Path, content: str) -> Path:
    """What a lineage takes for a model: it copies and hashes files, and loads nothing."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(f"{content} {name}")
    return folder


def verdict(passed: bool) -> dict:
    gate = {"passed": passed, "score": 0.5, "teacher_score": 0.5, "threshold": 0.45, "items": 8}
    return {
        "verdict": "promoted" if passed else "rejected",
        "reasons": [] if passed else ["recall: 0.1 is below 0.45"],
        "gates": [
            {"name": n, "interval": None, "failing": [], "note": None, **gate} for n in GATE_NAMES
        ],
    }


def scenarios(models: Path) -> dict[str, tuple[Action, list[Action], tuple[str | None, str]]]:
    """By name: the command under test, what was done before it, and HEAD before and after."""
    members = [Member("G9", models / "nine"), Member("G10", models / "ten", parent="G9")]

    def init(path: Path) -> None:
        with writing(path, create=True) as lineage:
            register(lineage, members)

    def decide(passed: bool) -> Action:
        def act(path: Path) -> None:
            candidate = Candidate("G11", models / "eleven", "f" * 64, {"parent": "G10"})
            with writing(path) as lineage:
                admit(lineage, candidate, verdict(passed))

        return act

    def back(path: Path) -> None:
        with writing(path) as lineage:
            rollback(lineage, "G9", "for the test")

    return {
        "init": (init, [], (None, "G10")),
        "promote": (decide(True), [init], ("G10", "G11")),
        "reject": (decide(False), [init], ("G10", "G10")),
        "rollback": (back, [init, decide(True)], ("G11", "G9")),
    }


def contents(root: Path) -> dict[str, str]:
    """Files and what is in them, without the log's times."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix not in (".lock", ".tmp"):
            text = path.read_text()
            if path.name == "log.jsonl":
                entries = [json.loads(line) for line in text.splitlines()]
                text = json.dumps([{k: v for k, v in e.items() if k != "time"} for e in entries])
            found[str(path.relative_to(root))] = text
    return found


class Trial:
    """A command and what it leaves when nothing disturbs it; collects what went wrong."""

    def __init__(self, work: Path, name: str):
        self.action, before, self.heads = scenarios(work / "models")[name]
        self.start, self.path = work / f"{name}-start", work / "lineage"
        for act in before:
            act(self.start)
        self.wrong: list[object] = []
        self.seen: set[str | None] = set()
        self.points = 0
        self.again()
        self.action(self.path)
        self.expected = contents(self.path)

    def again(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self.start.is_dir():
            shutil.copytree(self.start, self.path)

    def check(self, point: object) -> None:
        """HEAD is old or new and whole; the same command ends as if nothing had happened."""
        self.points += 1
        head = Lineage(self.path).head
        self.seen.add(head)
        if head not in self.heads:
            self.wrong.append([point, "head", head])
        if head is not None:
            folder = self.path / GENERATIONS / head
            record = json.loads((folder / "generation.json").read_text())
            moves = [e.get("head") for e in open_lineage(self.path).log()]
            if model_identity(folder) != record["model"] or head not in moves:
                self.wrong.append([point, "HEAD is at what is not whole, or not in the log", head])
        try:
            self.action(self.path)
        except LogitCacheError as error:
            self.wrong.append([point, str(error)])
        else:
            found = contents(self.path)
            if found != self.expected:
                keys = {*found, *self.expected}
                self.wrong.append(
                    [point, sorted(k for k in keys if found.get(k) != self.expected.get(k))]
                )

    def every_death(self) -> None:
        for point in range(1, 1000):
            self.again()
            code = forked(self.action, self.path, str(point))
            if code == 0:
                return
            if code != 137:
                self.wrong.append([point, "exit code", code])
            self.check(point)

    def every_loss(self, step: int) -> None:
        self.again()
        disk = Disk(self.path, self.start if self.start.is_dir() else None)
        with recorded() as log:
            self.action(self.path)
        for stop in range(1, len(log) + 1, step):
            for lost, share in losses(log[:stop], seed=stop):
                shutil.rmtree(self.path, ignore_errors=True)
                disk.write(disk.after(log[:stop], lost, share))
                self.check([stop, sorted(lost), share])


if __name__ == "__main__":
    work = Path(sys.argv[1])
    (work / "models").mkdir()
    for name in ("nine", "ten", "eleven"):
        make_folder(work / "models" / name, name)
    results = {}
    for name in ("init", "promote", "reject", "rollback"):
        for mode in ("death", "loss"):
            trial = Trial(work, name)
            if mode == "death":
                trial.every_death()
            else:
                trial.every_loss(step=2)
            shutil.rmtree(trial.start, ignore_errors=True)
            results[f"{name}:{mode}"] = {
                "points": trial.points,
                "wrong": trial.wrong,
                "heads": sorted(map(str, trial.seen)),
            }
    print(json.dumps(results))
