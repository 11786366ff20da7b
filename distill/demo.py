"""``distill demo``: the main job on the bundled text and generations, with the commands a user
would type."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from logitcache import open_store
from logitcache.causal_lm import load_causal_lm
from logitcache.command import Options
from logitcache.errors import LogitCacheError
from logitcache_kernels import STRATEGY_NAMES

from .bundled import BUNDLED
from .evaluate import evaluate_on_store
from .run_folder import RUN_FILE

TEACHER1, TEACHER2 = BUNDLED / "teacher1", BUNDLED / "teacher2"
SEQ_LEN = 256
# Weight on labels is low: a model of two million parameters learns them faster than anything else,
# and away from its teachers (gold_weight 0.5, alpha 0.1: KL falls by 47 %, so: by 63 %; 2026-11).
TRAIN_SETTINGS: dict[str, Any] = {
    "max_steps": 60,
    "learning_rate": 2e-4,
    "warmup_steps": 10,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 16,
    "temperature": 1.0,
    "alpha": 0.05,
    "gold_weight": 0.1,
    "ema_decay": 0.95,
    "save_strategy": "no",
    "use_cpu": True,
    "seed": 0,
}


class DemoError(LogitCacheError):
    """A step of the demo failed; its own message stands above."""


def default_folder() -> Path:
    """``demo`` here, or among temporary files where nothing may be written here."""
    if os.access(Path.cwd(), os.W_OK):
        return Path("demo")
    return Path(tempfile.gettempdir()) / "logitcache-demo"


def demo_commands(out: Path) -> list[list[str]]:
    """The three commands of the demo, as arguments of ``python -m``."""
    teachers = ["--teacher1", str(TEACHER1), "--teacher2", str(TEACHER2)]
    shape = ["--seq-len", str(SEQ_LEN), "--set", "device=cpu"]
    build = ["logitcache", "build", *teachers]
    held_out = ["--estimator", "topk", "--top-k", "256", "--min-prob", "0", "--precision", "high"]
    settings = [f"{key}={value}" for key, value in TRAIN_SETTINGS.items()]
    return [
        [
            *build,
            "--data",
            str(BUNDLED / "text" / "corpus.jsonl"),
            "--out",
            str(out / "store"),
            *shape,
        ],
        [
            *build,
            *("--data", str(BUNDLED / "text" / "heldout.jsonl")),
            *("--out", str(out / "heldout-store"), *shape, *held_out),
        ],
        [
            *("distill", "train", "--store", str(out / "store"), "--student", str(TEACHER1)),
            *("--eval-store", str(out / "heldout-store"), "--out", str(out / "student")),
            *(part for setting in settings for part in ("--set", setting)),
        ],
    ]


def run_demo(out: Path, options: Options) -> tuple[dict[str, Any], str]:
    """Run the commands (those already done are left as they are) and compare all models on held-out
    text."""
    # A thread that waits for work spins for microseconds, not milliseconds: on two cores that
    # something else uses too, the default makes each of many small operations wait (a hundred times
    # slower; 2026-11).
    environment = {**os.environ, "GOMP_SPINCOUNT": "20000"}
    for command in demo_commands(out):
        options.note(f"\n$ {shlex.join(command)}")
        run = [sys.executable, "-m", *command, *(["--quiet"] if options.quiet else [])]
        finished = subprocess.run(run, env=environment, stdout=subprocess.DEVNULL, check=False)
        if finished.returncode:
            error = DemoError(f"the demo's command failed: {shlex.join(command)}")
            error.exit_code = finished.returncode
            raise error
    options.note("\ncomparing teachers and student on held-out text ...")
    return _compare(out)


def _compare(out: Path) -> tuple[dict[str, Any], str]:
    record = json.loads((out / "student" / RUN_FILE).read_text(encoding="utf-8"))
    reader = open_store(out / "heldout-store")
    from .config import DistillConfig

    spec = DistillConfig(output_dir=str(out), **TRAIN_SETTINGS).spec()
    results = {}
    for name, folder in (("teacher 1", TEACHER1), ("teacher 2", TEACHER2)):
        model = load_causal_lm(folder, torch.float32, torch.device("cpu"))
        results[name] = evaluate_on_store(model, reader, spec)
    for name, part in (("student before", "before"), ("student after", "after")):
        results[name] = {
            key.removeprefix(f"{part}_"): value
            for key, value in record[part].items()
            if key.startswith(f"{part}_")
        }
    shares = {name: results["teacher 1"][f"share_{name.lower()}"] for name in STRATEGY_NAMES}
    document = {
        "models": {
            name: {key: metrics[key] for key in ("loss", "kl")} for name, metrics in results.items()
        },
        "shares": shares,
        "store": str(out / "store"),
        "student": str(out / "student"),
        "log": str(out / "student" / "log.jsonl"),
    }
    return document, _table(document, out)


def _table(document: dict[str, Any], out: Path) -> str:
    notes = {
        "teacher 1": "the generation in force",
        "teacher 2": "the one before it",
        "student before": "starts as teacher 1",
        "student after": "learned from both",
    }
    lines = ["", f"{'held-out text':16}{'loss':>8}{'KL to the blend':>18}"]
    for name, metrics in document["models"].items():
        lines.append(f"{name:16}{metrics['loss']:8.3f}{metrics['kl']:18.4f}   {notes[name]}")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in document["shares"].items())
    lines += [
        "",
        "loss: nats per token, lower is better. KL to the blend: from the gated "
        "target of both teachers,",
        "nats per token where it exists. What the gate decided, per token of the held-out text:",
        f"  {shares}",
        "",
        f"store    {document['store']}",
        f"student  {document['student']}   (a transformers folder)",
        f"log      {document['log']}",
        "",
        "next, with your own models (GEN9 learned before GEN10, same tokenizer) and text:",
        "  logitcache build --teacher1 GEN10 --teacher2 GEN9 --data corpus.jsonl --out store",
        "  logitcache info store",
        "  distill train --store store --student GEN10 --out GEN11 --set learning_rate=5e-5",
    ]
    return "\n".join(lines)
