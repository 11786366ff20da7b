"""``distill train``: from a store and a student's folder to a trained student with its run
record."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from logitcache import open_store
from logitcache.causal_lm import load_causal_lm, model_identity
from logitcache.environment import describe_environment, gpu_memory_peak_bytes
from logitcache.errors import Interrupted, StoreError, UsageError
from logitcache.files import clear_folder, file_sha256, lock, to_json, write_atomic
from logitcache.tokenise import load_tokenizer

from .config import DistillConfig, distill_config
from .law_watch import LAWS_FILE, watch_laws
from .trainer import DistillTrainer

RUN_FILE, LOG_FILE, RAW_FOLDER, CHECKPOINTS = "run.json", "log.jsonl", "raw", "checkpoints"
_GPU_DATA_WORKERS = 4
# Settings that change neither weights nor metrics: a run may be continued with others.
_NO_IDENTITY = (
    *("output_dir", "dataloader_", "logging_", "report_to", "disable_tqdm", "run_name"),
    *("save_", "hub_", "push_to_hub"),
)
_FILE_SETTINGS = ("taboo_words", "laws", "suite")


@dataclasses.dataclass(frozen=True)
class TrainRequest:
    """store, student, out and eval_store are folders; settings are those of DistillConfig."""

    store: Path
    student: Path
    out: Path
    eval_store: Path | None
    settings: dict[str, Any]

    def config(self) -> DistillConfig:
        settings = dict(self.settings)
        if "dataloader_num_workers" not in settings and torch.cuda.is_available():
            settings["dataloader_num_workers"] = _GPU_DATA_WORKERS
        return distill_config(settings, str(self.out / CHECKPOINTS))


def train(
    request: TrainRequest,
    *,
    fresh: bool = False,
    stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train, or go on with a run that was interrupted; returns the run record.

    A finished run with the same settings is left as it is. Under torchrun every process calls this;
    the first one holds the lock and decides for all. Raises UsageError if the folder holds another
    run, StoreError if store and student do not fit, Interrupted after a checkpoint was written
    because of stop().
    """
    config = request.config()
    out = request.out
    check_paths(request)
    identity = run_identity(request, config)
    with contextlib.ExitStack() as held:

        def claim() -> dict[str, Any] | None:
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock(out / "train.lock"))
            if fresh:
                _check_deletable(out)
            return None if fresh else existing_run(out, identity)

        record: dict[str, Any] | None = _agreed(config, claim)
        if record is not None and record["complete"]:
            note(f"{out}: already trained; nothing was changed")
            return record
        trainer = make_trainer(request, config)  # all is checked before anything is deleted
        if fresh:
            _agreed(config, lambda: clear_folder(out))
        return _train(request, trainer, identity, record, stop, note)


def _agreed(config: DistillConfig, action: Callable[[], Any]) -> Any:
    """Do something in the first process alone; every process gets its result or its error."""
    if config.world_size == 1:
        return action()
    outcome: list[Any] = [None, None]
    if config.process_index == 0:
        try:
            outcome[0] = action()
        except Exception as error:  # whatever it is, the others must not wait for ever
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, device=config.device)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def leave_group() -> None:
    """Under torchrun, at the end of a run that ended well or not: end the group and its threads.

    One that is still letting go of the last collective's tensors when the interpreter ends is
    cancelled in the middle of a C++ destructor, which aborts the process (torch 2.13 with gloo, on
    a busy machine). The group joins its threads when its last holder is gone: the trainer, which
    the frames of an error hold, and reference cycles.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        error = sys.exception()
        if error is not None:
            traceback.clear_frames(error.__traceback__)
        gc.collect()


def check_paths(request: TrainRequest) -> None:
    """Refuse an output folder in which --fresh would delete an input, or that lies in a store."""
    out = request.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: expected a folder, found a file", "give --out a new folder")
    for name in ("student", "store", "eval_store"):
        path = getattr(request, name)
        if path is not None and path.resolve().is_relative_to(out.resolve()):
            raise UsageError(f"{out}: --out holds the {name} {path}", "give --out a new folder")
        if path is not None and name != "student" and out.resolve().is_relative_to(path.resolve()):
            raise UsageError(f"{out}: --out lies in the {name} {path}", "give --out a new folder")


def run_identity(request: TrainRequest, config: DistillConfig) -> dict[str, Any]:
    """What makes two runs the same: store contents, student weights, settings, processes."""
    store = open_store(request.store)
    settings = {k: v for k, v in config.to_dict().items() if not k.startswith(_NO_IDENTITY)}
    for name in _FILE_SETTINGS:  # what is in a file counts, not where it lies
        if settings.get(name) is not None:
            settings[name] = f"sha256 {_file_setting_sha256(name, Path(settings[name]))}"
    identity = {
        "store": {"data": store.manifest["data_sha256"], "teachers": store.store.teachers},
        "student": model_identity(request.student),
        "eval_store": None,
        "settings": {**settings, "processes": config.world_size},  # of which a batch consists
    }
    if request.eval_store is not None:
        identity["eval_store"] = open_store(request.eval_store).manifest["data_sha256"]
    return _plain(identity)


def _file_setting_sha256(name: str, path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"{name}: {path}: no such file", f"check the setting {name}")
    return file_sha256(path)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def existing_run(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the run in a folder; None if the folder is free. UsageError if it is another
    run."""
    path = out / RUN_FILE
    if not path.is_file():
        others = _files_of_others(out)
        if others:
            raise UsageError(
                f"{out}: expected an empty folder or a run, found other files "
                f"({sorted(others)[0]}, ...)",
                "give --out a new folder",
            )
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record["identity"]
    except (json.JSONDecodeError, KeyError) as error:
        raise StoreError(
            f"{path}: not a run record: {error}", "give --fresh to train anew"
        ) from None
    changed = []
    for part in identity:
        if part == "settings":
            keys = {*identity[part], *found.get(part, {})}
            changed += [
                f"{key}: this command {identity[part].get(key)!r}, run {found[part].get(key)!r}"
                for key in sorted(keys)
                if identity[part].get(key) != found[part].get(key)
            ]
        elif identity[part] != found.get(part):
            changed.append(f"{part}: not the one of the run")
    if changed:
        raise UsageError(
            f"{out}: holds another run:\n  " + "\n  ".join(changed),
            "give --out another folder, or --fresh to delete this run and train anew",
        )
    return record


def _files_of_others(out: Path) -> list[str]:
    """What lies in a folder besides what a run leaves that ended before it wrote its record."""
    return [
        path.name
        for path in out.iterdir()
        if path.suffix not in (".lock", ".tmp")
        and not (path.name == CHECKPOINTS and path.is_dir() and not any(path.iterdir()))
    ]


def _check_deletable(out: Path) -> None:
    if not (out / RUN_FILE).is_file() and _files_of_others(out):
        raise UsageError(
            f"{out}: --fresh deletes runs only, found other files", "remove it yourself"
        )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: one whose trainer_state.json, which the Trainer writes last, can
    be read."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return path
    return None


class _Watch(TrainerCallback):
    """Stops at a step when asked to, after a checkpoint; writes each record to the log file."""

    def __init__(self, stop: Callable[[], bool], log_path: Path, note: Callable[[str], None]):
        self.stop, self.log_path, self.note = stop, log_path, note
        self.stopped = False
        self.said = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asked = torch.tensor(float(self.stop()), device=args.device)
        if args.world_size > 1:  # all of them at the same step, or they would wait for one another
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if bool(asked):
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        with open(self.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        if "loss" in logs and (
            time.monotonic() - self.said > 10 or state.global_step == state.max_steps
        ):
            self.said = time.monotonic()
            self.note(
                f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.4f}, "
                f"BLENDED {logs['share_blended']:.0%}, {logs['tokens_per_second']:,.0f} tokens/s"
            )


def make_trainer(request: TrainRequest, config: DistillConfig) -> DistillTrainer:
    """Load the student in float32 and put it together with store and settings."""
    device = torch.device("cpu") if config.use_cpu else config.device
    model = load_causal_lm(request.student, torch.float32, device).train()
    trainer = DistillTrainer(
        model,
        config,
        request.store,
        eval_store=request.eval_store,
        processing_class=load_tokenizer(request.student),
    )
    for callback in (PrinterCallback, ProgressCallback):  # _Watch reports, stdout is for the result
        trainer.remove_callback(callback)
    watch_laws(trainer, request.out / LAWS_FILE)
    return trainer


def _train(
    request: TrainRequest,
    trainer: DistillTrainer,
    identity: dict[str, Any],
    previous: dict[str, Any] | None,
    stop: Callable[[], bool],
    note: Callable[[str], None],
) -> dict[str, Any]:
    out, started = request.out, time.monotonic()
    checkpoint = last_checkpoint(out / CHECKPOINTS)
    is_main = trainer.is_world_process_zero()
    record: dict[str, Any] = {
        "command": "distill train",
        "complete": False,
        "output": str(out),
        "store": str(request.store),
        "student": str(request.student),
        "eval_store": None if request.eval_store is None else str(request.eval_store),
        "identity": identity,
        "settings": _resolved(trainer.args),
        "environment": describe_environment(),
        "before": None,
    }
    if checkpoint is not None and previous is not None:
        note(f"resuming {out} at {checkpoint.name}")
        record["before"] = previous.get("before")
    if is_main:
        write_atomic(out / RUN_FILE, to_json(record))  # from here on the folder is this run's
        for name in (LOG_FILE, LAWS_FILE):
            _drop_later_records(
                out / name, -1 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
            )
    if checkpoint is None and trainer.eval_reader is not None:
        record["before"] = trainer.evaluate(metric_key_prefix="before")
        if is_main:
            write_atomic(out / RUN_FILE, to_json(record))
    watch = _Watch(stop, out / LOG_FILE, note)
    trainer.add_callback(watch)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if watch.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"{out}: stopped, saved step {trainer.state.global_step} of {trainer.state.max_steps}",
            "run the same command again to continue",
        )
    after = trainer.evaluate(metric_key_prefix="after") if trainer.eval_reader is not None else None
    if is_main:
        _save_student(trainer, request.student, out)
    last = next((r for r in reversed(trainer.state.log_history) if "loss_kd" in r), {})
    rates = [r["tokens_per_second"] for r in trainer.state.log_history if "tokens_per_second" in r]
    record |= {
        "complete": True,
        "steps": trainer.state.global_step,
        "metrics": {
            "train_loss": result.training_loss,
            "last": {k: v for k, v in last.items() if k not in ("step", "epoch")},
            "median_tokens_per_second": sorted(rates)[len(rates) // 2] if rates else None,
            "gpu_memory_peak_bytes": gpu_memory_peak_bytes(),
        },
        "after": after,
        "seconds": round(time.monotonic() - started, 1),
    }
    if is_main:
        write_atomic(out / RUN_FILE, to_json(record))
    return record


def _drop_later_records(path: Path, step: int) -> None:
    """Forget records of steps that a resumed run will take again."""
    if path.is_file():
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line that a killed run did not finish
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        write_atomic(path, "".join(kept))


def _resolved(config: DistillConfig) -> dict[str, Any]:
    """All settings of a run, as --config reads them."""
    names = {f.name for f in dataclasses.fields(config) if f.init} - {"output_dir"}
    values = _plain(config.to_dict())
    return {name: values[name] for name in sorted(names) if values.get(name) is not None}


def _save_student(trainer: DistillTrainer, source: Path, out: Path) -> None:
    """Save the averaged weights as the student and the raw ones beside it, in the student's own
    dtype."""
    from transformers import AutoConfig

    model = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer: Any = trainer.processing_class
    dtype = getattr(AutoConfig.from_pretrained(source, local_files_only=True), "dtype", None)
    # Training is over: the model may change its dtype, and what save_pretrained records is the
    # model's.
    if isinstance(dtype, torch.dtype):
        model.to(dtype)
    tokenizer.save_pretrained(out / RAW_FOLDER)
    model.save_pretrained(out / RAW_FOLDER)
    with trainer.averaged_weights():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
