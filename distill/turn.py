"""What a turn starts from: its files, with what the lineage remembers put in, and its identity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.causal_lm import model_identity
from logitcache.errors import UsageError
from logitcache.files import file_sha256
from logitcache.store import Store

from .lineage import Lineage, fingerprint, from_root
from .manifest import Turn

_LONGEST_ROW = 2048


@dataclass(frozen=True)
class Inputs:
    """The files of a turn, with what a lineage remembers put in where the manifest says nothing."""

    train: tuple[Path, ...]
    gold: tuple[Path, ...]
    suite: Path
    laws: Path | None


def check_folders(turn: Turn) -> None:
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


def find_inputs(turn: Turn, lineage: Lineage) -> Inputs:
    """The files of a turn. UsageError names those that neither manifest nor lineage gives."""
    manifest = turn.manifest
    train = tuple(map(turn.path, manifest.data.train))
    gold = tuple(map(turn.path, manifest.data.gold))
    suite = manifest.data.suite and turn.path(manifest.data.suite)
    parent = manifest.evolution_request.parent_gen
    known = lineage.generations().get(parent, {})
    problems = []
    if not train and not gold:
        recorded = lineage.recorded_data(parent) if known else {}
        there = [p for p, sha in recorded.items() if p.exists() and fingerprint(p) == sha]
        curated = lineage.recorded_gold(parent) if known else set()
        train = tuple(p for p in there if p not in curated)
        gold = tuple(p for p in there if p in curated)
        if not there or len(there) < len(recorded):
            problems.append(
                "data.train: is missing; expected files to learn from, because what the lineage "
                f"has on record of {parent} is {'nothing' if not recorded else 'gone or changed'}"
            )
    if suite is None:
        judged = known.get("suite")
        if judged is not None:
            suite = from_root(lineage.root, judged["path"])
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


def turn_identity(turn: Turn, inputs: Inputs) -> dict[str, Any]:
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
        "data": {
            "gold": [fingerprint(path) for path in inputs.gold],
            "train": [fingerprint(path) for path in inputs.train],
        },
        "suite": file_sha256(inputs.suite),
        "laws": inputs.laws and file_sha256(inputs.laws),
        "taboo": taboo and file_sha256(turn.path(taboo.words)),
        "gates": manifest.gates.model_dump(mode="json"),
    }


def describe_store(store: Store) -> dict[str, Any]:
    """What generation.json keeps of a store."""
    keys = ("rows", "seq_len", "tokens", "valid_tokens", "data_sha256", "tokenizer_sha256")
    described = {key: store.manifest[key] for key in keys}
    described["sources"] = store.manifest.get("sources", [])
    return {**described, "teachers": store.teachers}


def longest_row(folder: Path) -> int:
    """Tokens of the longest row that a model reads, at most the default of a build."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(_LONGEST_ROW, longest or _LONGEST_ROW)
