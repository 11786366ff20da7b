"""A run that is stopped, killed or damaged goes on to the same bits; its checkpoints hold no
pickle and are never lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import losses, make_inputs, request, same_run, train_words

from distill import DistillTrainer
from distill.checkpoint import checkpoints, find_checkpoint, rotate, write_checkpoint
from distill.config import distill_config
from distill.data import RowOrder
from distill.tensors import pack, tensor_file, unpack
from distill.train import make_trainer, train
from logitcache.errors import Interrupted, StoreError, UsageError

WORKER = Path(__file__).with_name("resume_worker.py")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("resume"))
    train(request(folder, folder / "undisturbed"))
    return folder


@pytest.fixture(scope="module")
def deaths(inputs: Path) -> dict:
    """In memory, where that is a folder: what is synced is tried, not how long it takes."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="logitcache-resume-", dir=place) as work:
        run = subprocess.run(
            [sys.executable, str(WORKER), str(inputs), work],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_run_that_dies_anywhere_goes_on_to_the_same_bits(deaths: dict) -> None:
    result = deaths["points"]
    assert result["differing"] == []
    assert result["unlike"] == []
    assert result["without_a_good_one"] == []
    assert result["points"] > 80
    assert result["runs"] > 20
    names = {"lock", "make folder", "remove folder", "rename", "sync file", "sync folder"}
    assert set(result["names"]) == names | {"unlink", "write"}


def test_a_full_disk_keeps_the_checkpoint_before_and_exits_with_6(deaths: dict) -> None:
    result = deaths["full"]
    assert len(result["codes"]) >= 6
    assert set(result["codes"]) == {6}
    assert all("disk full" in text for text in result["messages"])
    assert any("checkpoint-1 is safe" in text for text in result["messages"])
    assert result["lost"] == []
    assert result["differing"] == []


def test_a_command_that_is_killed_then_terminated_goes_on_to_the_same_bits(
    inputs: Path, tmp_path: Path
) -> None:
    """Signals that a terminal or a scheduler sends to every process of the run, data workers too;
    kill -9 to the first alone, whose data workers then end themselves."""
    settings = {"max_steps": 200, "save_steps": 25, "dataloader_num_workers": 1}
    command = [sys.executable, "-m", "distill", *train_words(inputs, tmp_path / "out", **settings)]

    def until(step: int, number: signal.Signals) -> tuple[int, str]:
        running = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        while running.poll() is None:
            found = checkpoints(tmp_path / "out" / "checkpoints")
            if found and int(found[0].name[11:]) >= step:
                send = os.kill if number == signal.SIGKILL else os.killpg
                send(running.pid, number)
                break
            time.sleep(0.02)
        _, said = running.communicate(timeout=120)  # their stderr too: until the last has ended
        return running.returncode, said

    code, said = until(25, signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    before = int(checkpoints(tmp_path / "out" / "checkpoints")[0].name[11:])
    code, said = until(before + 25, signal.SIGTERM)
    assert code == 75, said
    assert f"going on from checkpoint-{before}" in said
    assert "run the same command again to continue" in said
    train(request(inputs, tmp_path / "out", **settings))
    train(request(inputs, tmp_path / "whole", **settings))
    assert same_run(tmp_path / "whole", tmp_path / "out") == []


def _stopped_at(inputs: Path, out: Path, step: int, **settings: object) -> Path:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) >= step

    with pytest.raises(Interrupted, match=f"saved step {step} of 3"):
        train(request(inputs, out, **settings), stop=stop)
    return out / "checkpoints" / f"checkpoint-{step}"


def test_a_checkpoint_holds_no_pickle_and_none_is_read(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _stopped_at(inputs, tmp_path / "out", 2)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a pickle is read")

    monkeypatch.setattr(torch, "load", refuse)
    train(request(inputs, tmp_path / "out", dataloader_num_workers=2))
    assert same_run(inputs / "undisturbed", tmp_path / "out") == []


@pytest.mark.parametrize("name", ["model.safetensors", "training.json", "complete.json"])
def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(
    inputs: Path, tmp_path: Path, name: str
) -> None:
    path = _stopped_at(inputs, tmp_path / "out", 2)
    damaged = path / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0x80
    damaged.write_bytes(content)
    with pytest.raises(StoreError, match=rf"checkpoint-2: the checkpoint is damaged: {name}") as e:
        train(request(inputs, tmp_path / "out"), strict=True)
    assert e.value.exit_code == 4
    said: list[str] = []
    train(request(inputs, tmp_path / "out"), note=said.append)
    assert f"checkpoint-2: the checkpoint is damaged: {name}" in said[0]
    assert "going on from checkpoint-1" in said[1]
    assert (tmp_path / "out" / "checkpoints" / "damaged-checkpoint-2" / name).is_file()
    assert same_run(inputs / "undisturbed", tmp_path / "out") == []


def test_a_run_that_attended_otherwise_goes_on_and_says_so(inputs: Path, tmp_path: Path) -> None:
    _stopped_at(inputs, tmp_path / "out", 1)
    path = tmp_path / "out" / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**record, "attention": "varlen"}), encoding="utf-8")
    said: list[str] = []
    train(request(inputs, tmp_path / "out"), note=said.append)
    assert f"attention was varlen, is {record['attention']}: last bits may differ" in said[1]
    assert json.loads(path.read_text(encoding="utf-8"))["attention"] == record["attention"]


def test_a_checkpoint_of_another_store_or_other_settings_is_refused(
    inputs: Path, tmp_path: Path
) -> None:
    path = _stopped_at(inputs, tmp_path / "out", 1)
    asked = request(inputs, tmp_path / "out", alpha=0.3)
    with pytest.raises(UsageError, match=r"alpha: this command 0\.3, run 0\.1"):
        train(asked)
    trainer = make_trainer(asked, asked.config())  # and without the run's record
    with pytest.raises(UsageError, match=r"another run:\n  alpha: this command 0\.3, run 0\.1"):
        trainer.train(resume_from_checkpoint=str(path))
    record = json.loads((path / "training.json").read_text(encoding="utf-8"))
    record["identity"]["store"]["manifest_sha256"] = "0" * 64
    (path / "training.json").write_text(json.dumps(record), encoding="utf-8")
    asked = request(inputs, tmp_path / "out")
    with pytest.raises(UsageError, match="store: not the one of the run"):
        make_trainer(asked, asked.config()).train(resume_from_checkpoint=str(path))


def test_the_best_checkpoint_and_the_newest_are_kept(inputs: Path, tmp_path: Path) -> None:
    settings = {
        "learning_rate": 10.0,  # the first step is the best
        "eval_rows": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "max_steps": 4,
        "metric_for_best_model": "eval_kl",
        "ema_decay": 0.5,
    }
    train(request(inputs, tmp_path / "out", **settings))
    kept = {p.name for p in checkpoints(tmp_path / "out" / "checkpoints")}
    assert kept == {"checkpoint-1", "checkpoint-3", "checkpoint-4"}
    best = load_file(tmp_path / "out" / "checkpoints" / "checkpoint-1" / "ema.safetensors")
    student = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(student[name], weight) for name, weight in best.items())


def test_rotation_and_marks(tmp_path: Path) -> None:
    said: list[str] = []
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, {"a": b"x" * step})
    rotate(tmp_path, None)
    assert len(checkpoints(tmp_path)) == 3
    rotate(tmp_path, 2)
    (tmp_path / "checkpoint-3" / "complete.json").unlink()
    found = find_checkpoint(tmp_path, said.append)
    assert found == tmp_path / "checkpoint-2"
    assert "checkpoint-3: ignored, it was not written to its end" in said[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2"]
    (tmp_path / "checkpoint-2" / "a").write_bytes(b"yy")
    assert find_checkpoint(tmp_path, said.append) is None
    assert find_checkpoint(tmp_path / "none", said.append) is None


def test_state_comes_back_from_json_and_safetensors_as_it_was(tmp_path: Path) -> None:
    def bits(*values: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    state = {
        "state": {
            0: {
                "step": torch.tensor(3.0),
                "state1": torch.arange(5, dtype=torch.uint8),  # as 8-bit optimizers keep theirs
                "nested": {"half": bits(1.5, float("nan"), dtype=torch.bfloat16)},
                "empty": torch.empty(0, 3),
                "odd": bits(1, -0.0, dtype=torch.float64)[::2],
            }
        },
        "param_groups": [{"betas": (0.9, 0.999), "lr": 0.1 + 0.2, "none": None, "on": True}],
        "bounds": [float("inf"), float("-inf")],
    }
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(pack(state, tensors, "x"), allow_nan=False))
    with open(tmp_path / "t.safetensors", "wb") as file:
        file.writelines(tensor_file(tensors))
    again = unpack(packed, load_file(tmp_path / "t.safetensors"))
    assert str(again) == str(state)
    for name, tensor in state["state"][0].items():
        if name != "nested":
            assert again["state"][0][name].dtype == tensor.dtype
    with pytest.raises(TypeError, match=r"x\.a: object cannot be written"):
        pack({"a": object()}, tensors, "x")
    with pytest.raises(UsageError, match=r"y: a Tensor of torch.complex64 cannot be written"):
        tensor_file({"y": torch.zeros(1, dtype=torch.complex64)})


@pytest.mark.parametrize(("rows", "processes"), [(10, 2), (7, 3), (3, 4), (1, 1)])
def test_rows_of_a_step_do_not_depend_on_the_number_of_processes(rows: int, processes: int) -> None:
    def order(count: int, index: int, size: int) -> RowOrder:
        made = RowOrder(rows, size, seed=5, process_index=index, num_processes=count)
        made.set_epoch(2)
        return made

    alone = list(order(1, 0, 2 * processes))
    parts = [list(order(processes, index, 2)) for index in range(processes)]
    assert {len(part) for part in parts} == {len(alone)}
    for step, batch in enumerate(alone):
        assert [row for part in parts for row in part[step]] == batch
    assert sorted(row for batch in alone for row in batch) == list(range(rows))
    other = RowOrder(rows, 2, seed=5)
    assert rows < 4 or list(other) != list(order(1, 0, 2))  # another epoch, another order
    dropped = RowOrder(rows, 2, seed=5, drop_last=True, num_processes=processes)
    assert len(dropped) == rows // (2 * processes)


def test_epochs_go_on_in_the_middle(inputs: Path, tmp_path: Path) -> None:
    """With accumulation, short last batches and several epochs."""
    settings = {"gradient_accumulation_steps": 2, "max_steps": 3, "save_strategy": "no"}
    settings |= {"per_device_train_batch_size": 2, "dataloader_num_workers": 1}
    train(request(inputs, tmp_path / "whole", **settings))
    out = tmp_path / "out"
    _stopped_at(inputs, out, 1, **settings)
    _stopped_at_again = []

    def stop() -> bool:
        _stopped_at_again.append(1)
        return True

    with pytest.raises(Interrupted):
        train(request(inputs, out, **settings), stop=stop)
    train(request(inputs, out, **settings))
    assert losses(out) == losses(tmp_path / "whole")
    trainer = make_trainer(
        request(inputs, tmp_path / "t"), request(inputs, tmp_path / "t").config()
    )
    assert isinstance(trainer, DistillTrainer)
    rows = len(trainer.row_order())
    assert rows < 2 * 3 * 2, rows  # three steps were more than an epoch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_only_model": True}, "save_only_model: a run cannot go on"),
        ({"train_sampling_strategy": "group_by_length"}, "expected random or sequential"),
    ],
)
def test_settings_that_would_break_resume_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        distill_config(settings, "out")
