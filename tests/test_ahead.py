"""What processes read ahead is what is read when asked for, errors included."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_runs import make_inputs, request, train_words

from distill import ahead
from distill.ahead import Packed, SharedBlocks, _Batches, changed, made_ahead
from distill.data import Feed
from distill.train import make_trainer
from logitcache import open_store
from logitcache.errors import ResourceError, StoreError

ROWS = [[3, 1], [], [2], [0, 3]]


def feed(path: Path, workers: int) -> Feed:
    return Feed(open_store(path), 1.5, torch.device("cpu"), workers)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("ahead"))


def flat(batch: dict[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    changed(batch, torch.Tensor, lambda t: found.append(t) or t)
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_give_what_the_loop_itself_would_read(
    built: SimpleNamespace, workers: int
) -> None:
    expected = list(feed(built.path, 0).inputs(ROWS))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    reading = feed(built.path, workers)
    for _ in range(2):  # begun anew after it was closed early
        started = reading.inputs(ROWS)
        next(started)
        started.close()
        found = list(reading.inputs(iter(ROWS)))
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert {k: v for k, v in ours.items() if not _has_tensors(v)} == {
                k: v for k, v in theirs.items() if not _has_tensors(v)
            }
            assert all(map(torch.equal, flat(ours), flat(theirs)))
            assert len(flat(ours)) == len(flat(theirs)) > 8
    assert torch.equal(torch.get_rng_state(), state), "reading moved the random state of the run"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # no process is left


def _has_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, list) and bool(flat(value)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_is_named_with_what_to_do(
    built: SimpleNamespace, tmp_path: Path, workers: int
) -> None:
    copied = shutil.copytree(built.path, tmp_path / "store")
    path = copied / "teacher2" / "fields" / "c.0.0.0"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    reading = feed(copied, workers)
    path.write_bytes(content)
    rows = [[n] for n in range(len(reading.reader))]
    with pytest.raises(StoreError, match=r"teacher2: row \d+ cannot be read") as caught:
        list(reading.inputs(rows))
    assert "logitcache verify" in str(caught.value.hint)


def test_a_process_that_dies_is_an_error_with_what_to_do(built: SimpleNamespace) -> None:
    def die(reader: Any, numbers: list[int]) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    with pytest.raises(ResourceError, match="a process that reads the store died") as caught:
        list(made_ahead(die, open_store(built.path), ROWS, 1, pinned=False))
    assert "dataloader_num_workers=0" in str(caught.value.hint)


def test_each_process_reads_with_a_reader_of_its_own(built: SimpleNamespace) -> None:
    reader = open_store(built.path)
    rows = iter([[1], [2]])
    made = made_ahead(lambda given, _: {"same": given is reader}, reader, rows, 1, pinned=False)
    assert [packed.inputs() for packed in made] == [{"same": False}] * 2


def test_an_error_says_where_in_the_process_it_was(built: SimpleNamespace) -> None:
    def broken(reader: Any, numbers: list[int]) -> dict[str, Any]:
        raise KeyError("no such part")

    with pytest.raises(KeyError, match="no such part") as caught:
        list(made_ahead(broken, open_store(built.path), ROWS, 1, pinned=False))
    assert any("in broken" in note for note in caught.value.__notes__)


def test_no_shared_memory_is_an_error_with_what_to_do(
    built: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    with pytest.raises(ResourceError, match="/dev/shm: no shared memory for a batch of") as caught:
        list(feed(built.path, 1).inputs(ROWS))
    assert "--shm-size" in str(caught.value.hint)


def test_shared_memory_is_filled_again_once_it_was_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # a copy, as on a GPU
    monkeypatch.setattr(ahead, "_PATIENCE", 0)
    blocks = SharedBlocks()

    def batch(value: int, size: int = 1000) -> Packed:
        return Packed.of({"x": torch.full((size,), value)}, blocks.empty)

    one, two = batch(1), batch(2)
    assert one.memory.is_shared()
    assert one.memory.data_ptr() != two.memory.data_ptr()
    pinned = one.pin_memory()
    three, four = batch(3), batch(4)
    assert three.memory.data_ptr() == one.memory.data_ptr() != four.memory.data_ptr()
    values = [packed.inputs()["x"].unique().tolist() for packed in (pinned, two, three, four)]
    assert values == [[1], [2], [3], [4]]
    two.pin_memory(), three.pin_memory()
    assert len(batch(5, size=5000).memory) > 5000 * 8  # larger than the free ones, which go
    assert len(blocks._blocks) == 2


def test_a_block_that_is_being_pinned_is_waited_for() -> None:
    blocks = SharedBlocks()
    first = blocks.empty(1000)
    threading.Timer(0.05, first.__setitem__, (0, 0)).start()
    assert blocks.empty(1000).data_ptr() == first.data_ptr()


def test_only_what_is_pinned_is_filled_again(built: SimpleNamespace) -> None:
    """Elsewhere the loop itself has the shared memory, for as long as it likes."""
    for pinned in (True, False):
        made = _Batches(lambda *_: {"x": torch.zeros(9)}, open_store(built.path).store, pinned)
        one = made.__getitems__([0])
        assert isinstance(one, Packed)
        assert one.memory.is_shared()
        one.memory[0] = 0
        two = made.__getitems__([0])
        assert isinstance(two, Packed)
        assert (one.memory.data_ptr() == two.memory.data_ptr()) == pinned


def test_a_signal_to_all_processes_ends_no_reading(built: SimpleNamespace) -> None:
    def made(reader: Any, numbers: list[int]) -> dict[str, Any]:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        return {"numbers": numbers}

    rows = made_ahead(made, open_store(built.path), iter([[1]]), 1, pinned=False)
    assert [packed.inputs() for packed in rows] == [{"numbers": [1]}]


def test_little_shared_memory_means_a_thread_and_a_warning(
    built: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(1 << 40))
    rows: Iterator[list[int]] = itertools.repeat([0])
    with pytest.warns(UserWarning, match=r"/dev/shm: \d+ MiB .* --shm-size"):
        reading = made_ahead(
            lambda reader, numbers: {"pid": os.getpid()}, open_store(built.path), rows, 2, False
        )
    assert next(reading).inputs()["pid"] == os.getpid()


def test_a_process_that_does_not_end_by_itself_is_ended(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    batches = feed(inputs / "store", 1).inputs([[0]] * 8)
    next(batches)
    (process,) = multiprocessing.active_children()
    before = signal.getsignal(signal.SIGCHLD)
    os.kill(process.pid, signal.SIGSTOP)
    batches.close()
    assert not process.is_alive()
    assert signal.getsignal(signal.SIGCHLD) is before


def test_an_error_ends_the_command_and_the_processes_that_read(
    inputs: Path, tmp_path: Path
) -> None:
    settings = {"learning_rate": 1e38, "max_grad_norm": 0, "dataloader_num_workers": 2}
    command = [sys.executable, "-m", "distill", *train_words(inputs, tmp_path / "out", **settings)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 7, run.stderr


# Of several deaths at once, torch may raise one while an object is being finalized.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("during", ["training", "evaluation"])
def test_a_process_that_dies_in_the_middle_of_a_step_is_named(
    inputs: Path, tmp_path: Path, during: str
) -> None:
    """torch says so wherever the main thread is."""
    settings = {"eval_rows": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 50}
    settings |= {"dataloader_num_workers": 1, "num_train_epochs": 100}
    asked = request(inputs, tmp_path / "out", **settings)
    trainer = make_trainer(asked, asked.config())

    def kill(*_: object) -> None:
        if trainer._core.training == (during == "training"):
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.5)

    trainer._core.model.register_forward_hook(kill)
    with pytest.raises(ResourceError, match="a process that reads the store died"):
        trainer.train()
    assert [p for p in multiprocessing.active_children() if is_there(p.pid)] == []


def is_there(pid: int | None) -> bool:
    """active_children() alone does not know: torch raises in the middle of its asking, too."""
    assert pid is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
