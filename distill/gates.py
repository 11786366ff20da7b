"""The four gates between a candidate and promotion; docs/evaluation.md defines them.

recall:     score >= teacher 1's - epsilon
generalize: score >= teacher 1's + delta
tone:       drift from teacher 1 <= theta
laws:       no violation, in training's evaluations and in this one

The verdict follows the point estimates; intervals stand beside them. A gate that cannot be
computed (it crashes, runs out of its time, gives NaN, has too few items) is a gate not passed, and
says why.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitcache.causal_lm import choose_device, choose_dtype, model_identity
from logitcache.errors import InputError, Interrupted, ResourceError, UsageError
from logitcache.files import file_sha256, to_json, write_durable
from logitcache.tokenise import load_tokenizer

from .ensemble import check_same_tokenizer, weight_bytes
from .gate_settings import GateSettings
from .generate import load_speaker
from .laws import Laws, Violation, read_laws
from .scoring import Scorer, folder_name, generations, mean, mean_interval
from .suite import AnswerItem, Item, Suite, ToneItem, read_suite
from .tone import token_divergence, tone_drift

__all__ = ["GATE_NAMES", "GENERATIONS_FILE", "VERDICT_FILE", "GateSettings", "judge"]

VERDICT_FILE, GENERATIONS_FILE = "verdict.json", "generations.jsonl"
GATE_NAMES = ("recall", "generalize", "tone", "laws")
# 0.9 - 0.05 is a little more than 0.85: a score on the threshold passes.
_ROUNDING = 1e-9
_MAX_TONE_SHOWN = 10


@dataclass(frozen=True)
class _Gate:
    """What a gate found; as_dict() is its part of the verdict document."""

    name: str
    passed: bool
    score: float | None
    teacher_score: float | None
    threshold: float | None
    items: int
    interval: tuple[float, float] | None = None
    failing: list[dict[str, Any]] = field(default_factory=list)
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "interval": None if self.interval is None else [*self.interval]}


@dataclass(frozen=True)
class _Case:
    """Both models and what they are asked."""

    child: Scorer
    teacher: Scorer
    suite: Suite
    laws: Laws | None
    settings: GateSettings
    training_violations: Sequence[Violation]


class Watch:
    """Ends a generation when stopping was asked for, or when a gate's time is up."""

    def __init__(self, stop: Callable[[], bool], limit_s: float | None):
        self.stop, self.limit_s = stop, limit_s
        self.started_s: float | None = None

    def restart(self) -> None:
        self.started_s = time.monotonic()

    def __call__(self) -> None:
        if self.stop():
            raise Interrupted(
                "stopped before the verdict", "run the same command again to evaluate anew"
            )
        if self.limit_s is None or self.started_s is None:
            return
        if time.monotonic() - self.started_s > self.limit_s:
            raise TimeoutError(f"it took more than {self.limit_s:g} s (time_limit_s)")


def judge(
    candidate: Path,
    reference: Path,
    suite: Path,
    *,
    laws: Path | None = None,
    settings: GateSettings = GateSettings(),  # noqa: B008  (frozen)
    earlier: Path | None = None,
    training_violations: Sequence[Violation] = (),
    out: Path | None = None,
    device: str = "auto",
    stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Judge a candidate against a reference (teacher 1); returns the verdict document.

    earlier: teacher 2's folder, whose generations are recorded too. out: a folder, for verdict.json
    and generations.jsonl. Raises InputError for a suite or laws that cannot be used, StoreError for
    folders that cannot be loaded or have other tokenizers, Interrupted after stop(): never because
    of what the candidate answers.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"{out}: expected a folder for the verdict, found a file")
    questions = read_suite(suite)
    rules = None if laws is None else read_laws(laws)
    folders = [candidate, reference, *([earlier] if earlier is not None else [])]
    check_same_tokenizer(folders)
    if rules is not None:
        rules.check_fits(questions, load_tokenizer(candidate))
    watch = Watch(stop, settings.time_limit_s)
    watch()
    chosen = choose_device(device)
    size_mb = sum(weight_bytes(f, choose_dtype("auto", chosen)) for f in folders[:2]) / 1e6
    names = f"{folder_name(candidate)} and {folder_name(reference)}"
    note(f"loading {names}: {size_mb:,.1f} MB of weights ...")
    child, teacher = (
        Scorer(load_speaker(folder, device, watch), settings.max_new_tokens)
        for folder in (candidate, reference)
    )
    case = _Case(child, teacher, questions, rules, settings, training_violations)
    gates = []
    for name in GATE_NAMES:
        note(f"gate {name} ...")
        watch.restart()
        gates.append(_guarded(name, case))
    reasons = [_reason(gate, settings) for gate in gates if not gate.passed]
    if reasons and model_identity(candidate) == model_identity(reference):
        reasons.append("the candidate has the reference's very weights: nothing was learned")
    document = {
        "verdict": "rejected" if reasons else "promoted",
        "reasons": reasons,
        "candidate": folder_name(candidate),
        "reference": folder_name(reference),
        "gates": [gate.as_dict() for gate in gates],
        "settings": settings.model_dump(),
        "suite_sha256": file_sha256(suite),
        "laws_sha256": None if laws is None else file_sha256(laws),
    }
    if out is not None:
        watch.started_s = None
        asked = {"child": child, "teacher1": teacher}
        for role, scorer in asked.items():
            _ask_all(role, scorer, questions, note)
            scorer.release()
        if earlier is not None:
            speaker = load_speaker(earlier, device, watch)
            asked["teacher2"] = Scorer(speaker, settings.max_new_tokens)
            _ask_all("teacher2", asked["teacher2"], questions, note)
        write_records(out, document, generations(questions, asked))
    return document


def write_records(out: Path, document: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Write verdict.json and generations.jsonl; the verdict is there last."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    files = {GENERATIONS_FILE: lines.encode(), VERDICT_FILE: to_json(document).encode()}
    write_durable(out, files)


def _ask_all(role: str, scorer: Scorer, suite: Suite, note: Callable[[str], None]) -> None:
    """Have the items answered that no gate asked for: what a model cannot answer is missing in the
    record."""
    try:
        scorer.outputs([item for item in suite.items if scorer.known(item) is None])
    except (Interrupted, InputError):
        raise
    except Exception as error:  # the verdict stands
        note(f"{role}: generations are missing: {_first_line(error)}")


def _guarded(name: str, case: _Case) -> _Gate:
    """A gate's result; whatever goes wrong in it is its failure, except a wrong suite, a wish to
    stop, and want of disk or memory."""
    kinds = {"laws": ("law",)}.get(name, (name,))
    items = case.suite.of(*kinds)
    try:
        gate = _COMPUTE[name](name, items, case)
    except (Interrupted, InputError, UsageError, KeyboardInterrupt):
        raise
    except Exception as error:
        scarce = isinstance(error, (OSError, MemoryError, ResourceError))
        if type(error).__name__ == "OutOfMemoryError" or (
            scarce and not isinstance(error, TimeoutError)
        ):
            raise  # says nothing of the candidate
        kind = "ran out of time" if isinstance(error, TimeoutError) else "crashed"
        text = f"the gate {kind}: {_first_line(error)}"
        return _Gate(name, False, None, None, None, len(items), note=text)
    numbers = [gate.score, gate.teacher_score, gate.threshold, *(gate.interval or ())]
    if any(number is not None and not math.isfinite(number) for number in numbers):
        text = f"the gate's score is not a number: {gate.score}"
        return _Gate(name, False, None, None, None, gate.items, note=text)
    return gate


def _first_line(error: Exception) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


def _answers_gate(name: str, items: Sequence[Item], case: _Case) -> _Gate:
    """recall and generalize: mean scores over items.

    The interval is that of the score given teacher 1's: of the mean difference, item by item, put
    on teacher 1's score, so that it is to be held against the threshold.
    """
    asked = [item for item in items if isinstance(item, AnswerItem)]
    settings = case.settings
    if not asked:
        return _Gate(name, False, None, None, None, 0, note=_too_few(0, settings.min_items))
    child, teacher = case.child.scores(asked), case.teacher.scores(asked)
    score, teacher_score = mean(child), mean(teacher)
    assert score is not None
    assert teacher_score is not None
    step = -settings.epsilon if name == "recall" else settings.delta
    threshold = teacher_score + step
    differences = [a - b for a, b in zip(child, teacher, strict=True)]
    found = mean_interval(
        differences,
        samples=settings.bootstrap_samples,
        confidence=settings.confidence,
        seed=settings.seed,
    )
    interval = None if found is None else (teacher_score + found[0], teacher_score + found[1])
    failing = []
    for item, mine, theirs in zip(asked, child, teacher, strict=True):
        if mine < theirs or (item.score != "tokens" and mine < 1.0):
            failing.append(_evidence(item, case) | {"score": mine, "teacher_score": theirs})
    passed = score >= threshold - _ROUNDING
    text: str | None = None
    if len(asked) < settings.min_items:
        passed, text = False, _too_few(len(asked), settings.min_items)
    elif threshold > 1.0 + _ROUNDING:
        text = (
            f"teacher 1 scores {teacher_score:.3f}: no candidate can be {step:g} above it; "
            "the suite needs harder items"
        )
    return _Gate(name, passed, score, teacher_score, threshold, len(asked), interval, failing, text)


def _tone_gate(name: str, items: Sequence[Item], case: _Case) -> _Gate:
    """Drift from teacher 1, whose own is 0; where the gate fails, the items that moved most."""
    asked = [item for item in items if isinstance(item, ToneItem)]
    settings = case.settings
    if not asked:
        return _Gate(name, False, None, 0.0, None, 0, note=_too_few(0, settings.min_tone_items))
    drift = tone_drift(
        [output.text for output in case.child.outputs(asked)],
        [output.text for output in case.teacher.outputs(asked)],
        token_divergence(case.child.speaker, case.teacher.speaker, asked),
        seed=settings.seed,
        samples=settings.bootstrap_samples,
        confidence=settings.confidence,
    )
    passed = drift.total <= settings.theta + _ROUNDING
    text = (
        f"style {drift.raw_style:.4f} less noise floor {drift.floor:.4f} = {drift.style:.4f}, "
        f"tokens {drift.tokens:.4f} bits"
    )
    failing = []
    if not passed:
        order = sorted(range(len(asked)), key=lambda index: -drift.per_item[index])
        failing = [
            _evidence(asked[index], case) | {"score": drift.per_item[index], "teacher_score": 0.0}
            for index in order[:_MAX_TONE_SHOWN]
            if drift.per_item[index] > 0
        ]
    if len(asked) < settings.min_tone_items:
        passed, text = False, f"{_too_few(len(asked), settings.min_tone_items)}; {text}"
    return _Gate(
        name,
        passed,
        drift.total,
        0.0,
        settings.theta,
        len(asked),
        drift.interval,
        failing,
        text,
    )


def _laws_gate(name: str, items: Sequence[Item], case: _Case) -> _Gate:
    """Number of violations; items is the number of answers that were looked at."""
    before = case.training_violations
    told = [_told(violation, "training") for violation in before]
    if case.laws is None:
        text = "no laws were given"
        if items:
            text += f": the suite's {len(items)} law items were not judged"
        if before:
            text += f"; {len(before)} violations in training"
        return _Gate(name, not before, float(len(before)), None, 0.0, 0, None, told, text)
    found, asked = case.child.violations(case.laws, case.suite)
    teachers, _ = case.teacher.violations(case.laws, case.suite)
    told = [_told(violation, item.id, case.teacher.known(item)) for item, violation in found] + told
    note = f"{len(before)} violations in training, {len(found)} now" if before else None
    return _Gate(
        name, not told, float(len(told)), float(len(teachers)), 0.0, asked, None, told, note
    )


_COMPUTE = {
    "recall": _answers_gate,
    "generalize": _answers_gate,
    "tone": _tone_gate,
    "laws": _laws_gate,
}


def _evidence(item: Item, case: _Case) -> dict[str, Any]:
    return {
        "id": item.id,
        "prompt": item.text,
        "expect": item.expect if isinstance(item, AnswerItem) else None,
        "output": case.child.known(item),
        "teacher_output": case.teacher.known(item),
    }


def _told(violation: Violation, where: str, teacher_output: str | None = None) -> dict[str, Any]:
    return {
        "id": where,
        "prompt": violation.prompt,
        "expect": None,
        "output": violation.output,
        "teacher_output": teacher_output,
        "rule": violation.rule,
        "detail": violation.detail,
    }


def _too_few(found: int, needed: int) -> str:
    return f"too little evidence: {found} items, expected at least {needed}"


def _reason(gate: _Gate, settings: GateSettings) -> str:
    """Why a gate did not pass."""
    too_few = gate.note is not None and gate.note.startswith("too little evidence")
    if gate.score is None or too_few:
        return f"{gate.name}: {gate.note}"
    if gate.name == "laws":
        rules = sorted({str(entry["rule"]) for entry in gate.failing})
        return f"laws: {gate.score:g} violations of {', '.join(rules)}; expected none"
    if gate.name == "tone":
        return f"tone: drift {gate.score:.4f} bits, expected at most {settings.theta:g}"
    kind = "less" if gate.name == "recall" else "more"
    step = settings.epsilon if gate.name == "recall" else settings.delta
    text = (
        f"{gate.name}: {gate.score:.4f}, expected at least {gate.threshold:.4f} "
        f"({step:g} {kind} than teacher 1's {gate.teacher_score:.4f})"
    )
    return text if gate.note is None else f"{text}; {gate.note}"
