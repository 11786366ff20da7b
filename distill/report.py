"""``distill report``: what the folder of a run, or of a turn of a lineage, says.

It may hold a run of ``distill train`` (run.json, log.jsonl, laws.jsonl), or a turn of ``distill
evolve`` (evolve.json, verdict.json, generations.jsonl, taboo.json, and the run in train/). Any of
the files may be missing, and the report says which. What is there is checked before it is shown:
these files may come from elsewhere. ``report_page`` makes the page.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from logitcache.config import explain
from logitcache.errors import InputError, UsageError
from logitcache.page import visible

_MAX_BYTES = 64 << 20  # of a JSON document
_MAX_DEPTH = 50
_MAX_LINE = 16 << 20  # of a JSON line
MOST_ITEMS = 500  # of generations, of violations and of failing items of a gate, on the page
FILES = {  # what each would show
    "run.json": "settings, environment, held-out metrics before and after",
    "log.jsonl": "loss and strategies over steps",
    "evolve.json": "stages of the turn",
    "verdict.json": "the four gates",
    "generations.jsonl": "generations side by side",
    "taboo.json": "probability mass on taboo words",
    "laws.jsonl": "violations of laws during training",
}
_Model = TypeVar("_Model", bound=BaseModel)


class _Document(BaseModel):
    """A file of a run. Keys that are not known here are for others."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class RunRecord(_Document):
    """run.json of ``distill train``."""

    command: str
    complete: bool = False
    output: str | None = None
    store: str | None = None
    student: str | None = None
    eval_store: str | None = None
    identity: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    metrics: dict[str, Any] = {}
    steps: int | None = None
    seconds: float | None = None


class TurnRecord(_Document):
    """evolve.json of ``distill evolve``."""

    child: str | None = None
    parent: str | None = None
    grandparent: str | None = None
    manifest: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    stages: dict[str, Any] = {}


class Failing(_Document):
    """An item that a gate's candidate did not pass."""

    id: str | int | None = None
    prompt: Any = None
    expect: Any = None
    output: Any = None
    teacher_output: Any = None
    rule: str | None = None  # of laws
    detail: Any = None


class Gate(_Document):
    """One gate of a verdict; scores are shares of 1, of tone bits, of laws a number."""

    name: str
    passed: bool
    score: float | None = None
    teacher_score: float | None = None
    threshold: float | None = None
    items: int = 0
    interval: tuple[float, float] | None = None
    failing: list[Failing] = []
    note: str | None = None


class Verdict(_Document):
    """verdict.json."""

    verdict: Literal["promoted", "rejected"]
    reasons: list[str] = []
    candidate: str | None = None
    reference: str | None = None
    gates: list[Gate] = []
    settings: dict[str, Any] = {}


class Generation(_Document):
    """A line of generations.jsonl: what each model says to an item of the suite."""

    id: str | int | None = None
    kind: str | None = None
    prompt: Any = None
    expect: Any = None
    outputs: dict[str, str] = {}


class TabooMass(_Document):
    """taboo.json: mean probability on taboo tokens, by model."""

    words: list[str] = []
    mass: dict[str, float] = {}


class LawBreach(_Document):
    """A line of laws.jsonl."""

    rule: str
    prompt: Any = None
    output: Any = None
    detail: Any = None
    step: int | None = None


@dataclass
class Log:
    """Numbers of log.jsonl by name: steps and values of each, in order."""

    columns: dict[str, tuple[array[float], array[float]]] = field(default_factory=dict)
    records: int = 0
    not_finite: int = 0

    def add(self, record: dict[str, Any]) -> None:
        """Take in a record, which has a number as its "step"."""
        step = record["step"]
        self.records += 1
        for name, value in record.items():
            if name != "step" and _is_number(value):
                steps, values = self.columns.setdefault(name, (array("d"), array("d")))
                steps.append(float(step))
                values.append(float(value))
                self.not_finite += not math.isfinite(value)

    def merged(self, *names: str) -> tuple[list[float], list[float]]:
        """The points of several columns as one, by step."""
        points = [
            point
            for name in names
            if name in self.columns
            for point in zip(*self.columns[name], strict=True)
        ]
        points.sort(key=lambda point: point[0])
        return [x for x, _ in points], [y for _, y in points]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass
class Run:
    """All that a folder says. missing: file names; notes: what of the rest could not be read."""

    path: Path
    record: RunRecord | None = None
    turn: TurnRecord | None = None
    log: Log | None = None
    verdict: Verdict | None = None
    generations: list[Generation] | None = None
    taboo: TabooMass | None = None
    breaches: list[LawBreach] | None = None
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        if self.turn is not None and self.turn.child:
            return self.turn.child
        return self.path.resolve().name


def read_run(path: Path) -> Run:
    """Read what is in a run's folder. UsageError if there is no folder, InputError if it is none of
    a run, or if one of the files is not what its name says (all of them at once)."""
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise UsageError(
            f"{path}: expected the folder of a run, found {found}",
            "give the --out of distill train, or the output of distill evolve",
        )
    places = {name: _find(path, name) for name in FILES}
    if not any(places.values()):
        there = sorted(child.name for child in path.iterdir())[:5]
        raise InputError(
            f"{path}: not a run: expected run.json or evolve.json, found "
            f"{visible(', '.join(there)) or 'an empty folder'}",
            "give the --out of distill train, or the output of distill evolve",
        )
    run = Run(path, missing=[name for name, place in places.items() if place is None])
    problems: list[str] = []

    def attempt(name: str, read: Callable[[Path], Any]) -> Any:
        place = places[name]
        try:
            return None if place is None else read(place)
        except InputError as error:
            problems.append(str(error))
            return None

    run.record = attempt("run.json", lambda place: _document(place, RunRecord))
    run.turn = attempt("evolve.json", lambda place: _document(place, TurnRecord))
    run.verdict = attempt("verdict.json", lambda place: _document(place, Verdict))
    run.taboo = attempt("taboo.json", lambda place: _document(place, TabooMass))
    run.log = attempt("log.jsonl", lambda place: _log(place, run.notes))
    run.generations = attempt("generations.jsonl", lambda place: _list(place, Generation, run))
    run.breaches = attempt("laws.jsonl", lambda place: _list(place, LawBreach, run))
    if problems:
        raise InputError("\n".join(problems), f"repair or remove what is named in {path}")
    return run


def _find(path: Path, name: str) -> Path | None:
    """A file of a run: in its folder, or in the train folder of a turn."""
    places = (path / name, path / "train" / name)
    return next((place for place in places if place.is_file()), None)


def _document(path: Path, kind: type[_Model]) -> _Model:
    if path.stat().st_size > _MAX_BYTES:
        raise InputError(f"{path}: larger than {_MAX_BYTES} bytes")
    try:
        return kind.model_validate(_parsed(path.read_bytes()))
    except ValidationError as error:
        raise InputError(f"{path}: {_explained(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None


def _parsed(text: bytes) -> Any:
    """JSON that is not nested so deeply that showing it would fail. ValueError, RecursionError."""
    value = json.loads(text)
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")


def _explained(error: ValidationError) -> str:
    return explain(error).replace("\n", "; ")[:500]


def _lines(path: Path, notes: list[str]) -> Iterator[tuple[int, Any]]:
    """The JSON lines of a file, numbered from 1. A last line without its end, which a run that was
    killed leaves, is noted and left out; InputError for any other that is no JSON."""
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE + 1), b""), start=1):
            if len(line) > _MAX_LINE:
                raise InputError(f"{path}:{number}: a line longer than {_MAX_LINE} bytes")
            if not line.strip():
                continue
            try:
                yield number, _parsed(line)
            except (ValueError, RecursionError) as error:
                if line.endswith(b"\n"):
                    raise InputError(f"{path}:{number}: not JSON: {error}") from None
                notes.append(f"{path.name}: the last line is unfinished and was left out")


def _log(path: Path, notes: list[str]) -> Log:
    log = Log()
    for number, record in _lines(path, notes):
        if not isinstance(record, dict) or not _is_number(record.get("step")):
            raise InputError(
                f"{path}:{number}: expected a record of training, with a step, found "
                f"{json.dumps(record)[:80]}"
            )
        log.add(record)
    if log.not_finite:
        notes.append(f"{path.name}: {log.not_finite:,} numbers that are not finite are not drawn")
    return log


def _list(path: Path, kind: type[_Model], run: Run) -> list[_Model]:
    reader = TypeAdapter(kind)
    found: list[_Model] = []
    total = 0
    for number, record in _lines(path, run.notes):
        total += 1
        if total > MOST_ITEMS:
            continue
        try:
            found.append(reader.validate_python(record))
        except ValidationError as error:
            raise InputError(f"{path}:{number}: {_explained(error)}") from None
    if total > MOST_ITEMS:
        run.notes.append(f"{path.name}: the first {MOST_ITEMS} of {total:,} lines are shown")
    return found


def finite(value: Any) -> float | None:
    """A number that can be drawn; None for anything else."""
    return float(value) if _is_number(value) and math.isfinite(value) else None
