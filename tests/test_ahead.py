"""What processes read ahead is what is read when asked for, errors included."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill import ahead
from distill.ahead import changed, made_ahead
from distill.data import Feed
from logitcache import open_store
from logitcache.errors import ResourceError, StoreError

ROWS = [[3, 1], [], [2], [0, 3]]


def feed(path: Path, workers: int) -> Feed:
    return Feed(open_store(path), 1.5, torch.device("cpu"), workers)


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
    monkeypatch.setattr(ahead, "_SHARED", 1 << 62)
    rows: Iterator[list[int]] = itertools.repeat([0])
    with pytest.warns(UserWarning, match=r"/dev/shm: \d+ MiB .* --shm-size"):
        reading = made_ahead(
            lambda reader, numbers: {"pid": os.getpid()}, open_store(built.path), rows, 2, False
        )
    assert next(reading).inputs()["pid"] == os.getpid()
