"""Training on several processes: the loss, gradients and averages of one, under DDP and FSDP2, with
adapters, accumulation and uneven last batches; the command under torchrun."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from several_checks import (
    WORKER,
    assert_ends_where_one_does,
    assert_resumed_to_the_same_bits,
    torchrun,
    train_all_cases,
)
from training_runs import CASES, RESUMED, SETTINGS, case_request, losses, make_inputs, request

from distill.train import train
from logitcache import build, open_store
from logitcache.errors import UsageError
from logitcache.verify import verify_store

# peft asks transformers by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def double(inputs: Path) -> Path:
    return train_all_cases(inputs)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_end_where_one_does(
    inputs: Path, double: Path, tmp_path: Path, name: str
) -> None:
    assert_ends_where_one_does(inputs, double, tmp_path, name)


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_go_on_to_the_same_bits(double: Path, name: str) -> None:
    assert_resumed_to_the_same_bits(double, name)
    path = double / name / "checkpoints" / "checkpoint-2"
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


def test_processes_stop_together_when_one_is_asked_and_go_on(double: Path) -> None:
    raw = load_file(double / "stopped" / "raw" / "model.safetensors")
    weights = load_file(double / "ddp" / "weights.safetensors")
    assert raw.keys() == weights.keys()
    assert all(torch.equal(raw[name], weights[name]) for name in raw)


def test_a_teacher_in_shards_over_two_processes_gives_the_store_of_one(
    inputs: Path, double: Path
) -> None:
    assert verify_store(double / "store")[1] == []
    one, two = open_store(inputs / "store"), open_store(double / "store")
    assert one.manifest == two.manifest
    rows = slice(0, len(one))
    assert (one[rows].labels == two[rows].labels).all()
    for ours, theirs in zip(one[rows].teachers, two[rows].teachers, strict=True):
        # Which of the rare entries are drawn may turn on a rounding; what is certain does not.
        assert ours.entropy_P == pytest.approx(theirs.entropy_P, abs=0.02)
        assert ours.gold_logp_P == pytest.approx(theirs.gold_logp_P, abs=0.02, nan_ok=True)
        same = (ours.ids_PK[:, 0] == theirs.ids_PK[:, 0]).mean()
        assert same > 0.98


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_map": "auto", "tp_plan": "auto"}, "expected one of them, found both"),
        ({"device_map": "auto", "device": "cpu"}, "expected device auto and no torchrun"),
        ({"tp_plan": "auto"}, "expected torchrun with two or more"),
        ({"device_map": "balanced"}, "device_map: Input should be 'auto'"),
    ],
)
def test_devices_that_do_not_go_together_are_refused(
    inputs: Path, tmp_path: Path, settings: dict, message: str
) -> None:
    data = [inputs / "data.jsonl"]
    with pytest.raises(UsageError, match=message):
        build(teacher1=inputs / "one", data=data, out=tmp_path / "store", **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with a store made on a CPU")
def test_layers_spread_over_the_devices_that_there_are_give_the_same_store(
    inputs: Path, tmp_path: Path
) -> None:
    teachers = {"teacher1": inputs / "one", "teacher2": inputs / "two"}
    data = [inputs / "data.jsonl"]
    build(**teachers, data=data, seq_len=48, out=tmp_path / "store", device_map="auto")
    for path in (inputs / "store").rglob("*"):
        if path.is_file() and path.suffix != ".lock":
            other = tmp_path / "store" / path.relative_to(inputs / "store")
            assert other.read_bytes() == path.read_bytes(), path.name


def test_command_on_two_processes_is_one_run_with_one_result(inputs: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "max_steps": 2, "per_device_train_batch_size": 1, "eval_rows": 2}
    del settings["use_cpu"]  # chosen where there is no GPU
    words = ["train", "--store", inputs / "store", "--student", inputs / "even", "--json"]
    words += ["--out", tmp_path / "out"]
    words += [w for key, value in settings.items() for w in ("--set", f"{key}={value}")]
    run = torchrun(WORKER, *words)
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout)["steps"] == 2
    ends = [line for line in run.stderr.splitlines() if "threads at the end" in line]
    assert len(ends) == 2, run.stderr[-3000:]
    assert "gloo" not in "".join(ends), ends  # one that ends with the interpreter can abort it
    asked = request(inputs, tmp_path / "single", max_steps=2, eval_rows=2)
    train(type(asked)(asked.store, inputs / "even", asked.out, None, asked.settings))
    for part in ("", "raw"):
        one, two = (
            load_file(tmp_path / folder / part / "model.safetensors")
            for folder in ("single", "out")
        )
        for name, weights in one.items():
            torch.testing.assert_close(two[name], weights, rtol=1e-3, atol=1e-4)
    assert [x[1] for x in losses(tmp_path / "out")] == pytest.approx(
        [x[1] for x in losses(tmp_path / "single")], rel=1e-4
    )


def test_adapters_are_merged_into_the_student(inputs: Path, tmp_path: Path) -> None:
    asked = case_request(inputs, tmp_path / "out", "ddp lora", processes=1)
    train(asked)
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    start = load_file(inputs / "even" / "model.safetensors")
    assert student.keys() == start.keys()
    changed = {name for name in start if not torch.equal(student[name], start[name])}
    assert changed
    assert all("_proj" in name for name in changed), changed
    checkpoint = load_file(tmp_path / "out" / "checkpoints" / "checkpoint-4" / "model.safetensors")
    assert all("lora_" in name for name in checkpoint)
