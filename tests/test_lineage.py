"""A lineage on disk: registering, promoting, archiving, rolling back, dying at any point."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from lineage_worker import make_folder, verdict

from distill.bundled import BUNDLED
from distill.cli import cli
from distill.gates import GATE_NAMES
from distill.lineage import Lineage, Member, describe_data, open_lineage, register, writing
from distill.promote import Candidate, admit, checked, finished, judge_soundly
from logitcache.errors import InputError, LockedError, ResourceError, StoreError, UsageError

WORKER = Path(__file__).with_name("lineage_worker.py")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A lineage of G9 and G10, and the folders nine, ten and eleven beside it."""
    for name in ("nine", "ten", "eleven"):
        make_folder(tmp_path / name, name)
    (tmp_path / "nine.jsonl").write_text('{"text": "of nine"}\n')
    nine = Member("G9", tmp_path / "nine", (tmp_path / "nine.jsonl",))
    with writing(tmp_path / "lineage", create=True) as lineage:
        register(lineage, [nine, Member("G10", tmp_path / "ten", parent="G9")])
    return tmp_path / "lineage"


def decide(root: Path, passed: bool, turn: str = "a" * 64, name: str = "G11"):
    candidate = Candidate(name, root.parent / "eleven", turn, {"parent": "G10"})
    with writing(root) as lineage:
        return admit(lineage, candidate, verdict(passed))


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def events(root: Path) -> list[tuple[int, str, str]]:
    return [(e["seq"], e["event"], e["generation"]) for e in open_lineage(root).log()]


def files(root: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.suffix != ".lock"}


def test_a_writer_killed_or_without_power_at_any_point_leaves_head_old_or_new() -> None:
    """Then the same command ends as if nothing had happened: init, promote, reject, rollback."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="lineage-", dir=place) as work:
        command = [sys.executable, str(WORKER), work]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    for name, result in results.items():
        assert result["wrong"] == [], (name, result["wrong"][:3])
    points = {name: result["points"] for name, result in results.items()}
    assert points["init:death"] > 40, points
    assert points["promote:death"] > 25, points
    assert results["promote:death"]["heads"] == ["G10", "G11"]
    assert results["reject:death"]["heads"] == ["G10"]
    assert results["rollback:death"]["heads"] == ["G11", "G9"]


def test_promotion_moves_head_and_keeps_verdict_and_parents(root: Path) -> None:
    outcome = decide(root, passed=True)
    assert (outcome.promoted, outcome.head, outcome.again) == (True, "G11", False)
    assert (root / "HEAD").read_text() == "G11\n"
    record = json.loads((root / "generations" / "G11" / "generation.json").read_text())
    assert record["parent"] == "G10"
    assert record["verdict"] == verdict(True)
    entry = open_lineage(root).log()[-1]
    assert (entry["event"], entry["head_before"], entry["head"]) == ("promote", "G10", "G11")
    assert set(entry["gates"]) == set(GATE_NAMES)
    assert "note" not in entry


def test_rejection_archives_the_candidate_and_leaves_head(root: Path) -> None:
    outcome = decide(root, passed=False)
    assert (outcome.promoted, outcome.head) == (False, "G10")
    assert (root / "HEAD").read_text() == "G10\n"
    assert outcome.place == root / "failed" / "G11-aaaaaaaa"
    assert json.loads((outcome.place / "verdict.json").read_text())["verdict"] == "rejected"
    assert (outcome.place / "model.safetensors").is_file()
    assert not (root / "generations" / "G11").exists()
    # Another attempt at the same child has a place of its own.
    assert decide(root, passed=False, turn="b" * 64).place.name == "G11-bbbbbbbb"
    assert decide(root, passed=True, turn="c" * 64).head == "G11"


@pytest.mark.parametrize("passed", [True, False])
def test_a_decision_that_is_recorded_is_not_recorded_twice(root: Path, passed: bool) -> None:
    decide(root, passed)
    before = files(root)
    again = decide(root, not passed)  # what is on record counts
    assert again.again
    assert again.promoted is passed
    assert files(root) == before


def test_a_child_of_a_parent_that_is_not_head_says_so_in_the_log(root: Path) -> None:
    decide(root, passed=True)
    decide(root, passed=True, turn="b" * 64, name="G12")
    assert "the parent G10 was not HEAD, which was G11" in open_lineage(root).log()[-1]["note"]


def test_run_files_and_pickles_are_no_part_of_a_generation(root: Path) -> None:
    folder = root.parent / "eleven"
    for name in ("run.json", "log.jsonl", "pytorch_model.bin", "train.lock"):
        (folder / name).write_text("{}")
    (folder / "raw").mkdir()
    decide(root, passed=True)
    kept = {path.name for path in (root / "generations" / "G11").iterdir()}
    assert kept == {
        *("config.json", "model.safetensors", "tokenizer.json"),
        *("generation.json", "verdict.json"),
    }


def test_curated_files_are_recorded_as_such(root: Path) -> None:
    files = [root.parent / "curated.jsonl", root.parent / "others.jsonl"]
    for file in files:
        file.write_text('{"text": "a"}\n', encoding="utf-8")
    entries = describe_data(files, root, files[:1])
    assert [entry.get("gold") for entry in entries] == [True, None]
    record = root / "generations" / "G10" / "generation.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "data": entries}))
    assert open_lineage(root).recorded_gold("G10") == {files[0]}


def test_rollback_puts_an_earlier_generation_in_force_with_its_reason(root: Path) -> None:
    decide(root, passed=True)
    words = ("lineage", "rollback", "--lineage", root, "--to", "G10", "--json")
    result = run(*words, "--reason", "it sings")
    assert json.loads(result.stdout) == {"head": "G10", "head_before": "G11", "moved": True}
    assert (root / "HEAD").read_text() == "G10\n"
    assert open_lineage(root).log()[-1]["reason"] == "it sings"
    before = files(root)
    assert json.loads(run(*words, "--reason", "it sings").stdout)["moved"] is False
    assert files(root) == before
    assert (root / "generations" / "G11").is_dir()
    # The promotion is history: recorded, and not made again.
    assert decide(root, passed=True).head == "G10"
    unknown = run("lineage", "rollback", "--lineage", root, "--to", "G7", "--reason", "x")
    assert unknown.exit_code == 2
    assert "there are: G10, G11, G9" in unknown.output
    assert run(*words, "--reason", " ").exit_code == 2


def test_one_writer_at_a_time(root: Path) -> None:
    before = files(root)
    with open(root / "lineage.lock", "a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(LockedError, match="locked by"):
            decide(root, passed=True)
        words = ("lineage", "rollback", "--lineage", root, "--to", "G9", "--reason", "x")
        assert run(*words).exit_code == 5
        assert run("lineage", "show", "--lineage", root).exit_code == 0  # readers go on
    assert files(root) == before


def test_a_name_that_is_taken_by_something_else_is_refused(root: Path) -> None:
    (root / "generations" / "G11").mkdir()
    with pytest.raises(ResourceError, match="the name is taken by something else") as caught:
        decide(root, passed=True)
    assert caught.value.exit_code == 6
    (root / "failed" / "G11-aaaaaaaa").mkdir(parents=True)
    with pytest.raises(ResourceError, match="G11-aaaaaaaa: the name is taken"):
        decide(root, passed=False)
    assert [event for _, event, _ in events(root)] == ["init", "init"]
    with pytest.raises(UsageError, match="G10 is there with other weights"), writing(root) as found:
        register(found, [Member("G10", root.parent / "eleven")])


@pytest.mark.skipif(
    not os.access("/dev/shm", os.W_OK)
    or os.stat("/dev/shm").st_dev == os.stat(tempfile.gettempdir()).st_dev,
    reason="needs a second file system",
)
def test_a_lineage_on_two_file_systems_is_refused_at_the_start(root: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        shutil.move(root / "generations", Path(elsewhere) / "generations")
        (root / "generations").symlink_to(Path(elsewhere) / "generations")
        with pytest.raises(ResourceError, match="rename between them would not be atomic"):
            decide(root, passed=True)


def test_what_is_damaged_is_named_and_not_repaired(root: Path) -> None:
    path = root / "generations" / "G9" / "generation.json"
    path.write_text("{")
    with pytest.raises(StoreError, match=r"G9/generation\.json: not the record of a generation"):
        open_lineage(root).generations()
    lines = (root / "log.jsonl").read_text().splitlines(keepends=True)
    torn = lines[0] + lines[1].rstrip("\n")[:-1]
    for text in (lines[1], lines[0] + lines[0], lines[0] + '{"seq": 2', "3\n", torn):
        (root / "log.jsonl").write_text(text)
        with pytest.raises(StoreError, match=r"log\.jsonl:\d: expected a record with seq"):
            decide(root, passed=True)
    (root / "HEAD").write_text("../elsewhere\n")
    assert run("lineage", "show", "--lineage", root).exit_code == 4
    assert run("lineage", "show", "--lineage", root.parent / "none").exit_code == 2


def test_init_registers_once_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    one, two = (make_folder(tmp_path / name, name) for name in ("one", "two"))
    (tmp_path / "data.jsonl").write_text('{"text": "x"}\n')
    words = ["lineage", "init", "--lineage", tmp_path / "L", "--json", "--add", f"A={one}"]
    words += ["--add", f"B={two}"]
    result = run(*words, "--data", f"A={tmp_path / 'data.jsonl'}")
    assert json.loads(result.stdout) == {"registered": ["A", "B"], "head": "B"}
    before = files(tmp_path / "L")
    assert json.loads(run(*words).stdout)["registered"] == []
    assert files(tmp_path / "L") == before
    found = Lineage(tmp_path / "L")
    assert found.generation("B")["parent"] == "A"
    assert found.ancestors("B") == ["B", "A"]
    ((path, sha256),) = found.recorded_data("A").items()
    assert path == tmp_path / "data.jsonl"
    assert sha256 == hashlib.sha256(b'{"text": "x"}\n').hexdigest()
    assert found.recorded_data("B") == {}
    # One that comes later does not move HEAD.
    more = ["lineage", "init", "--lineage", tmp_path / "L", "--add", f"C={one}", "--json"]
    assert json.loads(run(*more).stdout) == {"registered": ["C"], "head": "B"}
    start = words[:4]
    for wrong, code in (
        ([*start, "--add", "noequals"], 2),
        ([*start, "--add", f"../D={one}"], 2),
        ([*start, "--add", f"D={one}", "--add", f"D={two}"], 2),
        ([*start, "--add", f"D={one}", "--data", "E=x"], 2),
        ([*start, "--add", f"B={two}", "--data", f"B={one / 'config.json'}"], 2),
        ([*start, "--add", f"D={tmp_path / 'none'}"], 2),
        ([*start, "--add", f"D={one}", "--data", f"D={tmp_path / 'none'}"], 3),
        (["lineage", "init", "--lineage", one, "--add", f"D={two}"], 2),
    ):
        result = run(*wrong)
        assert result.exit_code == code, (wrong, result.output)
    assert events(tmp_path / "L") == [(1, "init", "A"), (2, "init", "B"), (3, "init", "C")]


def test_show_log_and_export_tell_of_all_of_it(root: Path) -> None:
    decide(root, passed=False)
    decide(root, passed=True, turn="b" * 64)
    shown = run("lineage", "show", "--lineage", root).output.splitlines()
    assert shown[0] == "G9"
    assert shown[1] == "`- G10"
    assert "+- G11  <- HEAD" in shown[2]
    assert "recall 0.500 passed" in shown[3]
    assert "`- G11-aaaaaaaa  FAILED" in shown[4]
    assert "recall 0.500 FAILED" in shown[5]
    document = json.loads(run("lineage", "show", "--lineage", root, "--json").stdout)
    assert [n["folder"] for n in document["generations"] if n["head"]] == ["G11"]
    text = run("lineage", "log", "--lineage", root).output
    assert "HEAD G10 -> G11" in text
    assert "recall: 0.1 is below 0.45" in text
    exported = json.loads(run("lineage", "export", "--lineage", root).stdout)
    assert [entry["seq"] for entry in exported["log"]] == [1, 2, 3, 4]
    dot = run("lineage", "export", "--lineage", root, "--to", "graphviz").output
    assert '"G10" -> "G11";' in dot
    assert dot.count("{") == dot.count("}") == 1
    mermaid = run("lineage", "export", "--lineage", root, "--to", "mermaid").output
    assert mermaid.startswith("flowchart TD")
    assert "G11 (HEAD)" in mermaid


def test_a_reason_with_control_codes_does_not_reach_the_terminal(root: Path) -> None:
    reason = "\x1b[2J\nSECOND\u2028LINE \udc80"
    run("lineage", "rollback", "--lineage", root, "--to", "G9", "--reason", reason)
    shown = run("lineage", "log", "--lineage", root).output
    assert "\x1b" not in shown
    assert len(shown.splitlines()) == 3
    assert open_lineage(root).log()[-1]["reason"] == reason


@pytest.mark.parametrize(
    "change",
    [
        {"score": float("nan")},
        {"interval": [0.1, float("inf")]},
        {"passed": False},
        {"passed": 1.0},
        None,
    ],
)
def test_a_gate_that_is_missing_or_gives_no_number_rejects(change: dict | None) -> None:
    document = verdict(True)
    if change is None:
        del document["gates"][1]
    else:
        document["gates"][1] |= change
    found = checked(document)
    assert found["verdict"] == "rejected"
    assert [gate["name"] for gate in found["gates"]] == list(GATE_NAMES)
    assert [gate["passed"] for gate in found["gates"]] == [True, False, True, True]
    assert any(reason.startswith("generalize") for reason in found["reasons"])
    json.dumps(found, allow_nan=False)
    assert checked(verdict(True)) == verdict(True)


def test_whatever_breaks_while_a_candidate_is_judged_rejects_it(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "suite.jsonl").write_text('{"kind": "law", "prompt": "x"}\n')
    models = [BUNDLED / name for name in ("teacher2", "teacher1")]
    found = judge_soundly(
        *models, tmp_path / "suite.jsonl", note=said.append, settings=None, device="cpu"
    )
    assert found["verdict"] == "rejected"
    assert "the gates could not be evaluated: AttributeError" in found["reasons"][0]
    assert [gate["passed"] for gate in found["gates"]] == [False] * 4
    assert "Traceback" in said[-1]
    with pytest.raises(InputError):  # that says nothing of the candidate
        judge_soundly(*models, tmp_path / "none.jsonl", note=said.append, device="cpu")


def test_the_model_that_was_judged_is_the_one_that_is_kept(root: Path) -> None:
    """A folder that changes while it is copied is not taken in."""
    lineage = Lineage(root)
    other = {"weights_sha256": "0" * 64, "config_sha256": "0" * 64}
    with pytest.raises(ResourceError, match="changed while it was copied"):
        lineage.place(root.parent / "eleven", lineage.folder("G11"), other, {"verdict": None})
    assert not lineage.folder("G11").exists()
    candidate = Candidate("G11", root.parent / "eleven", "a" * 64, {})
    assert finished(lineage, candidate) is None
