"""Two processes of torchrun against one, on CPUs and on GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import case_request

from distill.ema import trained_weights
from distill.train import make_trainer

WORKER = Path(__file__).with_name("ddp_worker.py")


def torchrun(*words: object, on_gpu: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    chosen = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, words)],
        env={**os.environ, **chosen},
        capture_output=True,
        text=True,
        timeout=300,
    )


def train_all_cases(inputs: Path, *, on_gpu: bool = False) -> Path:
    """All cases, trained by two processes in one launch."""
    run = torchrun(WORKER, inputs, inputs / "double", on_gpu=on_gpu)
    assert run.returncode == 0, run.stderr[-5000:]
    return inputs / "double"


def assert_ends_where_one_does(
    inputs: Path,
    double: Path,
    out: Path,
    name: str,
    *,
    on_gpu: bool = False,
    relative: float = 1e-4,
    of_moved: float = 1e-3,
) -> None:
    """of_moved: how far weights may be apart, as a share of the farthest that one of them moved."""
    asked = case_request(inputs, out, name, processes=1, on_gpu=on_gpu)
    trainer = make_trainer(asked, asked.config())
    start = {n: p.detach().clone() for n, p in trained_weights(trainer._core).items()}
    trainer.train()
    records, held_out = json.loads((double / name / "log.json").read_text(encoding="utf-8"))
    ours = [entry for entry in trainer.state.log_history if "loss_kd" in entry]
    assert [entry["step"] for entry in records] == [1, 2, 3, 4]
    assert 0.2 < records[0]["share_blended"] < 1  # the gate has something to decide
    for entry, expected in zip(records, ours, strict=True):
        for key in ("loss", "grad_norm", "share_blended", "mean_js", "loss_ce"):
            close = pytest.approx(expected[key], rel=relative, abs=1e-3 * relative)
            assert entry[key] == close, key
    weights = load_file(double / name / "weights.safetensors")
    averages = load_file(double / name / "averages.safetensors")
    after = trained_weights(trainer._core)
    assert trainer.average is not None
    assert weights.keys() == averages.keys() == after.keys()
    for key, weight in after.items():
        apart = of_moved * float((weight.detach() - start[key]).abs().max())
        found = weights[key].to(weight.device)
        torch.testing.assert_close(found, weight.detach(), rtol=0, atol=apart)
        average = trainer.average.weights[key].detach()
        found = averages[key].to(average.device)
        torch.testing.assert_close(found, average, rtol=0, atol=apart)
    for key, value in trainer.evaluate().items():
        assert held_out[key] == pytest.approx(value, rel=relative), key


def assert_resumed_to_the_same_bits(double: Path, name: str) -> None:
    for part in ("weights", "averages"):
        whole, parts = (
            load_file(double / folder / f"{part}.safetensors")
            for folder in (name, f"{name} resumed")
        )
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole), part
