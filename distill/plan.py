"""``distill train --dry-run``: what a run would do and take, from a step that really is taken."""

from __future__ import annotations

import math
import resource
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from logitcache.environment import gpu_memory_peak_bytes
from logitcache.errors import ResourceError

from .run_folder import CHECKPOINTS, existing_run
from .state import checkpoint_bytes
from .taboo import describe_taboo
from .train import TrainRequest, check_request, make_trainer, run_identity

# A dry run neither writes nor evaluates nor reports.
_NOTHING_ELSE = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": "none",
    "push_to_hub": False,
    "logging_steps": 1,
}


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.started, self.seconds = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:  # by then the device has been waited for
            self.seconds = time.perf_counter() - self.started


def dry_run(request: TrainRequest, fresh: bool) -> dict[str, Any]:
    """Check that all fits and take one step, on a GPU a second one after what is compiled at the
    first; nothing is kept. Returns rows, steps, loss, seconds and bytes.

    Raises what ``train`` would raise; ResourceError if the disk cannot hold the checkpoints.
    """
    real = request.config()
    check_request(request, real)
    if request.out.is_dir() and not fresh:
        existing_run(request.out, run_identity(request, real))
    settings = {**request.settings, **_NOTHING_ELSE, "max_steps": 2 if _on_gpu(real) else 1}
    with tempfile.TemporaryDirectory() as folder:  # the Trainer makes its folder at once
        trial = replace(request, out=Path(folder), settings=settings)
        trainer = make_trainer(trial, trial.config())
        clock = _Clock()
        trainer.add_callback(clock)
        trainer.train()
    # Of the real settings, with the batch that the Trainer settled for.
    accumulated = real.gradient_accumulation_steps
    updates = max(-(-len(trainer.row_order()) // accumulated), 1)
    steps = real.max_steps
    if steps <= 0:
        steps = math.ceil(real.num_train_epochs * updates)
    parameters = list(trainer._core.parameters())
    loss = next(r["loss"] for r in reversed(trainer.state.log_history) if "loss" in r)
    size = checkpoint_bytes(trainer)
    taboo = {}
    if trainer.taboo is not None:
        taboo["taboo"] = describe_taboo(trainer.taboo, trainer.processing_class, trainer.reader)
    return {
        "rows": trainer.num_train_rows,
        "held_out_rows": len(trainer.reader) - trainer.num_train_rows,
        "rows_per_step": trainer._train_batch_size * accumulated * real.world_size,
        "steps": steps,
        "device": str(real.device),
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "loss": loss,
        "seconds_per_step": round(clock.seconds, 3),
        "estimated_seconds": round(clock.seconds * steps, 1),
        "peak_memory_bytes": gpu_memory_peak_bytes()
        or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "checkpoint_bytes": size,
        "free_bytes": _check_disk(request.out, real, size),
        "spec": dict(trainer.spec.__dict__),
        **taboo,
    }


def _on_gpu(config: Any) -> bool:
    return str(config.device).startswith("cuda")


def _check_disk(out: Path, config: Any, size: int) -> int:
    """Free bytes where the run will write; ResourceError if its checkpoints do not fit."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if config.save_strategy == "no":
        return free
    kept = (config.save_total_limit or 1) + 1  # the next one is whole before the oldest goes
    # Those of the run that is there make room for others of their size.
    free += sum(p.stat().st_size for p in out.glob(f"{CHECKPOINTS}/*/*") if p.is_file())
    if free < kept * size:
        raise ResourceError(
            f"{out}: {kept} checkpoints of {size / 1e9:.2f} GB do not fit into the "
            f"{free / 1e9:.2f} GB that are free",
            "free some space, or set save_total_limit, or save_strategy=no",
        )
    return free
