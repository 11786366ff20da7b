"""The whole turn on the bundled generations: a child that is promoted, and one that must not be.

The first is examples/evolution.json with fewer documents and larger steps, to be done in half a
minute; the shipped one is run whole by hand (docs/lineage.md has what comes out).
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from tiny import write_jsonl

from distill.bundled import BUNDLED
from distill.cli import cli
from distill.lineage import open_lineage

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def _documents(name: str) -> list[dict[str, Any]]:
    lines = (EXAMPLES / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _example(name: str, **params: Any) -> dict[str, Any]:
    """The shipped manifest with absolute paths, its own data and a few other values."""
    document = json.loads((EXAMPLES / "evolution.json").read_text(encoding="utf-8"))
    document["evolution_request"]["child_gen"] = name
    for teacher in document["teachers"].values():
        teacher["path"] = str((EXAMPLES / teacher["path"]).resolve())
    document["training_params"] |= params
    document["data"] = {"train": [f"{name}.jsonl"], "suite": str(BUNDLED / "suite.jsonl")}
    for generation, (file,) in document["replay"]["data"].items():
        document["replay"]["data"][generation] = [str(EXAMPLES / file)]
    document["laws"] = str(BUNDLED / "laws.yaml")
    document["gates"] = {"max_new_tokens": 16}
    document["train"] |= {"per_device_train_batch_size": 2}
    return document


def _evolve(folder: Path, document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    name = document["evolution_request"]["child_gen"]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document))
    result = CliRunner().invoke(cli, ["evolve", str(path), "--json"])
    assert result.exit_code in (0, 10), result.output
    return result.exit_code, json.loads(result.stdout)


def test_the_bundled_lineage_promotes_a_child_and_then_rejects_a_worse_one(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "Luna-G011.jsonl", _documents("news.jsonl")[:60])
    code, found = _evolve(tmp_path, _example("Luna-G011", steps=150, lr=6e-5))
    assert code == 0, found["reasons"]
    assert (found["verdict"], found["head"]) == ("promoted", "Luna-G011")
    gates = {gate["name"]: gate for gate in found["gates"]}
    assert gates["generalize"]["score"] >= gates["generalize"]["teacher_score"] + 0.02
    assert gates["tone"]["score"] <= 0.05
    assert (tmp_path / "lineage" / "HEAD").read_text() == "Luna-G011\n"
    record = json.loads((tmp_path / "runs" / "Luna-G011" / "evolve.json").read_text())
    sources = {s["name"]: s["documents"] for s in record["stages"]["build"]["sources"]}
    assert sources == {"Luna-G011": 60, "Luna-G010": 3, "Luna-G009": 3}  # a tenth of the mix

    # Trained to write backwards: far from teacher 1 in voice, and it has forgotten.
    backwards = [{"text": record["text"][::-1]} for record in _documents("news.jsonl")[:12]]
    write_jsonl(tmp_path / "Luna-G012.jsonl", backwards)
    document = _example("Luna-G012", steps=30, lr=1e-3)
    document["stabilizers"]["replay_buffer"] = False
    code, found = _evolve(tmp_path, document)
    assert code == 10
    assert (found["verdict"], found["head"]) == ("rejected", "Luna-G011")
    gates = {gate["name"]: gate for gate in found["gates"]}
    assert not gates["recall"]["passed"]
    assert not gates["generalize"]["passed"]
    assert gates["recall"]["failing"][0]["output"]
    assert (tmp_path / "lineage" / "HEAD").read_text() == "Luna-G011\n"
    lineage = open_lineage(tmp_path / "lineage")
    assert list(lineage.generations()) == ["Luna-G009", "Luna-G010", "Luna-G011"]
    assert [record["id"] for record in lineage.failed().values()] == ["Luna-G012"]
    entry = lineage.log()[-1]
    assert entry["event"] == "reject"
    assert entry["note"] == "the parent Luna-G010 was not HEAD, which was Luna-G011"


def test_the_examples_data_come_from_the_bundled_text() -> None:
    made = runpy.run_path(str(EXAMPLES / "make_data.py"))["example_data"]()
    assert {path.name for path in (EXAMPLES / "data").iterdir()} == set(made)
    for name, content in made.items():
        assert (EXAMPLES / "data" / name).read_text(encoding="utf-8") == content, name


def test_the_example_needs_nothing_beside_the_repository() -> None:
    document = json.loads((EXAMPLES / "evolution.json").read_text(encoding="utf-8"))
    paths = [teacher["path"] for teacher in document["teachers"].values()]
    paths += [*document["data"]["train"], document["data"]["suite"], document["laws"]]
    paths += [file for files in document["replay"]["data"].values() for file in files]
    for path in paths:
        assert (EXAMPLES / path).resolve().is_relative_to(EXAMPLES.parent), path
        assert (EXAMPLES / path).exists(), path
