"""``distill evolve``: one turn of a lineage, from a manifest to a promoted or an archived child.

Stages, each recorded in evolve.json when it is done: replay, build, train, evaluate, promote. A run
that was interrupted goes on with the first that is not.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache import build
from logitcache.causal_lm import check_fits, model_identity
from logitcache.config import BuildConfig, build_config
from logitcache.environment import describe_environment
from logitcache.errors import Interrupted, StoreError, UsageError
from logitcache.files import (
    clear_folder,
    file_sha256,
    lock,
    make_durable_folder,
    to_json,
    write_atomic,
)
from logitcache.store import Store

from .gold import mark_gold
from .laws import Violation
from .lineage import (
    VERDICT_FILE,
    Lineage,
    Member,
    Note,
    check_members,
    check_place,
    describe_data,
    fingerprint,
    register,
    writing,
)
from .manifest import Replay, Turn, read_manifest
from .promote import (
    Candidate,
    Outcome,
    admit,
    check_judgeable,
    digest,
    failed_folder,
    finished,
    judge_soundly,
)
from .replay import count_documents, sample_replay
from .taboo import taboo_mass
from .train import TrainRequest, train

EVOLVE_FILE, TABOO_FILE, LAWS_LOG = "evolve.json", "taboo.json", "laws.jsonl"
_LONGEST_ROW = 2048


@dataclass(frozen=True)
class Inputs:
    """The files of a turn, with what a lineage remembers put in where the manifest says nothing."""

    train: tuple[Path, ...]
    gold: tuple[Path, ...]
    suite: Path
    laws: Path | None


def evolve(
    path: Path,
    *,
    fresh: bool = False,
    stop: Callable[[], bool] = lambda: False,
    note: Note = lambda _: None,
) -> Outcome:
    """Take a lineage from its manifest's parent to the child, or archive the child.

    The same manifest again goes on where it stopped, or says how it ended. fresh: delete the work
    of another turn in the output folder. Raises UsageError with every problem of the manifest,
    LockedError while another process writes to the lineage, ResourceError for a name that is taken
    or a lineage on two file systems, Interrupted, and the errors of build and train.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "evolve runs in one process, found one of several of torchrun",
            "run logitcache build, torchrun -m distill train and distill promote one by one",
        )
    turn = read_manifest(path)
    _check_folders(turn)
    with contextlib.ExitStack() as held:
        make_durable_folder(turn.output)
        held.enter_context(lock(turn.output / "evolve.lock"))
        lineage = held.enter_context(writing(turn.lineage, create=True, note=note))
        return _Run(turn, lineage, stop, note).run(fresh)


class _Run:
    """One turn, while its locks are held."""

    def __init__(self, turn: Turn, lineage: Lineage, stop: Callable[[], bool], note: Note):
        self.turn, self.lineage, self.stop, self.note = turn, lineage, stop, note
        request = turn.manifest.evolution_request
        self.parent, self.grandparent = request.parent_gen, request.grandparent_gen
        self.child = request.child_gen
        self.out = turn.output
        self.inputs = _find_inputs(turn, lineage)
        self.identity = _identity(turn, self.inputs)
        self.turn_id = digest(self.identity)
        self.record: dict[str, Any] = {}

    def run(self, fresh: bool) -> Outcome:
        candidate = Candidate(self.child, self.out / "train", self.turn_id, {})
        before = finished(self.lineage, candidate)
        if before is not None:
            self.note(f"{self.child}: {before.verdict['verdict']} already; nothing was changed")
            return before
        # All that can be known to fail is, before anything is deleted or written.
        teachers = self.turn.manifest.teachers
        folder1, folder2 = (self.turn.path(t.path) for t in (teachers.teacher1, teachers.teacher2))
        check_judgeable(folder1, folder2, self.inputs.suite, self.inputs.laws)
        members = self._members(folder1, folder2)
        check_members(self.lineage, members)
        built = self._build_config((folder1, folder2), self.inputs.train or self.inputs.gold)
        for name, folder in (("teacher1", folder1), ("teacher2", folder2)):
            check_fits(folder, name, 0, built.seq_len)
        TrainRequest(self.out, folder1, self.out, None, self._training_settings()).config()
        check_place(self.lineage.folder(self.child), self.turn_id)
        check_place(failed_folder(self.lineage, candidate), self.turn_id)
        self._open_record(fresh)
        self._register(members)
        replayed = self._stage("replay", self._replay)
        store = self._stage("build", lambda: self._build(replayed))
        trained = self._stage("train", self._train)
        self._stage("evaluate", self._evaluate)
        candidate = Candidate(
            self.child,
            self.out / "train",
            self.turn_id,
            {
                "parent": self.parent,
                "grandparent": self.grandparent,
                # What was replayed is recorded where it comes from: a later turn replays it there.
                "data": describe_data(self.inputs.gold + self.inputs.train, self.lineage.root),
                "suite": describe_data([self.inputs.suite], self.lineage.root)[0],
                "store": store,
                "manifest": self.turn.document,
                "metrics": trained,
            },
        )
        verdict = json.loads((self.out / VERDICT_FILE).read_text(encoding="utf-8"))
        outcome = admit(self.lineage, candidate, verdict)
        self._done("promote", {"verdict": verdict["verdict"], "head": outcome.head})
        return outcome

    # ---- record ----

    def _open_record(self, fresh: bool) -> None:
        path = self.out / EVOLVE_FILE
        others = [p.name for p in self.out.iterdir() if p.suffix not in (".lock", ".tmp")]
        if not path.is_file() and others:
            raise UsageError(
                f"{self.out}: expected an empty folder or a turn, found other files "
                f"({min(others)}, ...)",
                "give the manifest another output",
            )
        if fresh:
            clear_folder(self.out)
        if path.is_file():
            try:
                self.record = json.loads(path.read_text(encoding="utf-8"))
                found = self.record["identity"]
                stages = list(self.record["stages"])
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{path}: not the record of a turn: {error}", "give --fresh to begin anew"
                ) from None
            changed = sorted(
                key for key in {*found, *self.identity} if found.get(key) != self.identity.get(key)
            )
            if changed:
                raise UsageError(
                    f"{self.out}: holds another turn; other than there: {', '.join(changed)}",
                    "give the manifest another output, or --fresh to delete this turn's work",
                )
            self.note(f"going on with {self.child}; done: {', '.join(stages) or 'nothing'}")
        else:
            self.record = {
                "command": "distill evolve",
                "turn": self.turn_id,
                "child": self.child,
                "parent": self.parent,
                "grandparent": self.grandparent,
                "lineage": os.path.relpath(self.lineage.root, self.out),
                "manifest": self.turn.document,
                "identity": self.identity,
                "environment": describe_environment(),
                "stages": {},
            }
            write_atomic(path, to_json(self.record))

    def _stage(self, name: str, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a stage gave, from the record or from doing it now."""
        if name not in self.record["stages"]:
            if self.stop():
                raise Interrupted(
                    f"{self.out}: stopped before {name}", "run the same command again to continue"
                )
            self.note(f"{self.child}: {name}")
            self._done(name, action())
        details: dict[str, Any] = self.record["stages"][name]
        if name != "replay":
            self.lineage.append(name, self.child, self.turn_id)
        return details

    def _done(self, name: str, details: Mapping[str, Any]) -> None:
        self.record["stages"][name] = dict(details)
        write_atomic(self.out / EVOLVE_FILE, to_json(self.record))

    # ---- stages ----

    def _members(self, folder1: Path, folder2: Path) -> list[Member]:
        replay = self.turn.manifest.replay
        data = {} if replay is None else replay.data
        return [
            Member(name, folder, tuple(map(self.turn.path, data.get(name, ()))), parent)
            for name, folder, parent in (
                (self.grandparent, folder2, None),
                (self.parent, folder1, self.grandparent),
            )
        ]

    def _register(self, members: list[Member]) -> None:
        known = self.lineage.generations()
        for member in members:
            if member.name in known and member.data:
                self.note(f"replay.data.{member.name}: not used, {member.name} is registered")
        for name in register(self.lineage, members):
            self.note(f"registered {name}")
        head = self.lineage.head
        if head != self.parent:
            self.note(f"the parent {self.parent} is not HEAD, which is {head}")

    def _replay(self) -> dict[str, Any]:
        stabilizers = self.turn.manifest.stabilizers
        if not stabilizers.replay_buffer:
            if self.turn.manifest.replay is not None:
                self.note("replay: not used, stabilizers.replay_buffer is false")
            return {"generations": [], "files": [], "problems": []}
        assert stabilizers.replay_size is not None
        section = self.turn.manifest.replay or Replay()
        recorded: dict[str, list[Path]] = {}
        fingerprints: dict[Path, str] = {}
        problems: list[str] = []
        for name in self.lineage.ancestors(self.parent):
            found = self.lineage.recorded_data(name)
            if not found:
                self.note(f"replay: {name} has no data on record")
                continue
            recorded[name] = []
            for path, fingerprint_then in found.items():
                if fingerprints.setdefault(path, fingerprint_then) == fingerprint_then:
                    recorded[name].append(path)
                else:
                    problems.append(f"{name}: {path}: a later generation learned from another file")
        result = sample_replay(
            recorded,
            stabilizers.replay_size,
            section.seed,
            self.out / "replay",
            fingerprints=fingerprints,
            main_documents=count_documents(self.inputs.train + self.inputs.gold),
            fraction=section.fraction,
        )
        for note in [*(f"replay: {problem}" for problem in problems), *result.notes()]:
            self.note(note)
        described = result.describe()
        files = [path.name for path in result.files]
        return {**described, "files": files, "problems": problems}

    def _build_config(self, folders: tuple[Path, Path], data: tuple[Path, ...]) -> BuildConfig:
        options = dict(self.turn.manifest.store)
        if "seq_len" not in options:
            options["seq_len"] = min(_LONGEST_ROW, *map(_longest, folders))
        return build_config(
            {
                **options,
                "teacher1": folders[0],
                "teacher2": folders[1],
                "data": data,
                "out": self.out / "store",
            }
        )

    def _build(self, replayed: Mapping[str, Any]) -> dict[str, Any]:
        folders = (self.lineage.folder(self.parent), self.lineage.folder(self.grandparent))
        replays = [self.out / "replay" / name for name in replayed["files"]]
        data = mark_gold(self.inputs.train, self.inputs.gold, replays, self.out / "gold")
        store = build(self._build_config(folders, tuple(data.files)), stop=self.stop)
        return {**_describe_store(store), "gold_documents": data.gold_documents}

    def _training_settings(self) -> dict[str, Any]:
        settings = self.turn.training_settings()
        if self.inputs.laws is not None:
            settings["suite"] = str(self.inputs.suite)
        return settings

    def _train(self) -> dict[str, Any]:
        request = TrainRequest(
            self.out / "store",
            self.lineage.folder(self.parent),  # the child starts as teacher 1, not as a mean of two
            self.out / "train",
            None,
            self._training_settings(),
        )
        record = train(request, stop=self.stop, note=self.note)
        return {"steps": record["steps"], "metrics": record["metrics"]}

    def _evaluate(self) -> dict[str, Any]:
        settings = self.turn.manifest.train
        device = "cpu" if settings.get("use_cpu") else self.turn.manifest.store.get("device")
        verdict = judge_soundly(
            self.out / "train",
            self.lineage.folder(self.parent),
            self.inputs.suite,
            laws=self.inputs.laws,
            settings=self.turn.manifest.gates,
            earlier=self.lineage.folder(self.grandparent),
            training_violations=_violations(self.out / "train" / LAWS_LOG),
            out=self.out,
            device=device or "auto",
            stop=self.stop,
            note=self.note,
        )
        write_atomic(self.out / VERDICT_FILE, to_json(verdict))
        self._measure_taboo()
        return {"verdict": verdict["verdict"], "reasons": verdict["reasons"]}

    def _measure_taboo(self) -> None:
        manifest = self.turn.manifest
        if not manifest.stabilizers.token_masking or manifest.taboo is None:
            return
        words = self.turn.path(manifest.taboo.words)
        folders = {"teacher1": self.lineage.folder(self.parent), "child": self.out / "train"}
        mass = {
            name: taboo_mass(folder, self.out / "store", words) for name, folder in folders.items()
        }
        document = {"words": words.read_text(encoding="utf-8").split("\n"), "mass": mass}
        write_atomic(self.out / TABOO_FILE, to_json(document))


def _check_folders(turn: Turn) -> None:
    """Refuse an output that would mix with the lineage or in which --fresh would delete an
    input."""
    out, root = turn.output.resolve(), turn.lineage.resolve()
    if out.exists() and not out.is_dir():
        raise UsageError(f"{turn.output}: expected a folder, found a file")
    if out.is_relative_to(root) or root.is_relative_to(out):
        raise UsageError(
            f"output {turn.output} and lineage {turn.lineage}: expected neither within the other"
        )
    manifest = turn.manifest
    inputs = [manifest.teachers.teacher1.path, manifest.teachers.teacher2.path, manifest.laws]
    inputs += [*manifest.data.train, *manifest.data.gold, manifest.data.suite]
    inputs += [manifest.taboo.words] if manifest.taboo else []
    for path in inputs:
        if path is not None and turn.path(path).resolve().is_relative_to(out):
            raise UsageError(f"output {turn.output}: holds the input {path}")


def _find_inputs(turn: Turn, lineage: Lineage) -> Inputs:
    manifest = turn.manifest
    train = tuple(map(turn.path, manifest.data.train))
    gold = tuple(map(turn.path, manifest.data.gold))
    suite = manifest.data.suite and turn.path(manifest.data.suite)
    parent = manifest.evolution_request.parent_gen
    known = lineage.generations().get(parent, {})
    problems = []
    if not train and not gold:
        recorded = lineage.recorded_data(parent) if known else {}
        train = tuple(p for p, sha in recorded.items() if p.exists() and fingerprint(p) == sha)
        if not train or len(train) < len(recorded):
            problems.append(
                "data.train: is missing; expected files to learn from, because what the lineage "
                f"has on record of {parent} is {'nothing' if not recorded else 'gone or changed'}"
            )
    if suite is None:
        judged = known.get("suite")
        if judged is not None:
            suite = Path(os.path.normpath(lineage.root.absolute() / judged["path"]))
            if not suite.is_file() or fingerprint(suite) != judged["sha256"]:
                problems.append(
                    f"data.suite: is missing, and the one that {parent} was judged with, {suite}, "
                    "is gone or changed"
                )
        else:
            problems.append(
                "data.suite: is missing; expected a file of the gates' items, because "
                f"{parent} was not judged with one"
            )
    if problems or suite is None:
        raise UsageError("\n".join(problems), "see `distill evolve --schema`, and docs/lineage.md")
    laws = manifest.laws and turn.path(manifest.laws)
    return Inputs(train, gold, suite, laws)


def _identity(turn: Turn, inputs: Inputs) -> dict[str, Any]:
    """What makes two turns the same: contents, not paths."""
    manifest = turn.manifest
    taboo = manifest.taboo if manifest.stabilizers.token_masking else None
    teachers = manifest.teachers
    settings = turn.training_settings()
    return {
        "evolution_request": manifest.evolution_request.model_dump(mode="json"),
        "teachers": [
            model_identity(turn.path(teacher.path))
            for teacher in (teachers.teacher1, teachers.teacher2)
        ],
        "training_params": {
            k: v for k, v in settings.items() if k not in ("taboo_words", "laws", "suite")
        },
        "stabilizers": manifest.stabilizers.model_dump(mode="json"),
        "replay": manifest.replay and manifest.replay.model_dump(mode="json", exclude={"data"}),
        "store": manifest.store,
        "data": [fingerprint(path) for path in inputs.gold + inputs.train],
        "suite": file_sha256(inputs.suite),
        "laws": inputs.laws and file_sha256(inputs.laws),
        "taboo": taboo and file_sha256(turn.path(taboo.words)),
        "gates": manifest.gates.model_dump(mode="json"),
    }


def _describe_store(store: Store) -> dict[str, Any]:
    keys = ("rows", "seq_len", "tokens", "valid_tokens", "data_sha256", "tokenizer_sha256")
    described = {key: store.manifest[key] for key in keys}
    described["sources"] = store.manifest.get("sources", [])
    return {**described, "teachers": store.teachers}


def _longest(folder: Path) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or _LONGEST_ROW)


def _violations(path: Path) -> list[Violation]:
    """Broken laws that training met."""
    if not path.is_file():
        return []
    names = ("rule", "prompt", "output", "detail")
    try:
        records = [
            json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line
        ]
        return [Violation(**{name: record[name] for name in names}) for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path}: not the violations of a training run: {error}", "give --fresh to begin anew"
        ) from None
