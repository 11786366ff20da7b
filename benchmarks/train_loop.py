"""DistillTrainer beside a loop of the same operations, and on several GPUs beside one: what
benchmarks.train_step measures of training as a whole."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from distill.ema import WeightAverage
from distill.train import TrainRequest, make_trainer
from logitcache.several import leave_group

from .common import wait

ONE_BUCKET = 1 << 14  # megabytes: more than a student here has of gradients


def one_process(options: argparse.Namespace, student: str) -> dict[str, Any]:
    """What DistillTrainer does alone, on the first GPU, while the other processes wait."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        and not name.startswith(("MASTER_", "TORCHELASTIC_"))
    }
    # transformers would take all it sees.
    visible = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment["CUDA_VISIBLE_DEVICES"] = visible
    path = options.work / "one-process.json"
    options.work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.train_step", "--trainer", "--students", student]
    command += ["--work", str(options.work), "--json", str(path)]
    for name in ("smollm", "rows", "seq_len", "blocks", "steps"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    command += [f"--{name}" for name in ("compile", "smoke") if getattr(options, name)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["students"][student]
    return found


class Loops:
    """Training of a student, a model's folder, on a store: rows of it in a batch."""

    def __init__(
        self,
        options: argparse.Namespace,
        rows: int,
        student: Path,
        store: Path,
        device: torch.device,
    ):
        self.options, self.rows, self.student = options, rows, student
        self.store, self.device = store, device

    def in_turn(self) -> dict[str, Any]:
        """Seconds of a step of DistillTrainer and of a loop of the same operations, in turn."""
        steps = self.options.steps * 6
        found: dict[str, list[float]] = {"trainer": [], "bare": []}
        waited = 0.0
        self._trainer(2)  # memory and files for the first time
        for _ in range(min(self.options.blocks, 3)):
            seconds, waited, _ = self._trainer(steps)
            found["trainer"].append(seconds)
            found["bare"].append(self._bare(steps))
        seconds, bare = (statistics.median(found[name]) for name in ("trainer", "bare"))
        document = self._rate(seconds, 1) | {
            "seconds": found,
            "ratios": {
                "share of the step waiting for data": waited,
                "DistillTrainer over a bare loop": seconds / bare,
            },
        }
        if not self.options.compile:
            exact, _, _ = self._trainer(steps, full_determinism=True)
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.deterministic = False
            document["deterministic_over_default"] = exact / seconds
        return document

    def on_all_processes(self) -> dict[str, Any]:
        """Tokens per second of DistillTrainer under torchrun, with buckets of gradients as DDP has
        them and with a single one, in turn."""
        steps = self.options.steps * 6
        buckets = {"buckets as they are": {}, "one bucket": {"ddp_bucket_cap_mb": ONE_BUCKET}}
        found: dict[str, list[float]] = {name: [] for name in buckets}
        waited, processes = 0.0, 1
        self._trainer(2)
        for _ in range(min(self.options.blocks, 3)):
            for name, more in buckets.items():
                seconds, waited, processes = self._trainer(steps, **more)
                found[name].append(seconds)
        leave_group()
        rates = {n: self._rate(statistics.median(found[n]), processes) for n in buckets}
        waiting = {"share of the step waiting for data": waited}
        return {**rates, "seconds": found, "ratios": waiting}

    def _rate(self, seconds: float, processes: int) -> dict[str, Any]:
        tokens = self.rows * self.options.seq_len * processes
        return {
            "tokens_in_a_step": tokens,
            "processes": processes,
            "tokens_per_second": tokens / seconds,
        }

    def _make_trainer(self, steps: int, **more: Any) -> Any:
        settings = {
            "per_device_train_batch_size": self.rows,
            "max_steps": steps,
            "num_train_epochs": 1000,
            "save_strategy": "no",
            "logging_steps": steps * 2,
            "learning_rate": 1e-6,
            "use_cpu": self.device.type != "cuda",
            "torch_compile": self.options.compile,
            **more,
        }
        request = TrainRequest(self.store, self.student, self.store.parent / "run", None, settings)
        return make_trainer(request, request.config())

    def _trainer(self, steps: int, **more: Any) -> tuple[float, float, int]:
        trainer = self._make_trainer(steps, **more)
        marks = []

        class Clock(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step in (steps // 2, steps):
                    wait()
                    marks.append((time.perf_counter(), trainer._feed.seconds_waited))

        trainer.add_callback(Clock())
        trainer.train()
        seconds = marks[1][0] - marks[0][0]
        count = steps - steps // 2
        return seconds / count, (marks[1][1] - marks[0][1]) / seconds, trainer.args.world_size

    def _bare(self, steps: int) -> float:
        """The operations of a step of DistillTrainer, without it."""
        trainer = self._make_trainer(steps)
        model, feed = trainer._core.train(), trainer._feed
        optimizer = trainer.create_optimizer()
        average = WeightAverage(model, 0.999)
        batches = feed.inputs(rows for _ in range(1000) for rows in trainer.row_order())
        started = 0.0
        for step in range(steps):
            inputs = next(batches)
            inputs.pop("rows")
            count = torch.full((), float(inputs.pop("num_valid")), device=self.device)
            with trainer.accelerator.autocast():
                output = model(**inputs, num_items=count)
            trainer._sums += output["sums"]
            output["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.update()
            if step + 1 in (steps // 2, steps):
                wait()
                started, before = time.perf_counter(), started
        batches.close()
        return (started - before) / (steps - steps // 2)
