"""What several tests of training share: a small store and student, a run of it, and whether two
runs ended in the same bits."""

from __future__ import annotations

import json
from pathlib import Path

from tiny import make_model, sentences, write_jsonl

from distill.train import TrainRequest
from logitcache import build

SETTINGS = {
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "temperature": 1.5,
    "js_threshold": 0.4,
    "seed": 3,
    "max_steps": 3,
    "save_steps": 1,
    "max_grad_norm": 0.5,
}


def make_inputs(folder: Path) -> Path:
    """A store of two tiny teachers and a student with dropout, which draws at every step."""
    make_model(folder / "one", seed=1)
    make_model(folder / "two", seed=2)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    make_model(folder / "student", seed=4, attention_dropout=0.2, **small)
    data = write_jsonl(folder / "data.jsonl", [{"text": s} for s in sentences(10, 7, words=16)])
    build(
        teacher1=folder / "one",
        teacher2=folder / "two",
        data=[data],
        seq_len=48,
        out=folder / "store",
        device="cpu",
    )
    return folder


def request(inputs: Path, out: Path, **settings: object) -> TrainRequest:
    return TrainRequest(inputs / "store", inputs / "student", out, None, {**SETTINGS, **settings})


def losses(out: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each record of a run's log."""
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if "loss_kd" in r]


def same_run(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs: losses; weights, averages, optimizer, scheduler and
    random generators at the last step; the students."""
    names = ["model.safetensors", "raw/model.safetensors"]
    last = max((one / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name[11:])).name
    parts = ("model.safetensors", "ema.safetensors", "training.safetensors", "training.json")
    names += [f"checkpoints/{last}/{part}" for part in parts]
    different = [] if losses(one) == losses(other) else ["losses"]
    for name in names:
        path = other / name
        if not path.is_file() or path.read_bytes() != (one / name).read_bytes():
            different.append(name)
    return different
