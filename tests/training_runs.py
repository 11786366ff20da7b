"""What several tests of training share: a small store and student, a run of it, and whether two
runs ended in the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, sentences, write_jsonl

from distill.train import TrainRequest
from logitcache import build, open_store

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


# Trainings on two processes, by what differs from one: each must end as one process does, which
# takes four rows a step of five: the second step of an epoch has one row, for one process.
CASES: dict[str, dict[str, object]] = {
    "ddp": {"per_device_train_batch_size": 2},
    "ddp accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "ddp lora": {"per_device_train_batch_size": 2, "lora_rank": 2},
    "fsdp": {"per_device_train_batch_size": 2, "fsdp": True},
    "fsdp accumulated": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "fsdp": True,
    },
    "fsdp lora": {"per_device_train_batch_size": 2, "lora_rank": 2, "fsdp": True},
}
RESUMED = ("ddp", "fsdp", "fsdp lora")


def case_request(
    inputs: Path, out: Path, name: str, processes: int, on_gpu: bool = False
) -> TrainRequest:
    """A training of a case, or what one process makes of it."""
    settings: dict[str, object] = {
        "optim": "sgd",
        "optim_args": "momentum=0.5",
        "learning_rate": 0.5,
        "max_grad_norm": 0.05,
        "max_steps": 4,
        "save_steps": 2,
        "eval_rows": len(open_store(inputs / "store")) - 5,
        "per_device_eval_batch_size": 2,
        "lora_rank": CASES[name].get("lora_rank", 0),
    }
    if on_gpu:
        settings |= {"use_cpu": False, "bf16": False, "full_determinism": True, "logging_steps": 1}
    if processes > 1:
        settings |= {**CASES[name], "ddp_backend": "nccl" if on_gpu else "gloo"}
    else:
        settings["per_device_train_batch_size"] = 4
    asked = request(inputs, out, **settings)
    return replace(asked, student=inputs / "even")


def make_inputs(folder: Path) -> Path:
    """A store of two tiny teachers that mostly agree, and a student with dropout, which draws at
    every step."""
    make_model(folder / "one", seed=1)
    weights = make_model(folder / "two", seed=1) / "model.safetensors"
    torch.manual_seed(5)
    noisy = {name: w + 0.03 * torch.randn_like(w) for name, w in load_file(weights).items()}
    save_file(noisy, weights, metadata={"format": "pt"})
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    make_model(folder / "student", seed=4, attention_dropout=0.2, **small)
    make_model(folder / "even", seed=4, tie_word_embeddings=False, **small)
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


def train_words(inputs: Path, out: Path, **settings: object) -> list[str]:
    """The same training as ``request``'s, as words of the command."""
    words = ["train", "--store", str(inputs / "store"), "--student", str(inputs / "student")]
    words += ["--out", str(out)]
    for key, value in {**SETTINGS, **settings}.items():
        words += ["--set", f"{key}={value}"]
    return words


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
