"""Judge a candidate against the generation in force, and let it in or archive it.

Order of what happens on disk: the verdict and the model are durable, then the log's entry is, then
HEAD moves. HEAD moves only if all four gates passed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.causal_lm import model_identity
from logitcache.errors import LogitCacheError, StoreError, UsageError
from logitcache.files import file_sha256, to_json
from logitcache.tokenise import load_tokenizer

from .ensemble import check_same_tokenizer
from .gate_settings import GateSettings
from .gates import GATE_NAMES, judge
from .law_watch import training_violations
from .laws import read_laws
from .lineage import FAILED, Lineage, Note, check_name, check_place, describe_data, writing
from .suite import read_suite

EXIT_REJECTED = 10
_RESOURCES = (OSError, MemoryError, KeyboardInterrupt, SystemExit)


@dataclass(frozen=True)
class Candidate:
    """A model that asks to become a generation. turn: what tells one attempt from another.

    record: of generation.json: parent, grandparent, data, suite, store, manifest, metrics.
    """

    name: str
    folder: Path
    turn: str
    record: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a promotion ended. place: the candidate's folder in the lineage; again: nothing was left
    to do."""

    verdict: dict[str, Any]
    head: str
    place: Path
    again: bool

    @property
    def promoted(self) -> bool:
        return bool(self.verdict["verdict"] == "promoted")

    def document(self) -> dict[str, Any]:
        """What the commands print with --json."""
        return {
            "verdict": self.verdict["verdict"],
            "reasons": self.verdict["reasons"],
            "gates": self.verdict["gates"],
            "head": self.head,
            "place": str(self.place),
        }

    def text(self) -> str:
        """The table of four gates, for people."""
        lines = [
            f"{'gate':12}{'':8}{'child':>9}{'teacher 1':>11}{'bound':>9}{'items':>7}  interval"
        ]
        for gate in self.verdict["gates"]:
            interval = "-"
            if gate.get("interval"):
                interval = " to ".join(_number(bound) for bound in gate["interval"])
            lines.append(
                f"{gate['name']:12}{'passed' if gate['passed'] else 'FAILED':8}"
                f"{_number(gate['score']):>9}{_number(gate['teacher_score']):>11}"
                f"{_number(gate['threshold']):>9}{gate['items']:>7}  {interval}"
            )
        lines += [f"  {reason}" for reason in self.verdict["reasons"]]
        where = "promoted to" if self.promoted else "rejected and kept in"
        return "\n".join([*lines, f"{where} {self.place}; HEAD is {self.head}"])


def promote(
    root: Path,
    folder: Path,
    suite: Path,
    *,
    name: str | None = None,
    laws: Path | None = None,
    data: Sequence[Path] = (),
    settings: GateSettings | None = None,
    device: str = "auto",
    stop: Callable[[], bool] = lambda: False,
    note: Note = lambda _: None,
) -> Outcome:
    """Judge a candidate against HEAD and promote or archive it; what is recorded already stays.

    data: what the candidate was trained on, for later generations to replay.
    Raises UsageError, InputError, StoreError for what cannot be judged, before anything is done;
    LockedError, ResourceError. Whatever goes wrong while it is judged rejects it.
    """
    settings = settings or GateSettings()
    name = name or folder.absolute().name
    check_name(name)
    with writing(root, note=note) as lineage:
        head = lineage.head
        if head is None:
            raise UsageError(
                f"{root}: no generation is in force yet",
                f"distill lineage init --lineage {root} --add ID=MODEL_DIR",
            )
        identity = model_identity(folder)
        before = _promoted_before(lineage, name, identity)
        if before is not None:
            note("promotion already recorded; nothing was changed")
            return before
        check_judgeable(folder, lineage.folder(head), suite, laws)
        watched = training_violations(folder)
        turn = digest(
            {
                "candidate": identity,
                "training_violations": [dataclasses.asdict(v) for v in watched],
                "id": name,
                "reference": lineage.generation(head)["model"],
                "suite": file_sha256(suite),
                "laws": file_sha256(laws) if laws is not None else None,
                "settings": settings.model_dump(mode="json"),
            }
        )
        record = {
            **_parentage(lineage, head),
            **_from_run(folder),
            "data": describe_data(data, root),
            "suite": describe_data([suite], root)[0],
        }
        candidate = Candidate(name, folder, turn, record)
        if lineage.generation(head)["model"] != identity:  # it would be rejected: nothing better
            check_place(lineage.folder(name), turn)
        recorded = finished(lineage, candidate)
        if recorded is not None:
            note(f"{recorded.verdict['verdict']} already, and recorded; nothing was changed")
            return recorded
        verdict = judge_soundly(
            folder,
            lineage.folder(head),
            suite,
            laws=laws,
            settings=settings,
            training_violations=watched,
            device=device,
            stop=stop,
            note=note,
        )
        return admit(lineage, candidate, verdict)


def admit(lineage: Lineage, candidate: Candidate, verdict: Mapping[str, Any]) -> Outcome:
    """Give a judged candidate its place and, if it passed, HEAD. The caller holds the lock.

    Called again after a crash it does what is missing, and nothing twice.
    """
    before = finished(lineage, candidate)
    if before is not None:
        return before
    promoted = verdict["verdict"] == "promoted"
    target = lineage.folder(candidate.name) if promoted else failed_folder(lineage, candidate)
    if not check_place(target, candidate.turn):
        identity = model_identity(candidate.folder)
        record = {
            "grandparent": None,
            "data": [],
            "suite": None,
            "store": None,
            "manifest": None,
            "metrics": {},
            **candidate.record,
            "id": candidate.name,
            "turn": candidate.turn,
            "model": identity,
            "verdict": dict(verdict),
        }
        lineage.place(candidate.folder, target, identity, record)
    scores = {
        gate["name"]: {key: gate[key] for key in ("passed", "score", "teacher_score", "threshold")}
        for gate in verdict["gates"]
    }
    head = lineage.head
    details: dict[str, Any] = {"reasons": verdict["reasons"], "gates": scores}
    parent = candidate.record.get("parent")
    if parent != head:
        details["note"] = f"the parent {parent} was not HEAD, which was {head}"
    if promoted:
        moved = {"head": candidate.name, "head_before": head}
        lineage.append("promote", candidate.name, candidate.turn, **moved, **details)
        lineage.move_head(candidate.name)
    else:
        details["place"] = f"{FAILED}/{target.name}"
        lineage.append("reject", candidate.name, candidate.turn, **details)
    return Outcome(dict(verdict), str(lineage.head), target, again=False)


def finished(lineage: Lineage, candidate: Candidate) -> Outcome | None:
    """The outcome of a candidate that this very turn has promoted or rejected already."""
    for event, records, place in (
        ("promote", lineage.generations(), lineage.folder(candidate.name)),
        ("reject", lineage.failed(), failed_folder(lineage, candidate)),
    ):
        if lineage.entry(event, candidate.name, candidate.turn) is not None:
            verdict = records[place.name]["verdict"]
            return Outcome(verdict, str(lineage.head), place, again=True)
    return None


def failed_folder(lineage: Lineage, candidate: Candidate) -> Path:
    """Where a rejected candidate goes: a child may fail more than once."""
    return lineage.root / FAILED / f"{candidate.name}-{candidate.turn[:8]}"


def check_judgeable(candidate: Path, reference: Path, suite: Path, laws: Path | None) -> None:
    """Refuse what no gate could judge, before time is spent on it: files that cannot be read, and
    models of two tokenizers."""
    questions = read_suite(suite)
    check_same_tokenizer([reference, candidate])
    if laws is not None:
        read_laws(laws).check_fits(questions, load_tokenizer(candidate))


def judge_soundly(
    candidate: Path, reference: Path, suite: Path, *, note: Note, **options: Any
) -> dict[str, Any]:
    """The verdict of the four gates; whatever else comes out of them is a rejection that says so.

    A gate that crashes or gives no number has failed. Want of disk or memory, and a wish to stop,
    say nothing of the candidate and are passed on.
    """
    try:
        verdict = judge(candidate, reference, suite, note=note, **options)
    except _RESOURCES:
        raise
    except LogitCacheError as error:
        if error.exit_code not in (1, 7):
            raise
        return _rejected(f"the gates could not be evaluated: {error}")
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        note(traceback.format_exc())
        kind = type(error).__name__
        return _rejected(f"the gates could not be evaluated: {kind}: {error}")
    return checked(verdict)


def checked(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """A verdict that promotes only if each of the four gates is there, passed and has numbers."""
    gates = {gate["name"]: dict(gate) for gate in verdict["gates"]}
    reasons = list(verdict["reasons"])
    for name in GATE_NAMES:
        gate = gates.setdefault(name, _no_gate(name, "was not evaluated"))
        for key in ("score", "teacher_score", "threshold", "interval"):
            if _has_nonfinite(gate.get(key)):
                note = f"{name}: {key} is not a number ({gate[key]})"
                gate |= {"passed": False, key: None, "note": note}
                reasons.append(note)
        if gate["passed"] is not True:
            gate["passed"] = False
            if not any(reason.startswith(name) for reason in reasons):
                reasons.append(f"{name}: {gate.get('note') or 'failed'}")
    passed = all(gates[name]["passed"] for name in GATE_NAMES) and verdict["verdict"] == "promoted"
    return {
        **verdict,
        "gates": [gates[name] for name in GATE_NAMES],
        "reasons": reasons,
        "verdict": "promoted" if passed else "rejected",
    }


def digest(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(to_json(value).encode("utf-8")).hexdigest()


def _rejected(reason: str) -> dict[str, Any]:
    gates = [_no_gate(name, "was not evaluated") for name in GATE_NAMES]
    return {"verdict": "rejected", "reasons": [reason], "gates": gates, "settings": {}}


def _no_gate(name: str, note: str) -> dict[str, Any]:
    nothing = {"score": None, "teacher_score": None, "threshold": None, "interval": None}
    return {"name": name, "passed": False, "items": 0, "failing": [], **nothing, "note": note}


def _has_nonfinite(value: Any) -> bool:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(n, float) and not math.isfinite(n) for n in numbers)


def _promoted_before(lineage: Lineage, name: str, identity: Mapping[str, Any]) -> Outcome | None:
    """The outcome of an earlier run of the command: HEAD is then the candidate itself, so it would
    be judged against itself."""
    record = lineage.generations().get(name)
    if record is None or record["model"] != identity or record["verdict"] is None:
        return None
    if lineage.entry("promote", name, record["turn"]) is None:
        return None
    return Outcome(record["verdict"], str(lineage.head), lineage.folder(name), again=True)


def _parentage(lineage: Lineage, head: str) -> dict[str, Any]:
    return {"parent": head, "grandparent": lineage.generation(head).get("parent")}


def _from_run(folder: Path) -> dict[str, Any]:
    """What the record of `distill train` in a candidate's folder knows of it."""
    path = folder / "run.json"
    if not path.is_file():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        return {"store": run["identity"]["store"], "metrics": run["metrics"]}
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path}: not a run record: {error}", "train the candidate again"
        ) from None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
