"""Pages of inspect: right figures, in a real browser; hostile text stays text."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from page_checks import HOSTILE, check_harmless, check_quiet, run_cli

import logitcache.cli
import logitcache.inspect as inspection
from logitcache import build, open_store
from logitcache.errors import UsageError
from logitcache.inspect import measure, parse_rows
from logitcache.inspect_page import split_by_strategy
from logitcache.page import number, percent, size, visible
from logitcache.pieces import Pieces
from logitcache.plots import BOTTOM, HEIGHT, TOP, Series, area_chart, line_chart, thin, ticks
from logitcache.tokenise import load_tokenizer, tokenizer_content
from logitcache_kernels import STRATEGY_NAMES, DistillSpec
from logitcache_kernels.distill_reference import gate_reference

CONFIDENCES = ("top1", "entropy")


def inspect_page(store: Path, page: Path, *options: object) -> dict:
    result = run_cli(logitcache.cli.cli, "inspect", store, "--html", page, "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def decided(store: Path, spec: DistillSpec) -> np.ndarray:
    """Strategies of a whole store, straight from the eager gate: positions of each."""
    reader = open_store(store)
    batch = reader[:]
    labels = torch.from_numpy(batch.labels).flatten()
    gold = torch.from_numpy(batch.gold).flatten() & (labels != -100)
    teachers = [teacher.sparse_teacher(1.0) for teacher in batch.teachers]
    gate = gate_reference(teachers, labels, spec, reader.manifest["vocab_size"], gold)
    return np.bincount(gate.strategy_R[labels != -100].numpy(), minlength=4)


# ---- figures ----


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_shares_at_any_edge_are_those_of_the_gate(built, confidence, monkeypatch):
    monkeypatch.setattr(inspection, "_GATE_ENTRIES", 1)  # many calls of the gate, not one
    monkeypatch.setattr(inspection, "BATCH_TOKENS", 100)
    found = measure(open_store(built.path), DistillSpec(confidence=confidence, js_threshold=0.123))
    for js, sure in ((0.123, 0.8), (0.0, 0.3), (0.4, 0.12), (0.7, 0.0), (1.0, 1.0)):
        spec = DistillSpec(js_threshold=js, confidence_threshold=sure, confidence=confidence)
        counts = decided(built.path, spec)
        cells = split_by_strategy(replace(found, spec=spec))
        assert cells.sum((1, 2)).tolist() == counts.tolist(), (js, sure)
        if js == 0.123:
            assert found.strategies.tolist() == counts.tolist()
            assert found.positions == counts.sum()


def test_values_on_a_threshold_are_not_below_it_and_not_above(built):
    reader = open_store(built.path)
    gate = inspection.gate_positions(reader[:], DistillSpec(), reader.manifest["vocab_size"])
    apart = np.argsort(gate.js_P)[len(gate.js_P) // 2]
    spec = DistillSpec(
        js_threshold=float(gate.js_P[apart]),
        confidence_threshold=float(gate.confidence_GP[0, apart]),
    )
    counts = decided(built.path, spec)
    assert (
        split_by_strategy(measure(open_store(built.path), spec)).sum((1, 2)).tolist()
        == counts.tolist()
    )


def test_means_and_agreement_are_those_of_the_distributions(built):
    document = json.loads(run_cli(logitcache.cli.cli, "inspect", built.path, "--json").stdout)
    reader = open_store(built.path)
    batch = reader[:]
    where = batch.labels.ravel() != -100
    tops = [teacher.ids_PK[where, teacher.logp_PK[where].argmax(1)] for teacher in batch.teachers]
    assert document["same_top1"] == pytest.approx((tops[0] == tops[1]).mean())
    for teacher, name in zip(batch.teachers, ("teacher1", "teacher2"), strict=True):
        likeliest = np.exp(teacher.logp_PK[where].max(1))
        assert document["mean_confidence"][name] == pytest.approx(likeliest.mean(), rel=1e-5)
    assert sum(document["js_histogram"]["counts"]) == document["positions"] == where.sum()
    assert sum(document["confidence_histogram"]["counts"]) == where.sum()
    assert document["gold_positions"] == (batch.gold.ravel() & where).sum()
    assert document["shares"] == {
        name: count / where.sum()
        for name, count in zip(STRATEGY_NAMES, decided(built.path, DistillSpec()), strict=True)
    }
    info = json.loads(run_cli(logitcache.cli.cli, "info", built.path, "--json").stdout)
    for mine, wanted in zip(document["teachers"], info["teachers"], strict=True):
        assert {**wanted, **mine} == wanted


def test_a_large_store_is_sampled_by_seed_and_says_so(built, tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "MOST_POSITIONS", 48 * 5)
    document = inspect_page(built.path, tmp_path / "a.html", "--seed", 3)
    assert document["rows_measured"] == 5 < document["rows"]
    assert f"5 of {document['rows']} rows, drawn with seed 3" in (tmp_path / "a.html").read_text()
    same = measure(open_store(built.path), DistillSpec(), seed=3)
    other = measure(open_store(built.path), DistillSpec(), seed=4)
    assert document["positions"] == same.positions
    assert same.rows.tolist() != other.rows.tolist()
    assert len(measure(open_store(built.path), DistillSpec(), sample=2).rows) == 2


def test_rows_and_files_that_cannot_be_shown_are_refused(built, tmp_path):
    assert parse_rows("3, 0-2,2", 5) == [3, 0, 1, 2]
    for text in ("5", "x", "2-1", "-1", "", "0-99999999999"):
        with pytest.raises(UsageError, match="--rows"):
            parse_rows(text, 5)
    with pytest.raises(UsageError, match="at most 64"):
        parse_rows("0-99", 1000)
    (tmp_path / "notes.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    result = run_cli(logitcache.cli.cli, "inspect", built.path, "--rows", "0")
    assert (result.exit_code, "--html" in result.output) == (2, True)
    for target in (
        tmp_path / "pipe",
        built.path / "page.html",
        tmp_path / "notes.txt",
        tmp_path,
        "/dev/null",
    ):
        result = run_cli(logitcache.cli.cli, "inspect", built.path, "--html", target)
        assert (result.exit_code, "--html" in result.output) == (2, True), result.output
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (built.path / "page.html").exists()
    inspect_page(built.path, tmp_path / "new" / "a.html")
    inspect_page(built.path, tmp_path / "new" / "a.html", "--rows", "1")  # over an earlier page


def test_pieces_of_a_row_are_its_text(built):
    tokenizer = load_tokenizer(built.settings["teacher1"])
    pieces = Pieces(tokenizer_content(tokenizer))
    text = "the king \u201csaw\u201d \U0001f600 birds\n\tin \u05d0"
    ids = tokenizer(text)["input_ids"]
    assert "".join(pieces.texts(ids)) == text
    assert pieces.text(tokenizer.eos_token_id) == "<|endoftext|>"
    assert "".join(pieces.texts(ids[:10] + [tokenizer.eos_token_id])).endswith("<|endoftext|>")
    cut = tokenizer("\U0001f600")["input_ids"][:2]
    assert pieces.texts(cut) == ["", "\\xf0\\x9f"]
    assert pieces.text(99999) == "<id 99999>"
    marked = {"\u2581the": 0, "<0xE2>": 1, "<0x80>": 2, "<0x9C>": 3, "<0xZZ>": 4}
    other = Pieces({"backend": {"model": {"vocab": marked}, "decoder": {"type": "Metaspace"}}})
    assert other.texts([0, 1, 2, 3, 4]) == [" the", "", "", "\u201c", "<0xZZ>"]


def test_characters_that_act_are_named_and_numbers_read_well():
    assert visible("a\x1b[0m\x00\u2028\u202eb\ud800\n\t") == (
        "a\u241b[0m\u2400<U+2028><U+202E>b<U+D800>\n\t"
    )
    assert visible("\u05d0 \U0001f468\u200d\U0001f469 e\u0301") == (
        "\u05d0 \U0001f468\u200d\U0001f469 e\u0301"
    )
    numbers = {
        None: "\u2013",
        0: "0",
        1234567: "1,234,567",
        1e-300: "1.00e-300",
        0.0012345: "0.00123",
        0.00012: "1.20e-4",
        0.5: "0.500",
        12.345: "12.3",
        -3.14159: "-3.14",
        1e6: "1,000,000",
        float("inf"): "not finite",
    }
    assert {value: number(value) for value in numbers} == numbers
    assert percent(0.1234) == "12.3\u2009%"
    assert [size(900), size(12_345_678)] == ["900\u2009bytes", "12.3\u2009MB"]


def test_plots_bear_any_numbers():
    assert ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(5.0, 5.0) == [5.0]
    x, y, group = thin(range(1000), [1.0] * 999 + [float("nan")])
    assert (len(x), group, set(y)) == (333, 3, {1.0})
    for values in ([1.0], [0.0, 0.0], [1e-9, 2e-9], [-1e9, 1e9], [float("inf"), 1.0, 2.0]):
        drawn = line_chart([Series("a", range(len(values)), values, "c1")], "step", "y")
        assert "nan" not in drawn
        assert "inf" not in drawn
    assert line_chart([Series("a", [], [], "c1")], "step", "y") == ""
    assert line_chart([Series("a", [1.0], [float("nan")], "c1")], "step", "y") == ""
    assert "<script" not in line_chart([Series("<script>", [1, 2], [1, 2], "c1")], "x", "y")
    assert "polygon" in area_chart([Series("a", [1.0], [0.5], "s0")], "step", "share")


# ---- inspect in the browser ----


def test_sliders_move_shares_bars_and_colours_as_python_counts_them(built, tmp_path, browser):
    file = tmp_path / "page.html"
    inspect_page(built.path, file, "--rows", "0-3", "--js-threshold", 1 / 3)
    page = browser.open(file)
    check_quiet(page, file)
    before = decided(built.path, DistillSpec(js_threshold=1 / 3))
    assert page.run("document.getElementById('js-value').textContent") == "0.3333333"

    def shown() -> list[str]:
        return [
            page.run(f"document.getElementById('share-{n}').textContent") for n in STRATEGY_NAMES
        ]

    def slide(name: str, value: float) -> None:
        page.run(
            f"(() => {{ const data = JSON.parse(document.getElementById('data').textContent);"
            f" const input = document.getElementById('{name}');"
            f" input.value = data['{name}_edges'].indexOf({value});"
            " input.dispatchEvent(new Event('input')); })()"
        )

    assert shown() == [percent(n / before.sum()) for n in before]
    seen = set()
    for js, sure in ((0.3, 0.8), (0.05, 0.8), (0.05, 0.2), (0.6, 0.2), (1.0, 0.2)):
        slide("js", js)
        slide("confidence", sure)
        spec = DistillSpec(js_threshold=js, confidence_threshold=sure)
        counts = decided(built.path, spec)
        assert shown() == [percent(n / counts.sum()) for n in counts], (js, sure)
        assert page.run("document.getElementById('js-value').textContent") == str(js).replace(
            "1.0", "1"
        )
        seen.add(tuple(shown()))
        # Bars of both histograms add up to the shares.
        for plot in ("js-plot", "confidence-plot"):
            heights = page.run(
                f"[...document.querySelectorAll('#{plot} g[data-stack]')].map((g) =>"
                " [...g.children].reduce((sum, r) => sum + Number(r.getAttribute('height')), 0))"
            )
            most = float(page.run(f"document.getElementById('{plot}').dataset.most"))
            inside = HEIGHT - BOTTOM - TOP
            assert np.allclose(np.array(heights) * most / inside, counts / counts.sum(), atol=1e-3)
        # Tokens of the rows that are shown.
        batch = open_store(built.path)[[0, 1, 2, 3]]
        labels = torch.from_numpy(batch.labels).flatten()
        gold = torch.from_numpy(batch.gold).flatten()
        teachers = [teacher.sparse_teacher(1.0) for teacher in batch.teachers]
        strategy = gate_reference(teachers, labels, spec, 300, gold).strategy_R
        wanted = np.bincount(strategy[labels != -100].numpy(), minlength=4).tolist()
        count = "document.querySelectorAll('.row .t.s{}').length"
        assert [page.run(count.format(s)) for s in range(4)] == wanted
    assert len(seen) >= 4
    check_quiet(page, file)
    page.close()


def test_tooltip_says_what_both_teachers_expect(built, tmp_path, browser):
    file = tmp_path / "page.html"
    inspect_page(built.path, file, "--rows", "0")
    page = browser.open(file)
    row = open_store(built.path)[0]
    pieces = Pieces(open_store(built.path).tokenizer_content)
    page.run("document.querySelector('.row').focus()")
    for _ in range(3):
        page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", code="ArrowRight")
    text = page.run("document.getElementById('tip').innerText")
    assert not page.run("document.getElementById('tip').hidden")
    at = np.flatnonzero(row.labels[0] != -100)[2]
    # It stands at the token that comes, not at the one before it.
    chosen = "[...document.querySelectorAll('.row .t')].findIndex((t) => t.matches('.at'))"
    assert page.run(chosen) == at + 1
    for number_, teacher in enumerate(row.teachers, start=1):
        first = teacher.logp_PK[at].argmax()
        token = pieces.text(int(teacher.ids_PK[at, first])).strip()
        p = float(np.exp(teacher.logp_PK[at, first]))
        assert f"teacher {number_}" in text
        assert token in text
        assert f"confidence {p:.2f}" in text
    box = page.run(
        "(() => { const b = document.querySelectorAll('.row .t')[9].getBoundingClientRect();"
        " return [b.left + b.width / 2, b.top + b.height / 2]; })()"
    )
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert page.run("document.querySelector('.t.at') === document.querySelectorAll('.row .t')[9]")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert page.run("document.getElementById('tip').hidden")
    check_quiet(page, file)
    page.close()


def test_hostile_documents_stay_text_in_the_page_of_a_store(hostile, tmp_path, browser):
    file = tmp_path / "page.html"
    rows = len(open_store(hostile.store))
    inspect_page(hostile.store, file, "--rows", f"0-{rows - 1}")
    assert "\u202e" not in file.read_text(encoding="utf-8")
    page = browser.open(file)
    check_harmless(page, file, scripts=2)
    shown = "".join(page.run("[...document.querySelectorAll('.row .t')].map((t) => t.textContent)"))
    for text in HOSTILE:
        assert visible(text) in shown
    assert hostile.store.name in page.run("document.querySelector('h1 + p').textContent")
    # What a script puts into the tooltip is text, too.
    page.run("document.querySelector('.row').focus()")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", code="ArrowRight")
    assert page.run("document.querySelectorAll('#tip script, #tip img').length") == 0
    check_harmless(page, file, scripts=2)
    page.close()


def test_the_policy_forbids_scripts_and_loads_that_are_not_the_page_s_own(built, tmp_path, browser):
    file = tmp_path / "page.html"
    inspect_page(built.path, file)
    text = file.read_text(encoding="utf-8")
    bad = "<script>window.hacked = 1</script><img src='http://127.0.0.1:9/x.png'>"
    file.write_text(text.replace("</main>", bad + "</main>"), encoding="utf-8")
    page = browser.open(file)
    assert page.run("window.hacked === undefined")
    assert sum("Content Security Policy" in problem for problem in page.problems()) == 2
    page.close()


def test_a_store_of_one_teacher_says_so(tmp_path, teacher1, corpus, browser):
    build(teacher1=teacher1, data=(corpus,), seq_len=48, out=tmp_path / "store", estimator="topk")
    file = tmp_path / "page.html"
    document = inspect_page(tmp_path / "store", file)
    assert document["mean_js"] is None
    assert document["shares"]["T1_ONLY"] == 1.0
    page = browser.open(file)
    check_quiet(page, file)
    said = page.run("document.body.innerText")
    assert "This store has one teacher." in said
    assert "largest disagreements" not in said
    page.run("document.querySelector('.row').focus()")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", code="ArrowRight")
    assert "teacher 1" in page.run("document.getElementById('tip').innerText")
    check_quiet(page, file)
    page.close()
