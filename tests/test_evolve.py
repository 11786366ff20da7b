"""`distill evolve` and `promote` on tiny models: stages, records, interruptions, verdicts."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tiny import make_model, sentences, write_jsonl

from distill.cli import cli
from distill.evolve import evolve
from distill.lineage import open_lineage
from logitcache import open_store
from logitcache.errors import Interrupted

ALWAYS = {"epsilon": 1.0, "delta": 0.0, "theta": 2.0}  # with which the gates let everybody pass
MANIFEST: dict[str, Any] = {
    "evolution_request": {
        "parent_gen": "T-G2",
        "grandparent_gen": "T-G1",
        "child_gen": "T-G3",
        "training_method": "teacher_student_distillation",
    },
    "teachers": {
        "teacher1": {"gen": 2, "role": "primary", "path": "two"},
        "teacher2": {"gen": 1, "role": "stabilizing_critic", "path": "one"},
    },
    "training_params": {
        "method": "logit_blending_kd",
        "alpha": 0.1,
        "beta": 0.9,
        "gamma": 0.0,
        "temperature": 1.5,
        "steps": 4,
        "lr": 1e-3,
    },
    "stabilizers": {
        "ema": True,
        "ema_decay": 0.5,
        "replay_buffer": True,
        "replay_size": 3,
        "token_masking": False,
    },
    "data": {"train": ["new.jsonl"], "suite": "suite.jsonl"},
    "replay": {"fraction": 0.5, "data": {"T-G1": ["old.jsonl"]}},
    "gates": {**ALWAYS, "max_new_tokens": 4, "min_items": 1, "min_tone_items": 2},
    "store": {"seq_len": 48, "device": "cpu"},
    "train": {"use_cpu": True, "per_device_train_batch_size": 4, "save_strategy": "no"},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny generations of one family, their texts and a suite."""
    folder = tmp_path_factory.mktemp("inputs")
    one = make_model(folder / "one", seed=1)
    two = make_model(folder / "two", seed=1)
    weights = load_file(one / "model.safetensors")
    torch.manual_seed(5)
    noisy = {name: w + 0.02 * torch.randn_like(w) for name, w in weights.items()}
    save_file(noisy, two / "model.safetensors", metadata={"format": "pt"})
    write_jsonl(folder / "old.jsonl", [{"text": text} for text in sentences(10, 6)])
    write_jsonl(folder / "new.jsonl", [{"text": text} for text in sentences(20, 7, words=16)])
    items = [
        {"kind": kind, "prompt": "the king", "expect": " of france was", "score": "tokens"}
        for kind in ("recall", "generalize")
    ]
    items += [{"kind": "tone", "prompt": prompt} for prompt in ("a green field", "many birds")]
    write_jsonl(folder / "suite.jsonl", items)
    return folder


@pytest.fixture
def here(inputs: Path, tmp_path: Path) -> Path:
    """The inputs in a folder of the test's own; write(here) puts a manifest beside them."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def write(folder: Path, name: str = "turn.json", **changes: Any) -> Path:
    """A manifest with values at places spelled section__key."""
    document = copy.deepcopy(MANIFEST)
    for place, value in changes.items():
        section, _, key = place.partition("__")
        if key:
            document.setdefault(section, {})[key] = value
        elif value is None:
            document.pop(section)
        else:
            document[section] = value
    (folder / name).write_text(json.dumps(document))
    return folder / name


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, [*(str(word) for word in words), "--json"])


def events(folder: Path) -> list[tuple[str, str]]:
    return [(e["event"], e["generation"]) for e in open_lineage(folder / "lineage").log()]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.suffix != ".lock"
    }


TURN = [("init", "T-G1"), ("init", "T-G2")] + [
    (event, "T-G3") for event in ("build", "train", "evaluate")
]


def test_a_turn_promotes_its_child_and_records_what_was_done(here: Path) -> None:
    path = write(here)
    result = run("evolve", path)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["verdict"], document["head"]) == ("promoted", "T-G3")
    assert [gate["name"] for gate in document["gates"]] == ["recall", "generalize", "tone", "laws"]
    assert (here / "lineage" / "HEAD").read_text() == "T-G3\n"
    assert events(here) == [*TURN, ("promote", "T-G3")]
    out = here / "runs" / "T-G3"
    record = json.loads((out / "evolve.json").read_text())
    assert set(record["stages"]) == {"replay", "build", "train", "evaluate", "promote"}
    assert record["stages"]["replay"]["sampled"] == 3
    sources = open_store(out / "store").manifest["sources"]
    assert [(s["name"], s["documents"]) for s in sources] == [("new", 20), ("T-G1", 3)]
    generation = json.loads((here / "lineage/generations/T-G3/generation.json").read_text())
    assert (generation["parent"], generation["grandparent"]) == ("T-G2", "T-G1")
    assert generation["manifest"] == json.loads(path.read_text())
    assert generation["store"]["sources"] == sources
    assert [Path(entry["path"]).name for entry in generation["data"]] == ["new.jsonl"]
    assert generation["verdict"]["verdict"] == "promoted"
    # What is promoted is what was evaluated: the averaged weights.
    promoted = (here / "lineage/generations/T-G3/model.safetensors").read_bytes()
    assert promoted == (out / "train" / "model.safetensors").read_bytes()
    assert promoted != (out / "train" / "raw" / "model.safetensors").read_bytes()
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["gates"] == document["gates"]
    roles = json.loads((out / "generations.jsonl").read_text().splitlines()[0])["outputs"]
    assert set(roles) == {"child", "teacher1", "teacher2"}
    before = files(here)
    again = run("evolve", path)
    assert again.exit_code == 0
    assert json.loads(again.stdout) == document
    assert "promoted already; nothing was changed" in again.stderr
    assert files(here) == before


def test_a_rejected_child_is_archived_and_head_stays(here: Path) -> None:
    path = write(here, gates__delta=1.0)
    result = run("evolve", path)
    assert result.exit_code == 10, result.output
    document = json.loads(result.stdout)
    assert (document["verdict"], document["head"]) == ("rejected", "T-G2")
    assert document["reasons"]
    assert (here / "lineage" / "HEAD").read_text() == "T-G2\n"
    assert events(here) == [*TURN, ("reject", "T-G3")]
    (folder,) = (here / "lineage" / "failed").iterdir()
    assert json.loads((folder / "verdict.json").read_text())["gates"] == document["gates"]
    assert not (here / "lineage" / "generations" / "T-G3").exists()
    before = files(here)
    assert run("evolve", path).exit_code == 10
    assert files(here) == before
    # The same child, raised otherwise: the work folder is another turn's until --fresh.
    other = write(here, "other.json")
    refused = run("evolve", other)
    assert refused.exit_code == 2
    assert "holds another turn; other than there: gates" in json.loads(refused.stdout)["error"]
    assert files(here / "lineage") == {
        k.removeprefix("lineage/"): v for k, v in before.items() if k.startswith("lineage/")
    }
    assert run("evolve", other, "--fresh").exit_code == 0
    assert (here / "lineage" / "HEAD").read_text() == "T-G3\n"
    assert len(list((here / "lineage" / "failed").iterdir())) == 1


def test_the_next_turn_replays_all_before_and_takes_data_and_suite_from_the_record(
    here: Path,
) -> None:
    assert run("evolve", write(here)).exit_code == 0
    request = {"parent_gen": "T-G3", "grandparent_gen": "T-G2", "child_gen": "T-G4"}
    changes = {
        "evolution_request": {**MANIFEST["evolution_request"], **request},
        "teachers": {
            "teacher1": {"gen": 3, "role": "primary", "path": "lineage/generations/T-G3"},
            "teacher2": {"gen": 2, "role": "stabilizing_critic", "path": "two"},
        },
        "training_params__steps": 1,
    }
    path = write(here, "next.json", data=None, replay={"fraction": 0.5}, **changes)
    result = run("evolve", path)
    assert result.exit_code == 0, result.output
    assert "T-G2 has no data on record" in result.stderr
    sources = open_store(here / "runs" / "T-G4" / "store").manifest["sources"]
    assert [(s["name"], s["documents"]) for s in sources] == [("new", 20), ("T-G3", 3), ("T-G1", 3)]
    lineage = open_lineage(here / "lineage")
    assert lineage.head == "T-G4"
    told = [(entry["event"], entry["generation"]) for entry in lineage.log()]
    assert ("init", "T-G3") not in told  # it came in by its promotion
    assert lineage.ancestors("T-G4") == ["T-G4", "T-G3", "T-G2", "T-G1"]
    # Data of one generation gone: said, and the others serve. Of all: an error.
    request["child_gen"] = "T-G5"
    changes["evolution_request"] = {**MANIFEST["evolution_request"], **request}
    (here / "old.jsonl").unlink()
    write_jsonl(here / "more.jsonl", [{"text": text} for text in sentences(12, 9)])
    data = {"train": ["more.jsonl"], "suite": "suite.jsonl"}
    path = write(here, "third.json", data=data, replay=None, **changes)
    result = run("evolve", path)
    assert result.exit_code == 0, result.output
    assert "old.jsonl: is gone" in result.stderr
    record = json.loads((here / "runs" / "T-G5" / "evolve.json").read_text())
    assert record["stages"]["replay"]["gone"] == ["T-G1"]
    (here / "new.jsonl").unlink()
    request["child_gen"] = "T-G6"
    changes["evolution_request"] = {**MANIFEST["evolution_request"], **request}
    result = run("evolve", write(here, "fourth.json", data=data, replay=None, **changes))
    assert result.exit_code == 3
    assert "nothing is left to replay" in json.loads(result.stdout)["error"]


def test_a_turn_that_is_stopped_anywhere_goes_on_to_the_same_child(here: Path) -> None:
    path = write(here)
    evolve(path)
    expected = load_file(here / "runs" / "T-G3" / "train" / "model.safetensors")
    log = [(e["seq"], e["event"]) for e in open_lineage(here / "lineage").log()]
    shutil.rmtree(here / "lineage")
    shutil.rmtree(here / "runs")
    record = here / "runs" / "T-G3" / "evolve.json"
    stopped = []
    for stage in ("build", "train", "evaluate", "promote"):

        def stop(stage: str = stage) -> bool:
            """From some moment within the stage on; the stage before it is recorded then."""
            nonlocal asked
            before = {"build": "replay", "train": "build", "evaluate": "train"}
            done = json.loads(record.read_text())["stages"] if record.is_file() else {}
            asked += before.get(stage, stage) in done
            return asked > 2

        asked = 0
        try:
            outcome = evolve(path, stop=stop)
        except Interrupted:
            stopped.append(stage)
    assert stopped == ["build", "train", "evaluate"]
    assert outcome.promoted
    found = load_file(here / "runs" / "T-G3" / "train" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [(e["seq"], e["event"]) for e in open_lineage(here / "lineage").log()] == log


def test_a_stage_that_was_done_but_not_recorded_is_not_done_twice(here: Path) -> None:
    """As after a kill -9 between the work and its record."""
    path = write(here)
    evolve(path)
    expected = {**files(here / "lineage"), **files(here / "runs")}
    record_path = here / "runs" / "T-G3" / "evolve.json"
    stages = ["replay", "build", "train", "evaluate", "promote"]
    for number in (1, 3):
        record = json.loads(record_path.read_text())
        for name in stages[number:]:
            del record["stages"][name]
        record_path.write_text(json.dumps(record))
        shutil.rmtree(here / "lineage" / "generations" / "T-G3")
        log = (here / "lineage" / "log.jsonl").read_text().splitlines(keepends=True)
        (here / "lineage" / "log.jsonl").write_text("".join(log[: 2 + number - 1]))
        (here / "lineage" / "HEAD").write_text("T-G2\n")
        evolve(path)
        found = {**files(here / "lineage"), **files(here / "runs")}
        changed = {k for k in {*found, *expected} if found.get(k) != expected.get(k)}
        assert changed <= {"log.jsonl", "T-G3/evolve.json"}, (stages[number], changed)
        assert events(here) == [*TURN, ("promote", "T-G3")]
    record = json.loads(record_path.read_text())
    done = record["stages"].pop("promote")
    record_path.write_text(json.dumps(record))
    log = (here / "lineage" / "log.jsonl").read_text()
    evolve(path)
    assert json.loads(record_path.read_text())["stages"]["promote"] == done
    assert (here / "lineage" / "log.jsonl").read_text() == log


def test_sigterm_saves_and_exits_with_75_and_the_same_command_finishes(here: Path) -> None:
    path = write(here, training_params__steps=100)
    command = [sys.executable, "-m", "distill", "evolve", str(path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        log = here / "runs" / "T-G3" / "train" / "log.jsonl"
        while process.poll() is None and not (log.is_file() and log.stat().st_size):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate()
    assert process.returncode == 75, errors.decode()[-2000:]
    assert "run the same command again" in json.loads(output)["hint"]
    assert events(here) == TURN[:3]
    assert (here / "lineage" / "HEAD").read_text() == "T-G2\n"
    result = run("evolve", path)
    assert result.exit_code == 0, result.output
    assert "going on from checkpoint-" in result.stderr
    assert "done: build, replay" in result.stderr


def test_what_cannot_go_well_is_refused_before_anything_is_built(here: Path) -> None:
    path = write(here)
    (here / "lineage").mkdir()
    with open(here / "lineage" / "lineage.lock", "a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run("evolve", path).exit_code == 5
    (here / "lineage" / "generations" / "T-G3").mkdir(parents=True)
    result = run("evolve", path)
    assert result.exit_code == 6
    assert "the name is taken by something else" in json.loads(result.stdout)["error"]
    shutil.rmtree(here / "lineage")
    words = ("lineage", "init", "--lineage", here / "lineage", "--add", f"T-G2={here / 'one'}")
    assert run(*words).exit_code == 0
    result = run("evolve", path)
    assert result.exit_code == 2
    assert "T-G2 is there with other weights" in json.loads(result.stdout)["error"]
    other: dict[str, Any] = {"lineage": "other"}
    for changes, message in (
        ({"data": {"train": ["new.jsonl"]}}, "data.suite: is missing; expected a file"),
        ({"data": {"suite": "suite.jsonl"}}, "data.train: is missing; expected files"),
        ({"output": "other/work"}, "expected neither within the other"),
        ({"output": "one"}, "holds the input one"),
        ({"output": "new.jsonl"}, "expected a folder, found a file"),
        ({"lineage": "one"}, "expected an empty folder or a lineage, found other files"),
        ({"train__optim": "nosuch"}, "nosuch"),
        ({"store__seq_len": 500}, "reads at most 128 tokens"),
    ):
        result = run("evolve", write(here, "wrong.json", **{**other, **changes}))
        assert result.exit_code == 2, (changes, result.output)
        assert message in json.loads(result.stdout)["error"], changes
    (here / "bad.jsonl").write_text('{"kind": "recall"}\n')
    result = run("evolve", write(here, "wrong.json", data__suite="bad.jsonl", lineage="other"))
    assert result.exit_code == 3
    assert not (here / "runs" / "T-G3" / "store").exists()
    assert not (here / "runs" / "T-G3" / "evolve.json").exists()


def test_several_processes_of_torchrun_are_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("evolve", write(here))
    assert result.exit_code == 2
    assert not (here / "lineage").exists()


@pytest.fixture
def lineage(here: Path) -> Path:
    """A lineage whose HEAD is model two, named A, and a candidate folder, child."""
    assert (
        run("lineage", "init", "--lineage", here / "L", "--add", f"A={here / 'two'}").exit_code == 0
    )
    shutil.copytree(here / "one", here / "child")
    return here / "L"


def promote(lineage: Path, candidate: str, *words: str, suite: str = "suite.jsonl") -> Result:
    here = lineage.parent
    options = ("--candidate", here / candidate, "--suite", here / suite, "--device", "cpu")
    small = ("--set", "max_new_tokens=4", "--set", "min_tone_items=2")
    return run("promote", "--lineage", lineage, *options, *small, *words)


def gates(result: Result) -> dict[str, dict[str, Any]]:
    return {gate["name"]: gate for gate in json.loads(result.stdout)["gates"]}


def test_laws_that_training_broke_count_against_a_candidate(lineage: Path) -> None:
    broken = {"step": 1, "rule": "quiet", "prompt": "p", "output": "o", "detail": "said it"}
    (lineage.parent / "child" / "laws.jsonl").write_text(json.dumps(broken) + "\n")
    result = promote(lineage, "child", *(f"--set={k}={v}" for k, v in ALWAYS.items()))
    assert result.exit_code == 10
    assert gates(result)["laws"]["score"] == 1


def test_promotion_follows_the_threshold_and_is_recorded_once(lineage: Path) -> None:
    loose = [f"--set={key}={value}" for key, value in {**ALWAYS, "min_items": 1}.items()]
    result = promote(lineage, "child", *loose, "--set=delta=1.0", "--set=epsilon=0.0")
    assert result.exit_code == 10
    found = gates(result)
    gap = found["recall"]["teacher_score"] - found["recall"]["score"]
    assert gap >= 0, "the fixture's child knows more than its teacher"
    (failed,) = (lineage / "failed").iterdir()
    assert failed.name.startswith("child-")
    loose += ["--set=delta=0", f"--set=epsilon={gap}"]
    generalize = found["generalize"]["teacher_score"] - found["generalize"]["score"]
    assert generalize == gap  # the two items are the same
    before = (lineage / "HEAD").read_text()
    if gap > 0:
        assert promote(lineage, "child", *loose).exit_code == 10
    assert (lineage / "HEAD").read_text() == before


def test_a_candidate_equal_to_head_or_one_item_is_rejected(lineage: Path) -> None:
    shutil.copytree(lineage.parent / "two", lineage.parent / "same")
    result = promote(lineage, "same", "--set=min_items=1")
    assert result.exit_code == 10, result.output
    assert gates(result)["recall"]["passed"]
    assert not gates(result)["generalize"]["passed"]
    assert any("very weights" in reason for reason in json.loads(result.stdout)["reasons"])
    loose = [f"--set={key}={value}" for key, value in ALWAYS.items()]
    result = promote(lineage, "child", *loose)  # one item of recall, where eight are needed
    assert result.exit_code == 10
    assert "too little evidence" in gates(result)["recall"]["note"]
    assert (lineage / "HEAD").read_text() == "A\n"


def test_a_candidate_in_force_is_not_promoted_again(lineage: Path) -> None:
    loose = [f"--set={key}={value}" for key, value in {**ALWAYS, "min_items": 1}.items()]
    two = lineage.parent / "two"
    shutil.copytree(two, lineage.parent / "B")
    weights = load_file(two / "model.safetensors")
    weights["model.norm.weight"] *= 1.0001  # another model that answers the same
    save_file(weights, lineage.parent / "B" / "model.safetensors", metadata={"format": "pt"})
    result = promote(lineage, "B", *loose, f"--data={lineage.parent / 'new.jsonl'}")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["head"] == "B"
    ((recorded, _),) = open_lineage(lineage).recorded_data("B").items()
    assert recorded.name == "new.jsonl"
    before = files(lineage)
    again = promote(lineage, "B", *loose)
    assert again.exit_code == 0
    assert "promotion already recorded" in again.stderr
    assert files(lineage) == before
    assert (
        run("lineage", "rollback", "--lineage", lineage, "--to", "A", "--reason", "x").exit_code
        == 0
    )
    assert promote(lineage, "B", *loose).exit_code == 0
    assert (lineage / "HEAD").read_text() == "A\n"  # an earlier decision moves nothing
    assert promote(lineage, "child", *loose, "--id", "B").exit_code == 6  # the name is taken


def test_gates_that_crash_give_no_number_or_take_too_long_reject(lineage: Path) -> None:
    child = lineage.parent / "child"
    weights = load_file(child / "model.safetensors")
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, child / "model.safetensors", metadata={"format": "pt"})
    loose = [f"--set={key}={value}" for key, value in {**ALWAYS, "min_items": 1}.items()]
    result = promote(lineage, "child", *loose)
    assert result.exit_code == 10, result.output
    assert not gates(result)["tone"]["passed"]
    result = promote(lineage, "one", *loose, "--set=time_limit_s=1e-9")
    assert result.exit_code == 10
    assert "ran out of time" in gates(result)["recall"]["note"]
    # Shapes that cannot be loaded: no gate can be computed at all.
    config = json.loads((child / "config.json").read_text())
    (child / "config.json").unlink()
    (child / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    result = promote(lineage, "child", *loose)
    assert result.exit_code == 4
    assert (lineage / "HEAD").read_text() == "A\n"
    assert len(list((lineage / "failed").iterdir())) == 2


def test_promote_refuses_what_cannot_be_judged(lineage: Path) -> None:
    here = lineage.parent
    assert promote(lineage, "nosuch").exit_code == 2
    assert promote(lineage, "child", suite="nosuch.jsonl").exit_code == 3
    assert promote(lineage, "child", "--set", "epsilom=1").exit_code == 2
    assert promote(lineage, "child", "--laws", str(here / "nosuch.json")).exit_code == 3
    assert promote(lineage, "child", "--id", "../x").exit_code == 2
    assert promote(here / "none", "child").exit_code == 2
    assert os.listdir(lineage / "generations") == ["A"]
    assert not (lineage / "failed").exists()
