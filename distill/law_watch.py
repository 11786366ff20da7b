"""Laws in training: at each evaluation, and at the end, what the child says is held against them.

The child is the averaged weights. What it breaks goes to ``laws.jsonl``, a violation a line with
the step; its number goes to the log. The file holds each step once, whatever was run again.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from logitcache.errors import InputError, StoreError, UsageError
from logitcache.files import write_atomic

from .generate import Speaker
from .laws import Laws, Violation, read_laws, violations_of
from .suite import Suite, read_suite

if TYPE_CHECKING:
    from .trainer import DistillTrainer

LAWS_FILE = "laws.jsonl"
MAX_NEW_TOKENS = 64


class LawWatch(TrainerCallback):
    """Checks a trainer's model when the trainer has evaluated, and when training has ended."""

    def __init__(self, trainer: DistillTrainer, laws: Laws, suite: Suite | None, path: Path):
        self.trainer, self.laws, self.suite, self.path = trainer, laws, suite, path
        self.checked = 0  # step; before the first the model is nobody's child yet

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.check(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # not one that was stopped on its way
            self.check(state.global_step)

    def check(self, step: int) -> None:
        """Record what the model breaks at a step that was not looked at before."""
        if step <= self.checked:
            return
        self.checked = step
        trainer = self.trainer
        # With a cache each compiled layer would be a graph of its own, for every length anew.
        with trainer.averaged_weights(), torch.compiler.set_stance("force_eager"):
            violations = violations_of(
                trainer._core,
                trainer.processing_class,
                self.laws,
                self.suite,
                max_new_tokens=MAX_NEW_TOKENS,
            )
        if trainer.is_world_process_zero():
            lines = [{"step": step, **dataclasses.asdict(found)} for found in violations]
            kept = [line for line in read_violations(self.path) if line["step"] < step]
            write_atomic(self.path, "".join(json.dumps(x) + "\n" for x in [*kept, *lines]))
        trainer.log({"law_violations": float(len(violations))})
        trainer._since = time.monotonic()  # no time of a training step


def watch_laws(trainer: DistillTrainer, path: Path) -> LawWatch | None:
    """Let a trainer whose settings name laws check them, with its records in ``path``.

    UsageError or InputError for laws and a suite that cannot be used, before any step is taken.
    """
    config = trainer.args
    if config.laws is None:
        if config.suite is not None:
            raise UsageError("suite: training asks its law items alone, and there are no laws")
        return None
    laws = read_laws(Path(config.laws))
    suite = None if config.suite is None else read_suite(Path(config.suite))
    laws.check_fits(suite, trainer.processing_class)
    items = laws.items(suite)
    if not items:
        raise InputError(
            f"{config.laws}: nothing to ask: no rule has prompts, and "
            + ("there is no suite" if suite is None else f"{suite.path} has no law items"),
            "--set suite=FILE with law items, or leave laws out",
        )
    speaker = Speaker(trainer._core, trainer.processing_class)
    for item in items:
        length = len(speaker.encoder.prompt(item.document()))
        speaker.check_length(item.id, length, MAX_NEW_TOKENS)
    watch = LawWatch(trainer, laws, suite, path)
    trainer.add_callback(watch)
    return watch


def read_violations(path: Path) -> list[dict[str, Any]]:
    """The records of a run's ``laws.jsonl``; none if it is not there."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def training_violations(folder: Path) -> list[Violation]:
    """Broken laws that training met, of a student's folder; none where nobody looked."""
    path = folder / LAWS_FILE
    names = [field.name for field in dataclasses.fields(Violation)]
    try:
        return [Violation(**{name: r[name] for name in names}) for r in read_violations(path)]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path}: not the violations of a training run: {error}", "train with --fresh"
        ) from None
