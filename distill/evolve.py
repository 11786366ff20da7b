"""``distill evolve``: one turn of a lineage, from a manifest to a promoted or an archived child.

Stages, each recorded in evolve.json when it is done: replay, build, train, evaluate, promote. A run
that was interrupted goes on with the first that is not.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from logitcache import build
from logitcache.causal_lm import check_fits
from logitcache.config import BuildConfig, build_config
from logitcache.environment import describe_environment
from logitcache.errors import Interrupted, StoreError, UsageError
from logitcache.files import (
    delete,
    lock,
    make_durable_folder,
    to_json,
    write_atomic,
)
from logitcache.progress import every_30_s
from logitcache.tokenise import load_tokenizer

from .gold import mark_gold
from .law_watch import training_violations
from .laws import read_laws
from .lineage import (
    VERDICT_FILE,
    Lineage,
    Member,
    Note,
    check_members,
    check_place,
    describe_data,
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
from .suite import read_suite
from .taboo import read_taboo, taboo_mass
from .train import TrainRequest, train
from .turn import check_folders, describe_store, find_inputs, longest_row, turn_identity

EVOLVE_FILE, TABOO_FILE = "evolve.json", "taboo.json"


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
    check_folders(turn)
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
        self.inputs = find_inputs(turn, lineage)
        self.identity = turn_identity(turn, self.inputs)
        self.turn_id = digest(self.identity)
        self.record: dict[str, Any] = {}

    def run(self, fresh: bool) -> Outcome:
        candidate = Candidate(self.child, self.out / "train", self.turn_id, {})
        before = finished(self.lineage, candidate)
        if before is not None:
            self.note(f"{self.child}: {before.verdict['verdict']} already; nothing was changed")
            self._complete_record(before)
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
        if self.turn.manifest.taboo and not self.turn.manifest.stabilizers.token_masking:
            self.note("taboo: not used, stabilizers.token_masking is false")
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
                "data": describe_data(
                    self.inputs.gold + self.inputs.train, self.lineage.root, self.inputs.gold
                ),
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
        if fresh and path.is_file():
            # Killed in between it is a turn still, of which nothing is done.
            self.record = self._new_record()
            write_atomic(path, to_json(self.record))
            for child in sorted(self.out.iterdir()):
                if child != path and child.suffix != ".lock":
                    delete(child)
            return
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
            self.record = self._new_record()
            write_atomic(path, to_json(self.record))

    def _new_record(self) -> dict[str, Any]:
        return {
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

    def _complete_record(self, outcome: Outcome) -> None:
        """Record the last stage if the process died after it and before its record."""
        path = self.out / EVOLVE_FILE
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["turn"] == self.turn_id and "promote" not in record["stages"]:
                self.record = record
                verdict = outcome.verdict["verdict"]
                self._done("promote", {"verdict": verdict, "head": outcome.head})

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
            recorded = known.get(member.name, {}).get("data")
            given = describe_data(member.data, self.lineage.root)
            there = [{k: entry[k] for k in ("path", "sha256")} for entry in recorded or []]
            if recorded is not None and given and given != there:
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
            gold={name: self.lineage.recorded_gold(name) for name in recorded},
        )
        for note in [*(f"replay: {problem}" for problem in problems), *result.notes()]:
            self.note(note)
        described = result.describe()
        files = [path.name for path in result.files]
        return {**described, "files": files, "problems": problems}

    def _build_config(self, folders: tuple[Path, Path], data: tuple[Path, ...]) -> BuildConfig:
        options = dict(self.turn.manifest.store)
        if "seq_len" not in options:
            options["seq_len"] = min(map(longest_row, folders))
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
        show = every_30_s(lambda done, total: self.note(f"build: {done:,} of {total:,} tokens"))
        store = build(
            self._build_config(folders, tuple(data.files)),
            report=lambda teacher, done, total, written, shard: show(done, total),
            stop=self.stop,
        )
        return {**describe_store(store), "gold_documents": data.gold_documents}

    def _training_settings(self) -> dict[str, Any]:
        settings = self.turn.training_settings()
        if self.inputs.laws is not None:
            if read_laws(self.inputs.laws).items(read_suite(self.inputs.suite)):
                settings["suite"] = str(self.inputs.suite)
            else:
                self.note("laws: neither they nor the suite ask anything; not checked in training")
                del settings["laws"]
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
        verdict = judge_soundly(
            self.out / "train",
            self.lineage.folder(self.parent),
            self.inputs.suite,
            laws=self.inputs.laws,
            settings=self.turn.manifest.gates,
            earlier=self.lineage.folder(self.grandparent),
            training_violations=training_violations(self.out / "train"),
            out=self.out,
            device=self._device(),
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
        section, folder = manifest.taboo, self.out / "train"
        words = self.turn.path(section.words)
        found = read_taboo(words, load_tokenizer(folder), section.variants)
        mass = {
            name: taboo_mass(
                model,
                self.out / "store",
                words,
                variants=section.variants,
                device=self._device(),
            )
            for name, model in (("teacher1", self.lineage.folder(self.parent)), ("child", folder))
        }
        document = {"words": [word.text for word in found.words], "mass": mass}
        write_atomic(self.out / TABOO_FILE, to_json(document))

    def _device(self) -> str:
        """Where the gates run: where training did, as far as the manifest says."""
        manifest = self.turn.manifest
        return "cpu" if manifest.train.get("use_cpu") else manifest.store.get("device") or "auto"
