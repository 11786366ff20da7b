"""Pages of report: a run, or a turn of evolve, with what it has and what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from page_checks import HOSTILE, check_harmless, check_quiet, run_cli
from tiny import write_jsonl

import distill.cli
from distill.report import read_run
from logitcache.errors import InputError
from logitcache.page import number, visible


def report_page(run: Path, page: Path) -> dict:
    result = run_cli(distill.cli.cli, "report", run, "--html", page, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, built) -> Path:
    """A run of three steps, evaluated before, meanwhile and after."""
    from distill.train import TrainRequest, train

    out = tmp_path_factory.mktemp("report") / "run"
    settings = {
        "use_cpu": True,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "js_threshold": 0.4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "seed": 3,
    }
    teacher1 = built.settings["teacher1"]
    train(TrainRequest(built.path, teacher1, out, built.path, settings))
    return out


def turn(folder: Path, trained: Path, text: str = "plain") -> Path:
    """A folder as evolve leaves one, with a text in all that comes from documents or models."""
    shutil.copytree(trained, folder / "train", ignore=shutil.ignore_patterns("*.safetensors"))
    failing = {"id": "r1", "prompt": text, "expect": text, "output": text, "teacher_output": text}
    gates = [
        {"name": "recall", "passed": True, "score": 0.75, "teacher_score": 0.7, "threshold": 0.65,
         "items": 12, "interval": [0.6, 0.9], "failing": [failing], "note": text},
        {"name": "generalize", "passed": False, "score": None, "teacher_score": None,
         "threshold": None, "items": 0, "interval": None, "failing": [], "note": None},
        {"name": "tone", "passed": True, "score": 0.01, "teacher_score": 0.0, "threshold": 0.05,
         "items": 6, "interval": [0.0, 0.02], "failing": [], "note": None},
        {"name": "laws", "passed": True, "score": 0.0, "teacher_score": 1.0, "threshold": 0.0,
         "items": 4, "interval": None, "failing": [], "note": None},
    ]  # fmt: skip
    documents = {
        "verdict.json": {"verdict": "rejected", "reasons": [text], "candidate": text,
                         "reference": "teacher1", "gates": gates, "settings": {}},
        "evolve.json": {"child": "Luna-G011", "parent": text, "stages": {"build": {"of": text}},
                        "manifest": {"evolution_request": {"child_gen": text}}},
        "taboo.json": {"words": [text], "mass": {"teacher1": 0.02, "child": 0.001}},
    }  # fmt: skip
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    outputs = {"child": text, "teacher1": text, "teacher2": text}
    item = {"id": "r1", "kind": "recall", "prompt": text, "expect": text, "outputs": outputs}
    chat = [{"role": "user", "content": text}]
    write_jsonl(folder / "generations.jsonl", [item, {**item, "prompt": chat, "outputs": {}}])
    breach = {"rule": "no-loops", "prompt": text, "output": text, "detail": text, "step": 2}
    write_jsonl(folder / "train" / "laws.jsonl", [breach])
    with open(folder / "train" / "log.jsonl", "a", encoding="utf-8") as log:
        for step, loss in ((1, 1.5), (2, 1.25), (3, float("nan"))):
            sources = {f"source_loss/{text}": loss, "source_loss/new": loss}
            log.write(json.dumps({"step": step, **sources}) + "\n")
    return folder


def test_a_run_is_shown_with_what_it_has_and_what_is_missing(trained, tmp_path, browser):
    file = tmp_path / "page.html"
    document = report_page(trained, file)
    assert document["missing"] == [
        "evolve.json", "verdict.json", "generations.jsonl", "taboo.json", "laws.jsonl"
    ]  # fmt: skip
    page = browser.open(file)
    check_quiet(page, file)
    said = page.run("document.body.innerText")
    for part in ("Loss and its parts", "Strategies", "Held-out loss", "Divergence of the teachers"):
        assert part in said
    assert "the four gates: no verdict.json here" in said
    assert "trained, not judged" in said
    record = json.loads((trained / "run.json").read_text())
    before, after = record["before"]["before_loss"], record["after"]["after_loss"]
    assert f"{number(before)} \u2192 {number(after)}" in said
    assert "js_threshold\t0.4" in said
    assert record["environment"]["versions"]["torch"] in said
    # Loss at steps 1 to 3 and its parts; held-out loss at steps 0, 2 and 3.
    titles = page.run("[...document.querySelectorAll('polyline title')].map((t) => t.textContent)")
    steps = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in steps if "loss" in entry]
    assert f"loss: {number(losses[0])} at 1.00, {number(losses[-1])} at 3.00" in titles
    page.close()


def test_a_turn_is_shown_whole(trained, tmp_path, browser):
    file = tmp_path / "page.html"
    document = report_page(turn(tmp_path / "turn", trained), file)
    assert (document["verdict"], document["missing"]) == ("rejected", [])
    assert document["notes"] == ["log.jsonl: 2 numbers that are not finite are not drawn"]
    page = browser.open(file)
    check_quiet(page, file)
    said = page.run("document.body.innerText")
    assert "Luna-G011" in said
    for part in (
        "rejected",
        "at least 0.650",
        "0.600 to 0.900",
        "at most 0.050",
        "Loss by source",
        "build: done",
    ):
        assert part in said
    assert "0.050 times what teacher 1 does" in said
    assert "user: plain" in said
    heads = page.run("[...document.querySelectorAll('th')].map((t) => t.textContent)")
    assert heads[-5:] == ["prompt", "expected", "teacher 2", "teacher 1", "child"]
    at = page.run("document.querySelector('.glyph .score').getAttribute('cx')")
    assert float(at) == pytest.approx(6 + (0.75 - 0.555) / 0.39 * 208, abs=0.01)
    page.close()


def test_hostile_text_stays_text_in_a_report(trained, tmp_path, browser):
    for place, text in enumerate(HOSTILE):
        file = tmp_path / f"{place}.html"
        report_page(turn(tmp_path / f"turn-{place}", trained, text), file)
        page = browser.open(file)
        check_harmless(page, file, scripts=0)
        cells = page.run("[...document.querySelectorAll('.text')].map((t) => t.textContent)")
        assert sum(visible(text) in cell for cell in cells) > 12
        page.close()


def test_pages_follow_the_scheme_of_their_reader(trained, tmp_path, browser):
    file = tmp_path / "page.html"
    report_page(trained, file)
    colours = []
    for dark in (False, True):
        page = browser.open(file, dark=dark)
        colours.append(page.run("getComputedStyle(document.body).backgroundColor"))
        page.close()
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


def test_the_histograms_are_of_the_store_of_the_run_alone(trained, hostile, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    record = json.loads((folder / "run.json").read_text())
    for changes, why in (
        ({"store": str(hostile.store)}, "is not the one of this run"),
        ({"store": "s3://bucket/store"}, "is a remote one"),
        ({"settings": {"js_threshold": "much"}}, "the settings of run.json"),
    ):
        (folder / "run.json").write_text(json.dumps({**record, **changes}))
        report_page(folder, tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert why in text
        assert "Divergence of the teachers" not in text


def test_what_is_no_run_is_refused(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    for name, code, said in (
        ("nothing", 2, "expected the folder of a run, found nothing"),
        ("file", 2, "expected the folder of a run, found a file"),
        ("empty", 3, "not a run: expected run.json or evolve.json, found an empty folder"),
    ):
        result = run_cli(distill.cli.cli, "report", tmp_path / name, "--html", tmp_path / "a.html")
        assert (result.exit_code, said in result.output) == (code, True), result.output
        assert not (tmp_path / "a.html").exists()
    own = trained / "log.jsonl"
    result = run_cli(distill.cli.cli, "report", trained, "--html", own)
    assert result.exit_code == 2
    assert own.read_text().startswith("{")


def test_all_broken_files_of_a_run_are_named_at_once(trained, tmp_path):
    folder = turn(tmp_path / "turn", trained)
    (folder / "verdict.json").write_text('{"verdict": "\\u001b[31m", "gates": [{"name": 3}]}')
    (folder / "taboo.json").write_text("[" * 100_000)
    (folder / "evolve.json").write_text('{"stages":' * 60 + "{}" + "}" * 60)
    (folder / "generations.jsonl").write_text('{"outputs": {}}\n{"outputs": 7}\n')
    (folder / "train" / "log.jsonl").write_text("[1]\n")
    (folder / "train" / "laws.jsonl").write_text('{"rule": "a"}\nnot JSON\n{"rule": "b"}\n')
    with pytest.raises(InputError) as caught:
        read_run(folder)
    message = str(caught.value)
    assert "\x1b" not in message  # it goes to a terminal
    for part in (
        "verdict.json: verdict",
        "gates.0.name",
        "gates.0.passed",
        "taboo.json: not JSON",
        "evolve.json: not JSON: nested more than 50",
        "generations.jsonl:2: outputs",
        "log.jsonl:1: expected a record of training, with a step, found [1]",
        "laws.jsonl:2: not JSON",
    ):
        assert part in message


def test_the_unfinished_last_line_of_a_killed_run_is_noted(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    whole = read_run(folder)
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 9, "loss')
    run = read_run(folder)
    assert run.log.records == whole.log.records
    assert run.notes == ["log.jsonl: the last line is unfinished and was left out"]
    assert run.log.columns.keys() == whole.log.columns.keys()
    document = report_page(folder, tmp_path / "page.html")
    assert document["notes"] == run.notes
