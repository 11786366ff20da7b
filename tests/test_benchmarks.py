"""The benchmark frame, as far as it works without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def test_without_a_gpu_it_says_so_and_exits_6():
    done = run("--suite", "capture")
    assert done.returncode == 6
    assert "no CUDA GPU" in done.stderr
    assert done.stdout == ""


@pytest.fixture
def result(tmp_path):
    record = {
        "suite": "capture",
        "name": "capture",
        "shape": {"R": 8192, "V": 151936, "K": 64},
        "options": {"mode": "topk", "text": "web"},
        "timing": {"median": 1.0, "p20": 0.9, "p80": 1.25},
        "floor": "read once",
        "floor_ms": 0.5,
        "over_floor": 2.0,
        "peak_bytes": 2**20,
        "error": {"entropy": 1e-6},
        "peers": {"torch.topk 64": {"median": 9.0, "p20": 9.0, "p80": 9.0, "over_ours": 9.0}},
    }
    machine = {"gpu": "G", "date": "2026-11-22", "commit": "abc", "versions": {"torch": "2"}}
    path = tmp_path / "result.json"
    document = {"machine": machine, "copy_bandwidth": 4e12, "quick": True, "records": [record]}
    path.write_text(json.dumps(document))
    return path


def test_the_table_is_made_from_the_json(result):
    done = run("--table", str(result))
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1]
    for cell in (
        "R=8192 V=151936 K=64",
        "1.000 (0.900 to 1.250)",
        "| 2.00 |",
        "torch.topk 64 9.00",
    ):
        assert cell in row


def test_the_plot_is_made_from_the_json(result):
    pytest.importorskip("matplotlib")
    picture = result.with_suffix(".png")
    assert run("--table", str(result), "--plot", str(picture)).returncode == 0
    assert picture.stat().st_size > 1000


def test_a_record_gives_the_ratios_that_readers_look_for():
    from benchmarks.common import Record, Timing, largest_error

    record = Record(
        suite="loss",
        name="x",
        shape={"V": 8},
        options={},
        timing=Timing(2.0, 1.0, 3.0),
        floor="read once",
        floor_ms=0.5,
        peers={"other": Timing(3.0, 3.0, 3.0)},
    ).as_json()
    assert record["over_floor"] == 4.0
    assert record["peers"]["other"]["over_ours"] == 1.5
    assert json.loads(json.dumps(record)) == record
    assert largest_error(torch.tensor([torch.nan]), torch.zeros(1)) == float("inf")


def test_teacher_logits_have_the_shape_of_real_ones():
    """Entropy of about 2.4 nats on web text, 1.0 on chat."""
    from benchmarks.inputs import teacher_logits

    entropy = {}
    for text in ("web", "chat"):
        logp_RV = teacher_logits(64, 20000, text, torch.float32, device="cpu").log_softmax(-1)
        entropy[text] = -(logp_RV.exp() * logp_RV).sum(-1).mean().item()
    assert 1.5 < entropy["web"] < 3.5
    assert 0.5 < entropy["chat"] < 1.6


def test_the_table_of_the_store_is_made_from_its_figures():
    from benchmarks.store import BYTES, PROFILES, table

    profile = {
        "bytes_per_token": 40.0,
        "mean_support": 20.0,
        "fields_bytes": 6.0,
        "kl_quantised": 1e-3,
        "effective_draws": 51.0,
    }
    profiles = {name: {**profile, "kl_full": 0.2} for name in PROFILES}
    profiles["topk 256 / 0.001"] = {**profile, "kl_full": 0.1, "bytes_per_token": 80.0}
    profiles["topk 256 / 5e-4"] = {**profile, "kl_full": 0.05, "bytes_per_token": 160.0}
    speed = ("decode", "unpack_and_decode", "encode", "epoch")
    document = {
        "machine": {"date": "2026-11-22", "commit": "abc"},
        "teacher": "t",
        "vocab_size": 49152,
        "tokens": 1000,
        "profiles": profiles,
        "peers": {
            "distillkit_128": {"bytes": 312.0, "kl": 0.1},
            "bf16_top_64": {"bytes": 256.0, "kl": 0.2},
            "rskd_50": {"bytes": 47.5, "draws": 50},
        },
        "bias": {"T = 1": -1.5, "T = 2": 0.5},
        "speed": {
            **{f"{name}_tokens_per_s": 1e6 for name in speed},
            "read_row_overhead_us": 12.0,
            "integrity_share": 0.01,
        },
        "flips": {"tried": 2000, "missed": 0},
    }
    text = table(document)
    for name in BYTES:
        assert f"| {name}: bytes/token |" in text
    assert "0.256 (80 of 312 B at KL 0.100)" in text
    assert "0.156 (40 of 256 B at KL 0.200)" in text
    assert "34.0 at 51 draws (RS-KD-50: 47.5 at 50)" in text
    assert "| bit flips missed, of 2000 | 0 |  | 0 |" in text


def test_build_over_forward_is_measured(tmp_path):
    common = ["--device", "cpu", "--tokens", "600", "--seq-len", "64", "--rounds", "1"]
    common += ["--teacher", str(ROOT / "distill" / "bundled" / "teacher1")]
    arguments = [*common, "--work", str(tmp_path), "--json", str(tmp_path / "out.json")]
    command = [sys.executable, "-m", "benchmarks.store_build", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["tokens"] >= 600
    assert f"build over forward {document['build_over_forward']:.3f}" in done.stdout
