"""The commands evaluate and generate, run as a user would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny import sentences, write_jsonl

from distill.bundled import BUNDLED
from distill.cli import cli
from distill.cli_evaluate import plain
from distill.generate import load_speaker
from distill.suite import read_suite

PROMPTS = sentences(10, seed=31, words=5)
SHORT = ("--set", "max_new_tokens=6", "--set", "bootstrap_samples=50", "--device", "cpu")


def _run(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def _json(*words: object) -> dict:
    result = _run(*words, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records: list[dict] = []
    for kind in ("recall", "generalize"):
        records += [
            {"kind": kind, "prompt": p[:12], "expect": p[12:], "score": "tokens"} for p in PROMPTS
        ]
    records += [{"kind": "tone", "prompt": prompt, "reference": PROMPTS[0]} for prompt in PROMPTS]
    records.append({"kind": "law", "prompt": PROMPTS[0]})
    return write_jsonl(tmp_path_factory.mktemp("suite") / "suite.jsonl", records)


@pytest.fixture(scope="module")
def laws(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("laws") / "laws.yaml"
    path.write_text("- {id: sign, description: d, kind: require, pattern: yours}\n")
    return path


def test_scores_alone(teacher1: Path, suite: Path, laws: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "scores.json"
    command = ("evaluate", "--model", teacher1, "--suite", suite, "--laws", laws, *SHORT)
    document = _json(*command, "--out", out)
    assert json.loads(out.read_text()) == document
    assert set(document["scores"]) == {"recall", "generalize", "laws"}
    recall = document["scores"]["recall"]
    scores = [item["score"] for item in document["items"] if item["kind"] == "recall"]
    assert recall["items"] == len(scores) == 10
    assert recall["score"] == pytest.approx(sum(scores) / 10)
    assert recall["interval"][0] <= recall["score"] <= recall["interval"][1]
    assert document["scores"]["laws"] == {"score": 1, "items": 31, "interval": None}
    assert document["violations"][0]["id"] == "law-31"
    assert all(isinstance(item["output"], str) for item in document["items"])
    text = _run(*command, "--quiet").stdout
    assert "recall" in text
    assert "law sign broken by law-31: has no match of 'yours'" in text


def test_verdict_with_a_reference_is_told_with_exit_code_0(
    teacher1: Path, teacher2: Path, suite: Path, tmp_path: Path
) -> None:
    command = ("evaluate", "--model", teacher2, "--reference", teacher1, "--suite", suite)
    result = _run(*command, *SHORT, "--out", tmp_path / "v.json", "--set", "epsilon=1")
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "v.json").read_text())
    assert document["verdict"] == "rejected"
    assert document["settings"]["epsilon"] == 1.0
    assert [gate["name"] for gate in document["gates"]] == ["recall", "generalize", "tone", "laws"]
    assert document["gates"][0]["passed"]
    assert f"{teacher2.name} against {teacher1.name}: rejected" in result.stdout
    assert document["reasons"][-1] in result.stdout


def test_wrong_commands_say_what_is_wrong(teacher1: Path, suite: Path, tmp_path: Path) -> None:
    base = ("evaluate", "--model", teacher1, "--suite", suite)
    for words, code, message in (
        (("--set", "epsilom=0.1", "--set", "delta=2"), 2, "epsilom: no such setting"),
        (("--set", "delta=2"), 2, "delta: "),
        (("--out", tmp_path), 2, "expected a file, found a folder"),
        (("--laws", tmp_path / "none.yaml"), 3, "no such file of laws"),
        (("--reference", tmp_path / "none"), 2, "no such model folder"),
    ):
        result = _run(*base, *words)
        assert (result.exit_code, message in result.stderr) == (code, True), result.output
    result = _run("evaluate", "--model", teacher1, "--suite", tmp_path / "none.jsonl")
    assert result.exit_code == 3
    go = ("generate", "--model", teacher1)
    for words, message in (
        (("--prompt", "a", "--top-p", "0.5", "--seed", "3"), "--top-p: expected --sample"),
        (("--prompt", "a", "--stream", "--beams", "2"), "--stream: expected one --prompt"),
        (("--prompt", "a", "--weight", "1", "--weight", "2"), "one for each of 1 models"),
        (("--prompt", "a", "--weight", "-1"), "expected positive numbers"),
    ):
        result = _run(*go, *words)
        assert (result.exit_code, message in result.stderr) == (2, True), result.output
    result = _run(*go, "--prompt", " ".join(PROMPTS), "--max-new-tokens", "100")
    assert (result.exit_code, "the model reads at most 128" in result.stderr) == (3, True)
    assert _run(*go, "--prompt", "").exit_code == 3


def test_generate_with_one_model_says_what_the_model_says(teacher1: Path, tmp_path: Path) -> None:
    go = ("generate", "--model", teacher1, "--max-new-tokens", "8", "--device", "cpu")
    document = _json(*go, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1][:9])
    path = write_jsonl(
        tmp_path / "s.jsonl",
        [{"kind": "tone", "prompt": p} for p in (PROMPTS[0], PROMPTS[1][:9])],
    )
    answers = load_speaker(teacher1, "cpu").answer(read_suite(path).items, 8)
    assert [output["text"] for output in document["outputs"]] == [a.text for a in answers]
    result = _run(*go, "--prompt", PROMPTS[0])
    assert result.stdout == plain(answers[0].text) + "\n"
    streamed = _run(*go, "--prompt", PROMPTS[0], "--stream")
    assert streamed.stdout == result.stdout
    chat = _json(*go, "--prompt", PROMPTS[0], "--chat")
    assert chat["outputs"][0]["text"] != answers[0].text


def test_generate_with_several_models_states_memory_and_mixes(
    teacher1: Path, teacher2: Path
) -> None:
    go = ("generate", "--max-new-tokens", "6", "--prompt", PROMPTS[0], "--device", "cpu")
    both = ("--model", teacher1, "--weight", "3", "--model", teacher2, "--weight", "1")
    result = _run(*go, *both)
    assert result.exit_code == 0, result.output
    assert "weights in memory: " in result.stderr
    assert f"{teacher1.name} " in result.stderr
    document = _json(*go, *both)
    assert [model["weight"] for model in document["models"]] == [0.75, 0.25]
    assert document["models"][0]["bytes"] > 10_000
    sample = (*both, "--sample", "--temperature", "1.5", "--top-p", "0.9")
    first = _json(*go, *sample, "--seed", "4")
    assert first == _json(*go, *sample, "--seed", "4")
    texts = {_json(*go, *sample, "--seed", str(n))["outputs"][0]["text"] for n in range(4)}
    assert len(texts) > 1
    probs = _json(*go, *both, "--mix", "probs", "--beams", "3")
    assert probs["mix"] == "probs"
    alone = {_json(*go, "--model", m)["outputs"][0]["text"] for m in (teacher1, teacher2)}
    assert len(alone) == 2


def test_control_characters_are_shown_not_obeyed() -> None:
    assert plain("a\x1b[2J\x9b\tb\nc\x7f") == "a\\x1b[2J\\x9b\tb\nc\\x7f"
    assert plain("käse \u2028 \U0001f600") == "käse \u2028 \U0001f600"


def test_help_needs_no_torch() -> None:
    for command in ("evaluate", "generate"):
        code = (
            "import sys\nfrom distill.cli import cli\n"
            f"cli(['{command}', '--help'], standalone_mode=False)\n"
            "assert not {'torch', 'transformers'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_bundled_suite_leaves_room_above_and_below_teacher1() -> None:
    document = _json(
        *("evaluate", "--model", BUNDLED / "teacher1", "--suite", BUNDLED / "suite.jsonl"),
        *("--laws", BUNDLED / "laws.yaml", "--device", "cpu"),
    )
    scores = document["scores"]
    for kind in ("recall", "generalize"):
        assert scores[kind]["items"] >= 12
        assert 0.1 < scores[kind]["score"] < 0.6
    assert sum(item["kind"] == "tone" for item in document["items"]) >= 6
    assert scores["laws"]["score"] == 0, document["violations"]


def test_bundled_teacher2_is_no_successor_of_teacher1(tmp_path: Path) -> None:
    document = _json(
        *("evaluate", "--model", BUNDLED / "teacher2", "--reference", BUNDLED / "teacher1"),
        *("--suite", BUNDLED / "suite.jsonl", "--set", "max_new_tokens=32", "--device", "cpu"),
    )
    passed = {gate["name"]: gate["passed"] for gate in document["gates"]}
    # It knows the earlier plays better, has not read the later ones, and speaks otherwise.
    assert passed == {"recall": False, "generalize": True, "tone": False, "laws": True}
