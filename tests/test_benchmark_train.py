"""benchmarks.train_step, as far as it works without a GPU: its tiny shapes, and the loss of the run
without a store that it compares with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from several_checks import torchrun

from benchmarks import attention
from benchmarks.train_models import online_loss
from benchmarks.train_step import main
from benchmarks.train_table import TARGETS, ratios, table
from logitcache.packed_attention import segment_bounds
from logitcache_kernels import DistillSpec, SparseTeacher, distill_loss


def test_without_a_gpu_it_says_so_and_exits_6(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 6
    captured = capsys.readouterr()
    assert "no CUDA GPU" in captured.err
    assert captured.out == ""


def test_tiny_shapes_give_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    assert main(["--smoke", "--work", str(tmp_path / "work"), "--json", str(path)]) == 0
    document = json.loads(path.read_text(encoding="utf-8"))
    figures = document["students"]["smoke"]
    assert set(figures["ratios"]) == set(TARGETS)
    assert {"ours", "ce torch compile", "online, same size", "ours, recomputed"} <= set(
        figures["timings"]
    )
    assert figures["ratios"]["DistillTrainer over a bare loop"] > 0
    assert capsys.readouterr().out.strip() == table(document)
    assert "| online, teachers of its size, over ours | >= 1.5 | >= 2 |" in table(document)


def test_the_trainer_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    command = ["--smoke", "--trainer", "--work", str(tmp_path / "work"), "--json", str(path)]
    assert main(command) == 0
    figures = json.loads(path.read_text(encoding="utf-8"))["students"]["smoke"]
    assert figures["trainer"]["tokens_per_second"] > 0
    assert figures["trainer"]["tokens_in_a_step"] == 2 * 32
    assert "| step over CE by Liger | <= 0.85 | <= 0.72 | not measured |" in capsys.readouterr().out


def test_several_processes_over_one(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    words = ("-m", "benchmarks.train_step", "--smoke", "--work", tmp_path / "work", "--json", path)
    run = torchrun(*words)
    assert run.returncode == 0, run.stderr
    figures = json.loads(path.read_text(encoding="utf-8"))["students"]["smoke"]
    alone = figures["one process"]["trainer"]["tokens_per_second"]
    for buckets in ("buckets as they are", "one bucket"):
        assert figures[buckets]["tokens_in_a_step"] == 2 * 2 * 32
        over = figures[buckets]["tokens_per_second"] / alone
        assert f"2 processes, {buckets}: {over:.3f} (must 1.9, aim 1.95)" in run.stdout


def test_attention_is_measured_on_packed_rows(capsys: pytest.CaptureFixture[str]) -> None:
    positions = attention.packed_positions(3, 500, mean=40)
    documents = len(segment_bounds(positions)) - 1
    assert 25 < positions.size / documents < 55
    assert attention.main(["--smoke"]) == 0
    assert "| smoke | " in capsys.readouterr().out


def test_ratios_are_taken_of_the_fastest_and_of_what_was_timed_beside() -> None:
    def timing(median: float, peak: float = 0.0) -> dict[str, float]:
        return {"median": median, "p20": median, "p80": median, "peak": peak}

    found = ratios(
        {
            "ours": timing(8, 50),
            "ce liger": timing(10, 40),
            "ce apple cce": timing(5, 30),
            "online, same size": timing(18, 100),
            "ours, same size": timing(9),
        }
    )
    assert found["step over CE by Liger"] == 0.8
    assert found["step over the fastest CE"] == 1.6
    assert found["online, teachers of its size, over ours"] == 2.0
    assert found["online, teachers three times its size, over ours"] is None
    assert found["peak memory over CE by Liger"] == 1.25
    assert found["peak memory over online"] == 0.5


def test_the_loss_without_a_store_is_ours_on_whole_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    spec = DistillSpec(temperature=2.0, js_threshold=0.2, confidence_threshold=0.3)
    rows, vocab = 40, 30
    first = 2 * torch.randn(rows, vocab, generator=generator)
    second = first + torch.linspace(0, 3, rows)[:, None] * torch.randn(
        rows, vocab, generator=generator
    )
    logits = torch.randn(rows, vocab, generator=generator)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[::7] = -100
    ids = torch.arange(vocab, dtype=torch.int32).expand(rows, vocab)
    teachers = [
        SparseTeacher(ids, part.log_softmax(-1), (part.log_softmax(-1) / 2.0).logsumexp(-1))
        for part in (first, second)
    ]
    ours = distill_loss(logits, teachers, labels, spec)
    assert len(set(ours.strategy_R[labels != -100].tolist())) == 3
    theirs = online_loss(logits, first, second, labels, spec)
    assert float(theirs) == pytest.approx(float(ours.loss), rel=1e-5)
