"""One teacher's pass over the rows: forward and capture; behind them, in a thread of its own, what
was captured is fetched, and behind that shards are encoded and written, while the next batch runs.

Memory: the captures of three batches at most wait or are being fetched, and the supports of two
shards, of which one is being written.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from logitcache_kernels import Capture, capture

from .causal_lm import (
    Head,
    check_model,
    choose_device,
    choose_dtype,
    hidden_states,
    load_causal_lm,
)
from .config import BuildConfig
from .errors import NonFiniteError, StoreError, UsageError
from .fetch import fetch
from .packed_attention import longest_segment, segment_bounds, use_varlen
from .packing import Rows
from .several import loading_options, refuse_offloaded
from .store import Store
from .support import Support, support_of
from .writing import write_teacher

# Logits of one chunk: capture on a CPU is three times faster when its temporaries fit the cache; a
# GPU wants some thousand rows of them (1 GiB in 16 bits).
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**29}
BATCH_TOKENS = {"cpu": 2**12, "cuda": 2**15}


@dataclass(frozen=True)
class _Captured:
    """A batch of rows whose capture has been launched: its parts, and the event after them.

    at_row, at_token: of each captured position, the row's place in the batch and the token.
    """

    batch: list[int]
    at_row: np.ndarray
    at_token: np.ndarray
    parts: list[Capture]
    done: torch.cuda.Event | None


@dataclass
class _Made:
    """What has been fetched of a shard's rows, and sums over them."""

    parts: dict[int, Support] = field(default_factory=dict)
    totals: dict[str, Any] = field(
        default_factory=lambda: {"positions": 0, "entries": 0, "certain_mass": 0.0, "skipped": 0}
    )


class _Behind:
    """A thread that does one thing after the other, up to the first that fails; ``most`` may wait
    or be under way when the next is given to it. Its errors come out here."""

    def __init__(self, name: str, most: int):
        self._name, self._most = name, most
        self.failed = False

    def __enter__(self) -> _Behind:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        self._waiting: deque[Future[None]] = deque()
        return self

    def do(self, action: Callable[..., None], *arguments: Any) -> None:
        while len(self._waiting) > self._most or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._do, action, *arguments))

    def _do(self, action: Callable[..., None], *arguments: Any) -> None:
        if self.failed:
            return
        try:
            action(*arguments)
        except BaseException:
            self.failed = True
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            for future in self._waiting:
                future.cancel()
        self._pool.shutdown(wait=True)
        if error is None:
            for future in self._waiting:
                future.result()


class TeacherRun:
    """Holds the one model that is in memory; close() lets it go."""

    def __init__(
        self,
        folder: Path,
        name: str,
        store: Store,
        rows: Rows,
        config: BuildConfig,
        report: Callable[[str, int, int, int, int], None] | None,
        writes: bool = True,
    ):
        self.writes = writes  # else it computes its shards of the layers for one that does
        self.folder, self.name, self.store = folder, name, store
        self.rows, self.config = rows, config
        self.report = report or (lambda *_: None)
        self.device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, self.device)
        several = loading_options(config)
        self.model = load_causal_lm(folder, dtype, self.device, **several)
        if not several:
            use_varlen(self.model)
        refuse_offloaded(self.model, folder)
        self.head = Head.of(self.model)
        self._first_device = self.model.get_input_embeddings().weight.device
        if several and self.head.weight_VD.device.type != "meta":
            self.device = self.head.weight_VD.device  # where logits are, and captured
        if self.device.index is not None and self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # kernels and events go to the current one
        vocab_size, width = store.manifest["vocab_size"], self.head.weight_VD.shape[0]
        if width < vocab_size:
            raise StoreError(
                f"{folder}: {name} has {width} output rows, its tokenizer {vocab_size} tokens",
                "resize its embeddings, or use the tokenizer that belongs to it",
            )
        check_model(self.model, folder)
        self.labels, self.positions = rows.labels(), rows.positions()
        self.lengths = rows.lengths()
        self.tokens_total = int(self.lengths.sum())
        missing = [store.ranges[shard] for shard in store.missing(name)]
        self.tokens_done = self.tokens_total - sum(
            int(self.lengths[start:stop].sum()) for start, stop in missing
        )
        self.bytes_written = 0
        self._reporting = threading.Lock()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._report(-1)

    def close(self) -> None:
        """Free the model's memory before the next teacher is loaded."""
        self.model = self.head = None  # type: ignore[assignment]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def shards(self, shards: Sequence[int], stopped: Callable[[], bool]) -> int:
        """Run the teacher over shards and commit each; how many, if stopped before the last."""
        with _Behind("store-writer", 0) as writer, _Behind("store-fetcher", 2) as fetcher:
            for number, shard in enumerate(shards):
                made = _Made()
                for batch in self.batches(*self.store.ranges[shard]):
                    if stopped() or writer.failed:  # whose error comes out at the end
                        return number
                    if not self.writes:
                        self.forward(batch)
                        continue
                    fetcher.do(self._fetch, self.forward(batch, self._capture), made, shard)
                if self.writes:
                    fetcher.do(writer.do, self._commit, shard, made)
        return len(shards)

    def supports(
        self, start: int, stop: int, stopped: Callable[[], bool]
    ) -> tuple[list[Support], dict[str, Any]] | None:
        """What is kept of rows, and sums over them; None if stopped before the last."""
        made = _Made()
        for batch in self.batches(start, stop):
            if stopped():
                return None
            self._fetch(self.forward(batch, self._capture), made, -1)
        return [made.parts[row] for row in range(start, stop)], made.totals

    def _commit(self, shard: int, made: _Made) -> None:
        supports = [made.parts[row] for row in range(*self.store.ranges[shard])]
        totals = {**made.totals, "certain_mass": round(made.totals["certain_mass"], 6)}
        write_teacher(self.store, self.name, shard, supports, totals)
        record = self.store.commit(self.name, shard)
        assert record is not None
        self.bytes_written += sum(file["bytes"] for file in record["files"].values())
        self._report(shard)

    def batches(self, start: int, stop: int) -> list[list[int]]:
        """Rows of a shard in batches of like length, longest first; the same for every run."""
        budget = self.config.batch_tokens or BATCH_TOKENS[self.device.type]
        order = sorted(range(start, stop), key=lambda row: (-self.lengths[row], row))
        batches: list[list[int]] = []
        for row in order:
            if not batches or (len(batches[-1]) + 1) * self.lengths[batches[-1][0]] > budget:
                batches.append([])
            batches[-1].append(row)
        return batches

    @torch.inference_mode()
    def forward(self, batch: list[int], use: Callable[..., Capture] | None = None) -> _Captured:
        """Run the teacher over a batch of rows, and ``use`` on the logits of each chunk of its
        labelled positions. Nothing here waits for the GPU."""
        length = max(int(self.lengths[batch[0]]), 1)
        positions = self.positions[batch][:, :length]
        bounds = segment_bounds(positions)
        hidden_BLD = hidden_states(
            self.model,
            self._on_device(self.rows.tokens[batch][:, :length].astype(np.int64)).to(
                self._first_device
            ),
            self._on_device(positions).to(self._first_device),
            self._on_device(bounds).to(self._first_device),
            longest_segment(bounds),
        ).to(self.device)
        labels = self.labels[batch][:, :length]
        at_row, at_token = np.nonzero(labels != -100)
        hidden_PD = hidden_BLD.flatten(0, 1)[self._on_device(at_row * length + at_token)]
        labels_P = self._on_device(labels[at_row, at_token])
        position_ids_P = self._on_device(np.asarray(batch)[at_row] * self.config.seq_len + at_token)
        # In chunks of positions, so that P x V logits never exist at once.
        chunk = max(CHUNK_ELEMENTS[self.device.type] // self.head.weight_VD.shape[0], 16)
        parts = []
        for start in range(0, max(len(hidden_PD), 1), chunk):
            part = slice(start, start + chunk)
            logits_RV = self.head.logits(hidden_PD[part])
            if use is not None:
                parts.append(use(logits_RV, labels_P[part], position_ids_P[part]))
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return _Captured(batch, at_row, at_token, parts, done)

    def _capture(
        self, logits_RV: torch.Tensor, labels_R: torch.Tensor, position_ids_R: torch.Tensor
    ) -> Capture:
        return capture(
            logits_RV,
            labels_R=labels_R,
            num_tokens=self.store.manifest["vocab_size"],
            temperatures=self.store.manifest["temperatures"],
            position_ids_R=position_ids_R,
            **capture_options(self.store.teachers[self.name]),
        )

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        """Copy numbers to the device, from pinned memory: other copies wait for what runs there."""
        tensor = torch.from_numpy(values)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _fetch(self, launched: _Captured, made: _Made, shard: int) -> None:
        """Add what is kept of each row of a batch to what is made of its shard."""
        if launched.done is not None:
            launched.done.synchronize()
        # Beside the stream in which the next batch runs already.
        captured = fetch(launched.parts, self._stream)
        self._check(captured, launched)
        kept = captured["count"] >= 0
        totals = made.totals
        totals["positions"] += int(kept.sum())
        totals["entries"] += int(captured["count"][kept].sum())
        totals["certain_mass"] += float(
            np.exp(captured["logp"][captured["certain"]], dtype=np.float64).sum()
        )
        totals["skipped"] += int((~kept).sum())
        ends = np.searchsorted(launched.at_row, np.arange(len(launched.batch) + 1))
        for row, start, stop in zip(launched.batch, ends, ends[1:], strict=False):
            made.parts[row] = support_of(
                {name: values[start:stop] for name, values in captured.items()},
                launched.at_token[start:stop],
                self.config.seq_len,
                self.store.teachers[self.name],
            )
        self.tokens_done += int(self.lengths[launched.batch].sum())
        self._report(shard)

    def _report(self, shard: int) -> None:
        with self._reporting:  # both threads do
            self.report(self.name, self.tokens_done, self.tokens_total, self.bytes_written, shard)

    def _check(self, captured: dict[str, np.ndarray], launched: _Captured) -> None:
        bad = np.flatnonzero(captured["count"] < 0)
        if len(bad) and self.config.on_nonfinite == "fail":
            row, token = launched.batch[launched.at_row[bad[0]]], launched.at_token[bad[0]]
            raise NonFiniteError(
                f"{self.folder}: {self.name}: NaN or infinity in the logits at row "
                f"{row}, token {token} "
                f"({len(bad)} positions of this batch; weights "
                f"{next(self.model.parameters()).dtype})",
                "use --set dtype=float32, or --on-nonfinite skip to leave such positions out",
            )
        most = self.store.teachers[self.name]["max_entries"]
        if int(captured["count"].max(initial=0)) > most:
            raise UsageError(
                f"{self.name}: a position keeps {captured['count'].max()} entries, "
                f"{most} can be stored",
                "raise --min-prob or --threshold",
            )


def capture_options(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``capture`` that a teacher's attributes hold."""
    keys = ("estimator", "min_prob", "threshold", "sample_temperature", "top_k", "seed")
    return {key: attributes[key] for key in keys if key in attributes}
