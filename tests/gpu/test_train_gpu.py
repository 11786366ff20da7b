"""Building and training on a GPU: what a CPU computes, exact resume, no wait for the GPU in a step,
a step that is not finite."""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from training_runs import losses, make_inputs, request, same_run
from transformers import TrainerCallback

from distill.checkpoint import checkpoints
from distill.data import Feed
from distill.train import make_trainer, train
from logitcache import build, open_store
from logitcache.errors import Interrupted, NonFiniteError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]
ON_GPU = {"use_cpu": False, "max_steps": 6, "save_steps": 2}


@pytest.fixture(autouse=True)
def _as_by_default() -> Iterator[None]:
    """full_determinism stays on in a process."""
    before = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("gpu"))


def test_a_store_built_here_is_what_the_teachers_say(inputs: Path, tmp_path: Path) -> None:
    build(
        teacher1=inputs / "one",
        teacher2=inputs / "two",
        data=[inputs / "data.jsonl"],
        seq_len=48,
        out=tmp_path / "store",
        device="cuda",
    )
    ours, theirs = open_store(tmp_path / "store"), open_store(inputs / "store")
    assert ours.manifest["data_sha256"] == theirs.manifest["data_sha256"]
    command = [sys.executable, "-m", "logitcache", "verify", str(tmp_path / "store")]
    run = subprocess.run([*command, "--rescore", "4"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_losses_are_those_of_a_cpu(inputs: Path, tmp_path: Path) -> None:
    found = {}
    # The student without dropout, whose draws are the device's own.
    for name, use_cpu in (("cpu", True), ("gpu", False)):
        asked = request(inputs, tmp_path / name, use_cpu=use_cpu, bf16=False, logging_steps=1)
        train(replace(asked, student=inputs / "even"))
        found[name] = losses(tmp_path / name)
    assert len(found["cpu"]) == 3
    for on_cpu, on_gpu in zip(found["cpu"], found["gpu"], strict=True):
        assert on_gpu == pytest.approx(on_cpu, rel=2e-4)


def test_a_stopped_run_goes_on_to_the_same_bits(inputs: Path, tmp_path: Path) -> None:
    settings = {**ON_GPU, "full_determinism": True}
    train(request(inputs, tmp_path / "whole", **settings))
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 3

    with pytest.raises(Interrupted, match="saved step 3 of 6"):
        train(request(inputs, tmp_path / "out", **settings), stop=stop)
    train(request(inputs, tmp_path / "out", **settings, dataloader_num_workers=2))
    assert same_run(tmp_path / "whole", tmp_path / "out") == []


@pytest.mark.filterwarnings("default")  # of torch.compile, which is not ours to mend
def test_a_compiled_student_has_the_losses_of_a_plain_one(inputs: Path, tmp_path: Path) -> None:
    """Near them: its dropout draws other numbers, and products are in TF32."""
    try:
        for name in ("plain", "compiled"):
            train(request(inputs, tmp_path / name, **ON_GPU, torch_compile=name == "compiled"))
    finally:
        torch.backends.fp32_precision = "none"
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert [x[1] for x in compiled] == pytest.approx([x[1] for x in plain], rel=0.03)


def test_no_step_waits_for_the_gpu(inputs: Path, tmp_path: Path) -> None:
    asked = request(inputs, tmp_path / "out", **ON_GPU, save_strategy="no", logging_steps=100)
    trainer = make_trainer(asked, asked.config())

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                torch.cuda.set_sync_debug_mode("error")

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                torch.cuda.set_sync_debug_mode("default")

    trainer.add_callback(Watch())
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_is_not_finite_is_never_taken(inputs: Path, tmp_path: Path) -> None:
    asked = request(inputs, tmp_path / "out", **ON_GPU)
    trainer = make_trainer(asked, asked.config())
    before = {}

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    trainer.model.model.norm.weight[0] = math.nan
                before.update({n: p.clone() for n, p in trainer.model.named_parameters()})

    trainer.add_callback(Poison())
    with pytest.raises(NonFiniteError, match=r"step 4: loss is nan in row \d+"):
        trainer.train()
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight.nan_to_num(9), before[name].nan_to_num(9)), name
    saved = checkpoints(tmp_path / "out" / "checkpoints")
    assert [path.name for path in saved] == ["checkpoint-2"]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_on_the_gpu_are_those_of_the_store(inputs: Path, workers: int) -> None:
    """Large ones, from memory that is used again, while the GPU is behind with its copies; closed
    early and begun anew, beside another feed of the same reader."""
    reader = open_store(inputs / "store")
    rows = [[n % len(reader) for n in range(m, m + 64)] for m in range(12)]
    cpu = list(Feed(open_store(inputs / "store"), 1.5, torch.device("cpu"), 0).inputs(rows))
    assert cpu[0]["teachers"][0]["logp_RK"].nbytes > 2**18
    feed, other = (Feed(reader, 1.5, torch.device("cuda"), workers) for _ in range(2))
    for _ in range(2):
        batches, beside = feed.inputs(rows), other.inputs(rows[::-1])
        found = []
        for batch in itertools.islice(batches, 7):
            torch.cuda._sleep(20_000_000)
            found.append(batch)
            found.append(next(beside))
        batches.close()
        beside.close()
        for number, batch in enumerate(found):
            expected = cpu[number // 2] if number % 2 == 0 else cpu[-1 - number // 2]
            assert batch["rows"] == expected["rows"]
            for ours, theirs in zip(batch["teachers"], expected["teachers"], strict=True):
                for name, tensor in theirs.items():
                    if tensor is not None:
                        assert torch.equal(ours[name].cpu(), tensor), name
