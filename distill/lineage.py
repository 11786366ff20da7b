"""A lineage on disk: its generations, what failed, a log, and HEAD, the generation in force.

The log is written ahead: an entry that moves HEAD (init, promote, rollback) is durable before HEAD
is, so that a process that dies in between leaves the old HEAD, and the next writer finishes the
move. A model folder is put together in staging/ and gets its place by one rename. Generations are
copied and compared, never averaged: the mean of two generations' weights lies in neither basin.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.errors import InputError, ResourceError, StoreError, UsageError
from logitcache.files import (
    delete,
    lock,
    make_durable_folder,
    parts_of,
    publish_folder,
    to_json,
    write_atomic,
    write_durable,
)

from .replay import data_fingerprint

HEAD_FILE, LOG_FILE, RECORD_FILE, VERDICT_FILE = (
    *("HEAD", "log.jsonl", "generation.json", "verdict.json"),
)
GENERATIONS, FAILED, STAGING = "generations", "failed", "staging"
MOVES_HEAD = ("init", "promote", "rollback")  # events whose entry says in "head" where HEAD goes
ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_MAX_RECORD_BYTES = 64 << 20
# Of a trained student's folder: what tells of the run and is no part of the model.
_OF_THE_RUN = ("run.json", "log.jsonl", "laws.jsonl", RECORD_FILE, VERDICT_FILE)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
Note = Callable[[str], None]


@dataclass(frozen=True)
class Member:
    """A model that is to be registered as a generation; data: the files that it was trained on."""

    name: str
    folder: Path
    data: tuple[Path, ...] = ()
    parent: str | None = None


@dataclass(frozen=True)
class Lineage:
    """What is in a lineage's folder. Reading needs no lock: every file is replaced as a whole."""

    root: Path

    @property
    def head(self) -> str | None:
        """The generation in force; None in a lineage whose init has not come that far."""
        path = self.root / HEAD_FILE
        if not path.is_file():
            return None
        name = path.read_text(encoding="utf-8").strip()
        if not re.fullmatch(ID_PATTERN, name):
            raise StoreError(f"{path}: expected one line, the id of a generation, found {name!r}")
        return name

    def log(self) -> list[dict[str, Any]]:
        """All entries, oldest first; StoreError if one is damaged or missing."""
        path = self.root / LOG_FILE
        if not path.is_file():
            return []
        entries = []
        lines = path.read_text(encoding="utf-8").split("\n")
        if lines[-1]:
            lines.append("")  # cut off: what there is of the last entry is refused below
        for number, line in enumerate(lines[:-1], start=1):
            try:
                entry = json.loads(line)
                intact = entry["seq"] == number and bool(entry["event"])
            except (ValueError, KeyError, TypeError):
                intact = False
            if not intact:
                raise StoreError(
                    f"{path}:{number}: expected a record with seq {number}, found {line[:80]!r}",
                    "put back the file from a copy; generations and HEAD are not touched",
                )
            entries.append(entry)
        return entries

    def folder(self, name: str) -> Path:
        return self.root / GENERATIONS / name

    def generations(self) -> dict[str, dict[str, Any]]:
        """The record of each generation, by name."""
        return self._records(GENERATIONS)

    def failed(self) -> dict[str, dict[str, Any]]:
        """The record of each rejected candidate, by the name of its folder."""
        return self._records(FAILED)

    def generation(self, name: str) -> dict[str, Any]:
        """The record of one generation; UsageError if there is none of that name."""
        if not re.fullmatch(ID_PATTERN, name) or not (self.folder(name) / RECORD_FILE).is_file():
            raise UsageError(
                f"{self.root}: no generation {name!r}; there are: "
                f"{', '.join(sorted(self.generations())) or 'none'}",
                f"distill lineage show --lineage {self.root}",
            )
        return _read_record(self.folder(name) / RECORD_FILE)

    def ancestors(self, name: str) -> list[str]:
        """A generation and all before it, nearest first: parents and theirs, also grandparents."""
        known, found, waiting = self.generations(), [], [name]
        while waiting:
            current = waiting.pop(0)
            if current in known and current not in found:
                found.append(current)
                record = known[current]
                waiting += [p for p in (record.get("parent"), record.get("grandparent")) if p]
        return found

    def recorded_data(self, name: str) -> dict[Path, str]:
        """The files that a generation was trained on, with their fingerprints then."""
        return {
            from_root(self.root, entry["path"]): entry["sha256"]
            for entry in self.generation(name).get("data", [])
        }

    def recorded_gold(self, name: str) -> set[Path]:
        """Those of recorded_data whose documents are curated unless they say otherwise."""
        data = self.generation(name).get("data", [])
        return {from_root(self.root, entry["path"]) for entry in data if entry.get("gold")}

    def entry(self, event: str, generation: str, turn: str | None) -> dict[str, Any] | None:
        """The log's entry of an event that happens once to a generation in a turn, if it has."""
        for entry in self.log():
            if (entry["event"], entry.get("generation"), entry.get("turn")) == (
                event,
                generation,
                turn,
            ):
                return entry
        return None

    def _records(self, part: str) -> dict[str, dict[str, Any]]:
        folder = self.root / part
        if not folder.is_dir():
            return {}
        return {
            path.name: _read_record(path / RECORD_FILE)
            for path in sorted(folder.iterdir())
            if (path / RECORD_FILE).is_file()
        }

    # ---- writing: the caller holds the lock, see `writing` ----

    def append(
        self, event: str, generation: str, turn: str | None = None, **details: Any
    ) -> dict[str, Any]:
        """Add an entry to the log. One that is there, of the same turn, is not written twice."""
        if event != "rollback":  # that alone may happen again in just the same way
            found = self.entry(event, generation, turn)
            if found is not None:
                return found
        path = self.root / LOG_FILE
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        entry = {"seq": len(self.log()) + 1, "event": event, "generation": generation}
        entry |= {"turn": turn, **details, "time": now}  # for people: seq says what came first
        write_atomic(path, before + json.dumps(entry) + "\n")
        return entry

    def move_head(self, name: str) -> None:
        write_atomic(self.root / HEAD_FILE, name + "\n")

    def place(self, source: Path, target: Path, identity: Mapping[str, Any], record: Any) -> None:
        """Copy a model to its place with its record: all of it is there, and durable, or nothing.

        identity: what model_identity said of the source when it was looked at.
        """
        from logitcache.causal_lm import model_identity

        staged = self.root / STAGING / target.name
        delete(staged)  # of a process that died
        make_durable_folder(staged)
        files: dict[str, bytes | Iterable[bytes]] = {
            name: parts_of(source / name) for name in model_files(source)
        }
        files[RECORD_FILE] = to_json(record).encode("utf-8")
        if record["verdict"] is not None:
            files[VERDICT_FILE] = to_json(record["verdict"]).encode("utf-8")
        write_durable(staged, files)
        if model_identity(staged) != identity:
            raise ResourceError(
                f"{source}: changed while it was copied",
                "let nothing write to it, then run the same command again",
            )
        make_durable_folder(target.parent)
        publish_folder(staged, target)


def open_lineage(root: Path) -> Lineage:
    """A lineage that is there; UsageError if there is none."""
    lineage = Lineage(root)
    if not (root / LOG_FILE).is_file():
        raise UsageError(
            f"{root}: no lineage there", f"distill lineage init --lineage {root} --add ID=MODEL_DIR"
        )
    return lineage


@contextlib.contextmanager
def writing(root: Path, *, create: bool = False, note: Note = lambda _: None) -> Iterator[Lineage]:
    """Hold a lineage as its one writer, with what a killed writer left finished.

    Raises LockedError if another process writes, ResourceError where a rename would not be atomic.
    """
    if create:
        if root.exists() and not (root / LOG_FILE).is_file():
            ours = (HEAD_FILE, LOG_FILE, GENERATIONS, FAILED, STAGING)
            others = [
                path.name
                for path in root.iterdir()
                if path.name not in ours and path.suffix not in (".lock", ".tmp")
            ]
            if others:
                raise UsageError(
                    f"{root}: expected an empty folder or a lineage, found other files "
                    f"({min(others)}, ...)",
                    "give --lineage a new folder",
                )
        make_durable_folder(root)
    else:
        open_lineage(root)
    lineage = Lineage(root)
    with lock(root / "lineage.lock"):
        _check_one_filesystem(root)
        moves = [entry for entry in lineage.log() if entry["event"] in MOVES_HEAD]
        due = next((e["head"] for e in reversed(moves) if e.get("head")), None)
        if due is not None and due != lineage.head:
            note(f"HEAD: finishing what was interrupted: {lineage.head} -> {due}")
            lineage.move_head(due)
        yield lineage


def register(lineage: Lineage, members: Sequence[Member]) -> list[str]:
    """Take models into a lineage as generations; in a lineage without HEAD the last one becomes it.

    What is there already stays as it is. Returns the names of those that were not. Raises
    UsageError if a name is taken by other weights. The caller holds the lock.
    """
    from logitcache.causal_lm import model_identity

    check_members(lineage, members)
    identities = {member.name: model_identity(member.folder) for member in members}
    data = {member.name: describe_data(member.data, lineage.root) for member in members}
    added = []
    for member in members:
        target = lineage.folder(member.name)
        if not (target / RECORD_FILE).is_file():
            record = {
                "id": member.name,
                "parent": member.parent,
                "grandparent": None,
                "turn": None,
                "model": identities[member.name],
                "data": data[member.name],
                "suite": None,
                "store": None,
                "manifest": None,
                "metrics": {},
                "verdict": None,
            }
            known = lineage.generations()
            if member.parent in known:
                record["grandparent"] = known[str(member.parent)]["parent"]
            lineage.place(member.folder, target, identities[member.name], record)
        # A child that was promoted has its entry: it is no newcomer.
        promoted = lineage.generation(member.name)["turn"] is not None
        if not promoted and lineage.entry("init", member.name, None) is None:
            added.append(member.name)
    for name in added:
        moved = {"head": name} if lineage.head is None and name == members[-1].name else {}
        lineage.append("init", name, **moved)
    if lineage.head is None:
        lineage.move_head(members[-1].name)
    return added


def check_members(lineage: Lineage, members: Sequence[Member]) -> None:
    """UsageError for models that cannot be registered: a name taken by other weights."""
    from logitcache.causal_lm import model_identity

    for member in members:
        check_name(member.name)
        target = lineage.folder(member.name)
        if not (target.exists() or target.is_symlink()):
            continue
        if not (target / RECORD_FILE).is_file():
            check_place(target, "")
        if _read_record(target / RECORD_FILE)["model"] != model_identity(member.folder):
            raise UsageError(
                f"{lineage.root}: generation {member.name} is there with other weights than the "
                "ones given",
                f"give {target}, or another id",
            )


def rollback(lineage: Lineage, name: str, reason: str) -> bool:
    """Put an earlier generation in force; False if it is already. The caller holds the lock."""
    lineage.generation(name)
    if not reason.strip():
        raise UsageError("--reason: expected why HEAD goes back, found nothing")
    before = lineage.head
    if before == name:
        return False
    lineage.append("rollback", name, head=name, head_before=before, reason=reason)
    lineage.move_head(name)
    return True


def check_name(name: str) -> None:
    """UsageError for a name that cannot be a generation's."""
    if not re.fullmatch(ID_PATTERN, name) or name.endswith((".lock", ".tmp")):
        raise UsageError(
            f"{name!r}: expected the id of a generation: letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit, at most 100 of them"
        )


def check_place(target: Path, turn: str) -> bool:
    """Whether a model has its place already; ResourceError if something else is there."""
    if not (target.exists() or target.is_symlink()):
        return False
    if (target / RECORD_FILE).is_file() and _read_record(target / RECORD_FILE)["turn"] == turn:
        return True
    raise ResourceError(
        f"{target}: the name is taken by something else",
        "choose another id for the child, or move that folder away",
    )


def describe_data(
    paths: Sequence[Path], root: Path, gold: Collection[Path] = ()
) -> list[dict[str, Any]]:
    """What generation.json keeps of data files: a path from the lineage's folder, a fingerprint,
    and of curated ones that they are gold."""
    return [
        {
            "path": os.path.relpath(path.parent.resolve() / path.name, root.resolve()),
            "sha256": fingerprint(path),
            **({"gold": True} if path in gold else {}),
        }
        for path in paths
    ]


def from_root(root: Path, recorded: str) -> Path:
    """Where a path that describe_data has recorded is."""
    return Path(os.path.normpath(root.resolve() / recorded))


def fingerprint(path: Path) -> str:
    """See data_fingerprint; InputError for what is not there."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder", "check the paths of this command")
    return data_fingerprint(path)


def model_files(folder: Path) -> list[str]:
    """Names of the files that make a model folder: no records of its run, no pickled weights."""
    names = [
        path.name
        for path in folder.iterdir()
        if path.is_file()
        and path.name not in _OF_THE_RUN
        and path.suffix not in (".lock", ".tmp", *_PICKLES)
    ]
    more = folder / "additional_chat_templates"
    return sorted(names + [f"{more.name}/{path.name}" for path in more.glob("*.jinja")])


def _check_one_filesystem(root: Path) -> None:
    device = root.stat().st_dev
    for name in (GENERATIONS, FAILED, STAGING):
        path = root / name
        if path.exists() and path.stat().st_dev != device:
            raise ResourceError(
                f"{path}: lies on another file system than {root}, and a rename between them "
                "would not be atomic",
                "keep a lineage on one file system",
            )


def _read_record(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_RECORD_BYTES:
            raise ValueError(f"larger than {_MAX_RECORD_BYTES} bytes")
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = {"id", "parent", "turn", "model", "verdict"} - set(record)
        if missing:
            raise ValueError(f"no {min(missing)} in it")
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreError(
            f"{path}: not the record of a generation: {error}", "put it back from a copy"
        ) from None
    return dict(record)
