"""The state of a training run, as the files of a checkpoint and back.

model.safetensors       weights that are trained (of a student without adapters all: with
                        config.json a transformers folder), and persistent buffers
ema.safetensors         their averages
training.safetensors    tensors of the optimizer and of the random generators
training.json           the rest of them, the scheduler and the scaler; whose run it is
trainer_state.json      what transformers.Trainer wants to know: step, epoch, log

Shards (FSDP2) are gathered by the first process, which writes all; every process reads all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from logitcache.errors import LogitCacheError, StoreError, UsageError
from logitcache.files import to_json

from .checkpoint import read_json
from .ema import WeightAverage, trained_weights
from .processes import gathered, like
from .tensors import pack, tensor_file, unpack

WEIGHTS, AVERAGE = "model.safetensors", "ema.safetensors"
TENSORS, STATE, TRAINER_STATE = "training.safetensors", "training.json", "trainer_state.json"


def random_state() -> dict[str, Any]:
    """The generators that training draws from: dropout and whatever else a model does."""
    drawn = np.random.get_state(legacy=False)
    assert isinstance(drawn, dict)
    inner = {**drawn["state"], "key": drawn["state"]["key"].tolist()}
    return {
        "python": random.getstate(),
        "numpy": {**drawn, "state": inner},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    drawn = state["numpy"]
    key = np.array(drawn["state"]["key"], np.uint32)
    np.random.set_state({**drawn, "state": {**drawn["state"], "key": key}})
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def checkpoint_files(trainer: Any) -> dict[str, bytes | Iterable[bytes]]:
    """The files of a checkpoint of a trainer as it is. Every process must call this; what is
    returned is for the first to write."""
    model, first = trainer._core, trainer.args.process_index == 0
    persistent = set(model.state_dict().keys())
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    weights = gathered({**trained_weights(model), **buffers}, first)
    average: WeightAverage | None = trainer.average
    averages = {} if average is None else gathered(average.weights, first)
    generators: list[Any] = [random_state()]
    if trainer.args.world_size > 1:
        generators *= trainer.args.world_size
        torch.distributed.all_gather_object(generators, random_state())
    scaler = trainer.accelerator.scaler
    tensors: dict[str, torch.Tensor] = {}
    state = {
        "identity": trainer.identity(),
        "average_updates": None if average is None else average.updates,
        "optimizer": pack(trainer.optimizer.state_dict(), tensors, "optimizer"),
        "scheduler": pack(trainer.lr_scheduler.state_dict(), tensors, "scheduler"),
        "scaler": pack(None if scaler is None else scaler.state_dict(), tensors, "scaler"),
        "random": pack(generators, tensors, "random"),
    }
    tensors = gathered(tensors, first)
    if not first:
        return {}
    trainer_state = json.dumps(dataclasses.asdict(trainer.state), indent=1, sort_keys=True)
    files: dict[str, bytes | Iterable[bytes]] = {
        "config.json": model.config.to_json_string().encode("utf-8"),
        WEIGHTS: tensor_file(weights),
        TENSORS: tensor_file(tensors),
        STATE: to_json(state).encode("utf-8"),
        TRAINER_STATE: (trainer_state + "\n").encode("utf-8"),
    }
    return {**files, AVERAGE: tensor_file(averages)} if average is not None else files


def checkpoint_bytes(trainer: Any) -> int:
    """Bytes of a checkpoint of a trainer that has taken a step, but for small files."""
    tensors: dict[str, torch.Tensor] = {}
    pack(trainer.optimizer.state_dict(), tensors, "optimizer")
    weights = trained_weights(trainer._core)
    averages = {} if trainer.average is None else trainer.average.weights
    every = [*tensors.values(), *weights.values(), *averages.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in every)


class SavedState:
    """What a checkpoint holds. StoreError if it cannot be read."""

    def __init__(self, path: Path):
        self.path = path
        with self.reading():
            self._state = read_json(path / STATE)
            self._tensors = load_file(path / TENSORS)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Turn whatever a checkpoint that does not fit raises into a StoreError."""
        try:
            yield
        except LogitCacheError:
            raise
        except Exception as error:  # safetensors, torch and json raise many kinds
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise StoreError(
                f"{self.path}: the checkpoint cannot be read: {first}",
                "delete it: the same command then continues from the one before it, or from "
                "the start",
            ) from error

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """UsageError that names what differs, if the checkpoint is another run's."""
        changed = changed_keys(identity, self._state["identity"])
        if changed:
            raise UsageError(
                f"{self.path}: is a checkpoint of another run:\n  " + "\n  ".join(changed),
                "train into another folder, or give the settings of that run",
            )

    def load_weights(self, model: Any) -> None:
        with self.reading():
            weights = load_file(self.path / WEIGHTS)
            targets = {**trained_weights(model), **dict(model.named_buffers())}
            missing = trained_weights(model).keys() - weights.keys()
            if missing:
                raise StoreError(f"{self.path}: {WEIGHTS}: no {sorted(missing)[0]} in it")
            with torch.no_grad():
                for name, tensor in weights.items():
                    targets[name].copy_(like(tensor, targets[name]))

    def load_average(self, average: WeightAverage) -> None:
        with self.reading():
            average.load(load_file(self.path / AVERAGE), self._state["average_updates"])

    def load_optimizer(self, optimizer: Any, scheduler: Any) -> None:
        with self.reading():
            found = unpack(self._state["optimizer"], self._tensors)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for number, values in found["state"].items():
                parameter = parameters[number]
                for key, value in values.items():
                    if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                        values[key] = like(value, parameter)
            optimizer.load_state_dict(found)
            scheduler.load_state_dict(unpack(self._state["scheduler"], self._tensors))

    def load_scaler(self, scaler: Any) -> None:
        with self.reading():
            found = unpack(self._state["scaler"], self._tensors)
            if scaler is not None and found is not None:
                scaler.load_state_dict(found)

    def load_random_state(self, process_index: int) -> None:
        with self.reading():
            set_random_state(unpack(self._state["random"], self._tensors)[process_index])


def changed_keys(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """A line for each difference of two identities; settings by name and with both values."""
    changed = []
    for part in wanted:
        ours, theirs = wanted[part], found.get(part)
        if part == "settings":
            theirs = theirs or {}
            changed += [
                f"{key}: this command {ours.get(key)!r}, run {theirs.get(key)!r}"
                for key in sorted({*ours, *theirs})
                if ours.get(key) != theirs.get(key)
            ]
        elif ours != theirs:
            changed.append(f"{part}: not the one of the run")
    return changed
