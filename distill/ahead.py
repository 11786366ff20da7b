"""Batches made ahead of their use, in order, by processes of their own.

A thread would share the interpreter's lock with the training loop, which launches thousands of
small kernels a step: of a student of 135M a step took half as long again beside one that reads
(docs/training.md). For the same reason a batch comes over in one piece.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from logitcache.errors import ResourceError
from logitcache.reader import StoreReader, read_ahead
from logitcache.remote import RemoteStore
from logitcache.store import Store

Inputs = dict[str, Any]
Make = Callable[[StoreReader, list[int]], Inputs]

_SHARED = 1 << 29  # bytes; of batches of 8 x 2048 positions each process keeps a block of 40 MB
_ALIGNED = 256  # bytes, as torch's own allocator of GPU memory would
_ROOM = "containers take --shm-size=4g or --ipc=host"
_PATIENCE = 1.0  # seconds; a block is pinned in some hundredths, and as many may be before it
_STOPPING = {signal.SIGINT, signal.SIGTERM}


@dataclass(frozen=True)
class _Place:
    """Where a tensor of a batch lies in its memory, and what it is."""

    start: int
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class Packed:
    """A batch whose tensors lie end to end in one, uint8 [bytes]; the rest of it with a place for
    each of them. The first byte says whether the others are in use."""

    memory: torch.Tensor
    rest: Any

    @staticmethod
    def of(inputs: Inputs, empty: Callable[[int], torch.Tensor]) -> Packed:
        """empty: gives uint8 tensors of so many bytes."""
        size = _ALIGNED

        def place(tensor: torch.Tensor) -> _Place:
            nonlocal size
            at = _Place(size, tensor.shape, tensor.dtype)
            size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
            placed.append((at, tensor))
            return at

        placed: list[tuple[_Place, torch.Tensor]] = []
        rest = changed(inputs, torch.Tensor, place)
        packed = Packed(empty(size), rest)
        for at, tensor in placed:
            packed._at(at).copy_(tensor)
        return packed

    def inputs(self) -> Inputs:
        """The batch again; its tensors share the memory."""
        return changed(self.rest, _Place, self._at)

    def pin_memory(self) -> Packed:
        pinned = self.memory.pin_memory()
        self.memory[0] = 0
        return Packed(pinned, self.rest)

    def to(self, device: torch.device) -> Packed:
        """A copy there, not waited for."""
        return Packed(self.memory.to(device, non_blocking=True), self.rest)

    def _at(self, at: _Place) -> torch.Tensor:
        end = at.start + at.shape.numel() * at.dtype.itemsize
        return self.memory[at.start : end].view(at.dtype).view(at.shape)


class SharedBlocks:
    """Shared memory that a data worker fills again once its batch was pinned, which is a copy:
    fresh pages cost more than what is written to them (64 MB on a virtual machine, 2026-11: 47 ms,
    and 4 when filled again). One block does, for it is pinned while the next batch is decoded."""

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []

    def empty(self, size: int) -> torch.Tensor:
        """uint8 [size], the first byte 1; whoever has copied the rest sets it to 0."""
        fitting = [block for block in self._blocks if len(block) >= size]
        give_up = time.monotonic() + _PATIENCE
        while fitting and all(block[0] for block in fitting) and time.monotonic() < give_up:
            time.sleep(0.001)
        block = next((block for block in fitting if not block[0]), None)
        if block is None:
            self._blocks = [block for block in self._blocks if block[0]]  # others are too small
            block = _shared(size + size // 4)
            self._blocks.append(block)
        block[0] = 1
        return block[:size]


def _shared(size: int) -> torch.Tensor:
    try:
        storage = torch.UntypedStorage._new_shared(size)
    except RuntimeError as error:
        raise ResourceError(
            f"/dev/shm: no shared memory for a batch of {size >> 20} MiB: {error}",
            f"{_ROOM}; or --set dataloader_num_workers=1, or 0",
        ) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _in_this_process(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


def changed(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The same dicts and lists with what is of a kind changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: changed(part, kind, change) for key, part in value.items()}
    if isinstance(value, list):
        return [changed(part, kind, change) for part in value]
    return value


def made_ahead(
    make: Make, reader: StoreReader, rows: Iterable[list[int]], workers: int, pinned: bool
) -> Generator[Packed]:
    """``make(reader, numbers)`` for each list of row numbers, by as many processes; 0: when asked
    for. pinned: in pinned memory. What it gives does not depend on workers, and no random state is
    touched. Errors of make are raised here; ResourceError if a process dies.
    """
    if workers and _can_fork(reader):
        return _by_processes(_Batches(make, reader.store, pinned), rows, workers, pinned)

    def made(numbers: list[int]) -> Packed:
        packed = Packed.of(make(reader, numbers), _in_this_process)
        return packed.pin_memory() if pinned else packed

    return read_ahead(made, rows, min(workers, 1))  # a second thread is slower, see StoreReader


def _can_fork(reader: StoreReader) -> bool:
    """Whether forked processes can read this store and hand over what they read."""
    if isinstance(reader.store, RemoteStore):
        return False  # the threads that its requests run in are not in a forked process
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return False  # not Linux
    free = found.f_bavail * found.f_frsize
    expected = _SHARED * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if free < expected:
        warnings.warn(
            f"/dev/shm: {free >> 20} MiB of shared memory are free, expected {expected >> 20}: the "
            f"store is read in a thread, which slows down small students; {_ROOM}",
            stacklevel=2,
        )
    return free >= expected


class _Batches(Dataset[Packed]):
    """What a data worker makes of a list of row numbers: a batch, or the error."""

    def __init__(self, make: Make, store: Store, pinned: bool):
        self.make, self.store = make, store
        self._empty = SharedBlocks().empty if pinned else _shared

    @cached_property
    def reader(self) -> StoreReader:
        """The worker's own: a forked one would share its locks with its parent."""
        return StoreReader(self.store)

    def __getitems__(self, numbers: list[int]) -> Packed | Exception:
        try:
            return Packed.of(self.make(self.reader, numbers), self._empty)
        except Exception as error:  # raised by torch it would lose its kind and its hint
            error.add_note(f"In a data worker:\n{traceback.format_exc()}")
            return error


def _begin(_: int) -> None:
    """In a new process: what stops a run is its parent's business, also where every process of a
    group or a job is told. The parent ends it by other means; if they fail by SIGTERM, at the
    latest a minute later."""
    told: list[int] = []

    def handle(number: int, _frame: Any) -> None:
        if told:
            os._exit(128 + number)
        told.append(number)
        signal.alarm(60)

    gc.freeze()  # what the parent has on a GPU is not for a collector here
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


def _as_it_is(made: Any) -> Any:
    return made


@contextlib.contextmanager
def deaths_explained() -> Iterator[None]:
    """The death of a data worker as ResourceError. torch raises it in the main thread wherever that
    is, which may be in the middle of a step."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ResourceError(
            f"a process that reads the store died: {str(error).strip().splitlines()[0]}",
            "more memory, or --set dataloader_num_workers=0; then the same command again",
        ) from error


def _by_processes(
    dataset: _Batches, rows: Iterable[list[int]], workers: int, pinned: bool
) -> Generator[Packed]:
    loader = DataLoader(
        dataset,
        batch_sampler=rows,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pinned,
        worker_init_fn=_begin,
        generator=torch.Generator(),  # it draws a seed, which must not move the run's own
        multiprocessing_context="fork",
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)  # until _begin
    try:
        made = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        with deaths_explained():
            for packed in made:
                if isinstance(packed, Exception):
                    raise packed
                yield packed
    finally:
        _end(made)  # not left to the last reference: the traceback of an error may hold it


def _end(made: Any) -> None:
    """End the processes of a DataLoader's iterator."""
    # Where torch sees the death of another it raises in the main thread, here too.
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main else None
    try:
        made._shutdown_workers()
    finally:
        for process in made._workers:
            if process.is_alive():  # it had five seconds
                process.kill()
                process.join()
        if in_main:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
