"""``distill train``: from a store and a student's folder to a trained student with its run
record."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PrinterCallback, ProgressCallback, TrainerCallback

from logitcache import open_store
from logitcache.causal_lm import load_causal_lm, model_identity
from logitcache.environment import describe_environment, gpu_memory_peak_bytes
from logitcache.errors import Interrupted, StoreError, UsageError
from logitcache.files import clear_folder, lock, to_json, write_atomic
from logitcache.packed_attention import VARLEN, use_varlen
from logitcache.several import hosts
from logitcache.tokenise import load_tokenizer

from .adapters import with_adapters
from .checkpoint import find_checkpoint, step_of
from .config import DistillConfig, distill_config
from .fit import check_store, split_rows
from .identity import plain, settings_identity, store_identity
from .law_watch import LAWS_FILE, watch_laws
from .processes import agreed
from .run_folder import (
    CHECKPOINTS,
    LOG_FILE,
    RUN_FILE,
    check_deletable,
    check_out,
    drop_later_records,
    existing_run,
)
from .save import save_student
from .trainer import DistillTrainer

Report = Callable[[int, int, dict[str, float] | None], None]
"""Called as report(step, steps in all, what was logged of it) after each step."""


@dataclasses.dataclass(frozen=True)
class TrainRequest:
    """store, student, out and eval_store are folders; settings are those of DistillConfig."""

    store: Path
    student: Path
    out: Path
    eval_store: Path | None
    settings: dict[str, Any]

    def config(self) -> DistillConfig:
        return distill_config(self.settings, str(self.out / CHECKPOINTS))


def train(
    request: TrainRequest,
    *,
    fresh: bool = False,
    strict: bool = False,
    stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda _: None,
    report: Report = lambda *_: None,
) -> dict[str, Any]:
    """Train, or go on with a run that was interrupted; returns the run record.

    A finished run with the same settings is left as it is. Under torchrun every process calls this;
    the first one holds the lock and decides for all. strict: a damaged checkpoint is an error, not
    a reason to go on from the one before it. Raises UsageError if the folder holds another run,
    StoreError if store and student do not fit, Interrupted after a checkpoint was written because
    of stop().
    """
    config = request.config()
    out = request.out
    check_request(request, config)
    identity = run_identity(request, config)
    with contextlib.ExitStack() as held:

        def claim() -> dict[str, Any] | None:
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock(out / "train.lock"))
            if fresh:
                check_deletable(out)
            return None if fresh else existing_run(out, identity)

        record: dict[str, Any] | None = agreed(config, claim)
        if record is not None and record["complete"]:
            note(f"{out}: already trained; nothing was changed")
            return record
        trainer = make_trainer(request, config)  # all is checked before anything is deleted
        if fresh:
            agreed(config, lambda: clear_folder(out))
        run = _Run(request, trainer, identity, note, report)
        return run.train(record, strict, stop)


def check_request(request: TrainRequest, config: DistillConfig) -> None:
    """Refuse what does not fit, before any weight is loaded: UsageError, StoreError."""
    check_out(
        request.out,
        {"student": request.student, "store": request.store, "eval_store": request.eval_store},
    )
    readers = [open_store(path) for path in (request.store, request.eval_store) if path is not None]
    split_rows(readers[0], config, len(readers) > 1)
    tokenizer = load_tokenizer(request.student)
    try:
        student = AutoConfig.from_pretrained(
            request.student, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds for a bad folder
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(f"{request.student}: its config.json cannot be used: {first}") from error
    for reader in readers:
        check_store(reader, tokenizer, student, config)


def run_identity(request: TrainRequest, config: DistillConfig) -> dict[str, Any]:
    """What makes two runs the same: store contents, student weights, settings, processes."""
    identity = {
        "store": store_identity(open_store(request.store)),
        "student": model_identity(request.student),
        "eval_store": None,
        "settings": settings_identity(config),
    }
    if request.eval_store is not None:
        identity["eval_store"] = open_store(request.eval_store).manifest["data_sha256"]
    return plain(identity)


class _Watch(TrainerCallback):
    """Stops at a step when asked to, after a checkpoint; writes each record to the log file."""

    def __init__(self, stop: Callable[[], bool], log_path: Path, report: Report):
        self.stop, self.log_path, self.report = stop, log_path, report
        self.stopped = False
        self._asked: tuple[torch.Tensor, Any] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stop() if args.world_size == 1 else self._any_stop_asked():
            self.stopped = True
            control.should_save = control.should_training_stop = True
        if state.is_world_process_zero:
            self.report(state.global_step, state.max_steps, None)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked is not None:
            self._asked[1].wait()

    def _any_stop_asked(self) -> bool:
        """Whether any process was asked to stop; all of them say yes at the same step, or they
        would wait for one another. They exchange the answer while they compute the next step, as
        hosts: it must not wait for their GPUs."""
        before = self._asked
        flag = torch.tensor(float(self.stop()))
        most = torch.distributed.ReduceOp.MAX
        self._asked = flag, torch.distributed.all_reduce(flag, most, hosts(), async_op=True)
        if before is None:
            return False
        before[1].wait()
        return bool(before[0])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        with open(self.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        if "loss" in logs:
            self.report(state.global_step, state.max_steps, logs)


def make_trainer(request: TrainRequest, config: DistillConfig) -> DistillTrainer:
    """Load the student in float32 and put it together with store and settings."""
    device = torch.device("cpu") if config.use_cpu else config.device
    chosen = config.attn_implementation
    options = {} if chosen in (None, VARLEN) else {"attn_implementation": chosen}
    model = load_causal_lm(request.student, torch.float32, device, **options).train()
    if not options and not use_varlen(model) and chosen == VARLEN:
        raise UsageError(
            f"attn_implementation: {VARLEN} gives this student on {device.type} something else "
            f"than its {model.config._attn_implementation}, or nothing",
            "leave it out",
        )
    trainer = DistillTrainer(
        with_adapters(model, config),
        config,
        request.store,
        eval_store=request.eval_store,
        processing_class=load_tokenizer(request.student),
    )
    for callback in (PrinterCallback, ProgressCallback):  # _Watch reports, stdout is for the result
        trainer.remove_callback(callback)
    watch_laws(trainer, request.out / LAWS_FILE)
    return trainer


class _Run:
    """One process's part in training a student, from its checkpoint if there is one."""

    def __init__(
        self,
        request: TrainRequest,
        trainer: DistillTrainer,
        identity: dict[str, Any],
        note: Callable[[str], None],
        report: Report,
    ):
        self.request, self.trainer, self.note, self.report = request, trainer, note, report
        self.out = request.out
        self.record: dict[str, Any] = {
            "command": "distill train",
            "complete": False,
            "output": str(request.out),
            "store": str(request.store),
            "student": str(request.student),
            "eval_store": None if request.eval_store is None else str(request.eval_store),
            "identity": identity,
            "settings": _resolved(trainer.args),
            "environment": describe_environment(),
            "attention": trainer.attention,
            "before": None,
        }

    def train(
        self, previous: dict[str, Any] | None, strict: bool, stop: Callable[[], bool]
    ) -> dict[str, Any]:
        started, trainer, out = time.monotonic(), self.trainer, self.out
        checkpoint = agreed(trainer.args, lambda: self._take_up(previous, strict))
        if checkpoint is None and trainer.eval_reader is not None:
            self.record["before"] = trainer.evaluate(metric_key_prefix="before")
            self._write_record()
        watch = _Watch(stop, out / LOG_FILE, self.report)
        trainer.add_callback(watch)
        result = trainer.train(
            resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
        )
        state = trainer.state
        if watch.stopped and state.global_step < state.max_steps:
            raise Interrupted(
                f"{out}: stopped, saved step {state.global_step} of {state.max_steps}",
                "run the same command again to continue",
            )
        has_held_out = trainer.eval_reader is not None
        after = trainer.evaluate(metric_key_prefix="after") if has_held_out else None
        last = next((r for r in reversed(state.log_history) if "loss_kd" in r), {})
        rates = [r["tokens_per_second"] for r in state.log_history if "tokens_per_second" in r]
        self.record |= {
            "steps": state.global_step,
            "metrics": {
                "train_loss": result.training_loss,
                "last": {k: v for k, v in last.items() if k not in ("step", "epoch")},
                "median_tokens_per_second": sorted(rates)[len(rates) // 2] if rates else None,
                "gpu_memory_peak_bytes": gpu_memory_peak_bytes(),
            },
            "after": after,
            "seconds": round(time.monotonic() - started, 1),
        }
        save_student(trainer, self.request.student, out, self.record)
        self.record["complete"] = True
        self._write_record()
        return self.record

    def _take_up(self, previous: dict[str, Any] | None, strict: bool) -> Path | None:
        """Make the folder this run's; the checkpoint to go on from. In the first process alone."""
        checkpoint = find_checkpoint(self.out / CHECKPOINTS, self.note, strict)
        if checkpoint is not None and previous is not None:
            self.note(f"{self.out}: going on from {checkpoint.name}")
            before, now = previous.get("attention"), self.record["attention"]
            if before not in (None, now):
                self.note(f"{self.out}: attention was {before}, is {now}: last bits may differ")
            self.record["before"] = previous.get("before")
        write_atomic(self.out / RUN_FILE, to_json(self.record))
        step = -1 if checkpoint is None else step_of(checkpoint)
        for name in (LOG_FILE, LAWS_FILE):
            drop_later_records(self.out / name, step)
        return checkpoint

    def _write_record(self) -> None:
        if self.trainer.is_world_process_zero():
            write_atomic(self.out / RUN_FILE, to_json(self.record))


def _resolved(config: DistillConfig) -> dict[str, Any]:
    """All settings of a run, as --config reads them."""
    names = {f.name for f in dataclasses.fields(config) if f.init} - {"output_dir"}
    values = plain(config.to_dict())
    return {name: values[name] for name in sorted(names) if values.get(name) is not None}
