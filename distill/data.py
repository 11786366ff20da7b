"""What a step trains on: the order of rows, and batches that are ready when they are needed.

The order is a function of seed, epoch and step alone. It does not depend on how many processes read
them, nor on how many processes share a batch: the rows of a step are those of one process that
takes them all, whether they are split over processes or accumulated one by one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from logitcache.draws import position_keys
from logitcache.reader import StoreReader, TeacherBatch

from .ahead import Packed, made_ahead
from .student import to_inputs


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch in the order they are trained on: sorted by a hash of each."""
    keys = position_keys(seed % 2**31 + (epoch << 32), np.arange(num_rows, dtype=np.int64))
    return np.argsort(keys, kind="stable")


class RowOrder:
    """Lists of rows, one a micro-batch of this process: a DataLoader's batch_sampler.

    A micro-batch of all processes is a run of rows of the epoch's order, of which each takes its
    part in turn. The last of an epoch may be short: then some processes have fewer rows, or none,
    and no row is trained on twice.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.num_rows, self.batch_size = num_rows, batch_size
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.process_index, self.num_processes = process_index, num_processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        together = self.batch_size * self.num_processes
        return self.num_rows // together if self.drop_last else -(-self.num_rows // together)

    def __iter__(self) -> Iterator[list[int]]:
        order = (
            epoch_order(self.num_rows, self.seed, self.epoch)
            if self.shuffle
            else np.arange(self.num_rows)
        )
        for number in range(len(self)):
            start = (number * self.num_processes + self.process_index) * self.batch_size
            yield order[start : start + self.batch_size].tolist()


class _RowNumbers(Dataset[int]):
    """The rows of a store by number; the feed reads them."""

    def __init__(self, num_rows: int):
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> int:
        return index


def row_loader(order: RowOrder) -> DataLoader[int]:
    """What transformers.Trainer iterates over: lists of row numbers. Going on in the middle of an
    epoch skips numbers, nothing is read for it."""
    return DataLoader(_RowNumbers(order.num_rows), batch_sampler=order, collate_fn=list)


class Feed:
    """Turns lists of row numbers into inputs of the student on its device.

    Processes read and decode ahead of their use. For a GPU the next batch is copied from pinned
    memory by a stream of its own while the step before it computes.
    """

    def __init__(
        self,
        reader: StoreReader,
        temperature: float,
        device: torch.device,
        workers: int,
        more: Callable[[TeacherBatch], dict[str, Any]] = lambda _: {},
    ):
        self.more = more  # inputs of a batch besides those of to_inputs
        self.reader, self.temperature, self.device = reader, temperature, device
        self.workers = workers
        self.seconds_waited = 0.0  # in which the training loop had no batch
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def inputs(self, rows: Iterable[list[int]]) -> Generator[dict[str, Any]]:
        """Inputs of each list, in order; to_inputs says what they are. Besides them num_valid, the
        valid positions, and rows, the list. An empty list gives a batch without valid positions."""
        made = made_ahead(self._make, self.reader, rows, self.workers, self._stream is not None)
        with contextlib.closing(made):
            timed = self._timed(made)
            for packed in timed if self._stream is None else self._on_gpu(timed, self._stream):
                yield packed.inputs()

    def _make(self, reader: StoreReader, rows: list[int]) -> dict[str, Any]:
        batch = reader[rows or [0]]
        inputs = {**to_inputs(batch, self.temperature), **self.more(batch), "rows": rows}
        if not rows:  # this process has no part in the last batch, but must take part in the step
            inputs["labels"].fill_(-100)
            inputs["num_tokens"] = 0
        inputs["num_valid"] = int(np.count_nonzero(inputs["labels"].numpy() != -100))
        return inputs

    def _timed(self, made: Iterator[Packed]) -> Iterator[Packed]:
        while True:
            started = time.perf_counter()
            packed = next(made, None)
            self.seconds_waited += time.perf_counter() - started
            if packed is None:
                return
            yield packed

    def _on_gpu(self, made: Iterator[Packed], stream: torch.cuda.Stream) -> Iterator[Packed]:
        """Copy one batch ahead. The caller's stream waits for the copy, the host for nothing:
        torch keeps pinned memory from use until copies out of it are done."""

        def started() -> tuple[Packed, torch.cuda.Event] | None:
            packed = next(made, None)
            if packed is None:
                return None
            with torch.cuda.stream(stream):
                return packed.to(self.device), stream.record_event()

        ahead = started()
        while ahead is not None:
            packed, copied = ahead
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            # The allocator must not give its memory to the next copy before it was used.
            packed.memory.record_stream(current)
            ahead = started()
            yield packed


def share_of(num_rows: int, batch_size: int, index: int, count: int) -> list[list[int]]:
    """The rows of one of several processes in batches, as many for each: some may be empty."""
    mine = list(range(index, num_rows, count))
    most = -(-num_rows // count)
    batches = -(-most // batch_size)
    return [mine[at * batch_size : (at + 1) * batch_size] for at in range(batches)]
