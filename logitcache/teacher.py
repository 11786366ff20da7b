"""One teacher's pass over the rows: forward, capture, encode, write shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
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
from .packing import Rows
from .store import Store, write_teacher
from .support import Support, support_of

# Logits of one chunk: capture on a CPU is three times faster when its temporaries fit the cache.
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**28}
BATCH_TOKENS = {"cpu": 2**12, "cuda": 2**15}


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
    ):
        self.folder, self.name, self.store = folder, name, store
        self.rows, self.config = rows, config
        self.report = report or (lambda *_: None)
        self.device = choose_device(config.device)
        if self.device.index is not None and self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # kernels are launched on the current one
        dtype = choose_dtype(config.dtype, self.device)
        self.model = load_causal_lm(folder, dtype, self.device)
        self.head = Head.of(self.model)
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
        self.report(self.name, self.tokens_done, self.tokens_total, 0, -1)

    def close(self) -> None:
        """Free the model's memory before the next teacher is loaded."""
        self.model = self.head = None  # type: ignore[assignment]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def shard(self, shard: int, stopped: Callable[[], bool]) -> bool:
        """Run the teacher over one shard's rows and commit it; False if stopped before that."""
        made = self.supports(*self.store.ranges[shard], stopped, shard)
        if made is None:
            return False
        write_teacher(self.store, self.name, shard, *made)
        record = self.store.commit(self.name, shard)
        assert record is not None
        self.bytes_written += sum(file["bytes"] for file in record["files"].values())
        self.report(self.name, self.tokens_done, self.tokens_total, self.bytes_written, shard)
        return True

    def supports(
        self, start: int, stop: int, stopped: Callable[[], bool], shard: int = -1
    ) -> tuple[list[Support], dict[str, Any]] | None:
        """What is kept of rows, and sums over them; None if stopped before the last."""
        parts: dict[int, Support] = {}
        totals = {"positions": 0, "entries": 0, "certain_mass": 0.0, "skipped": 0}
        for batch in self._batches(start, stop):
            if stopped():
                return None
            for row, part in zip(batch, self._run(batch, totals), strict=True):
                parts[row] = part
            self.tokens_done += int(self.lengths[batch].sum())
            self.report(self.name, self.tokens_done, self.tokens_total, self.bytes_written, shard)
        totals["certain_mass"] = round(totals["certain_mass"], 6)
        return [parts[row] for row in range(start, stop)], totals

    def _batches(self, start: int, stop: int) -> list[list[int]]:
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
    def _run(self, batch: list[int], totals: dict[str, Any]) -> list[Support]:
        """What is kept of each row of a batch."""
        length = max(int(self.lengths[batch[0]]), 1)
        seq_len = self.config.seq_len
        tokens = torch.from_numpy(self.rows.tokens[batch][:, :length].astype(np.int64))
        positions = torch.from_numpy(self.positions[batch][:, :length])
        hidden_BLD = hidden_states(self.model, tokens.to(self.device), positions.to(self.device))
        labels = self.labels[batch][:, :length]
        at_row, at_token = np.nonzero(labels != -100)
        position_ids = np.asarray(batch)[at_row] * seq_len + at_token
        hidden_PD = hidden_BLD[torch.from_numpy(at_row), torch.from_numpy(at_token)]
        captured = self._capture(
            hidden_PD, torch.from_numpy(labels[at_row, at_token]), torch.from_numpy(position_ids)
        )
        kept = captured["count"] >= 0
        self._check(captured, position_ids, seq_len)
        totals["positions"] += int(kept.sum())
        totals["entries"] += int((captured["ids"] >= 0).sum())
        totals["certain_mass"] += float(
            np.where(captured["certain"], np.exp(captured["logp"].astype(np.float64)), 0.0).sum()
        )
        totals["skipped"] += int((~kept).sum())
        return [
            support_of(
                {name: values[at_row == number] for name, values in captured.items()},
                at_token[at_row == number],
                seq_len,
                self.store.teachers[self.name],
            )
            for number in range(len(batch))
        ]

    def _capture(
        self, hidden_PD: torch.Tensor, labels_P: torch.Tensor, position_ids_P: torch.Tensor
    ) -> dict[str, np.ndarray]:
        """Capture in chunks of positions, so that P x V logits never exist at once."""
        options = capture_options(self.store.teachers[self.name])
        chunk = max(CHUNK_ELEMENTS[self.device.type] // self.head.weight_VD.shape[0], 16)
        parts: list[dict[str, np.ndarray]] = []
        for start in range(0, len(hidden_PD), chunk):
            rows = slice(start, start + chunk)
            parts.append(
                to_numpy(
                    capture(
                        self.head.logits(hidden_PD[rows]),
                        labels_R=labels_P[rows].to(self.device),
                        num_tokens=self.store.manifest["vocab_size"],
                        temperatures=self.store.manifest["temperatures"],
                        position_ids_R=position_ids_P[rows].to(self.device),
                        **options,
                    )
                )
            )
        if not parts:
            grid = len(self.store.manifest["temperatures"])
            none, wide = np.zeros(0, np.float32), np.zeros((0, 1), np.float32)
            return {
                "ids": wide.astype(np.int32),
                "logp": wide,
                "inclusion": wide,
                "certain": wide.astype(bool),
                "count": np.zeros(0, np.int32),
                "tail": np.zeros((0, grid), np.float32),
                **dict.fromkeys(("entropy", "top1", "gold"), none),
            }
        width = max(part["ids"].shape[1] for part in parts)
        fill = {"ids": -1, "logp": -np.inf, "inclusion": 0, "certain": False}
        for part in parts:
            for key, value in fill.items():
                missing = width - part[key].shape[1]
                part[key] = np.pad(part[key], ((0, 0), (0, missing)), constant_values=value)
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _check(
        self, captured: dict[str, np.ndarray], position_ids: np.ndarray, seq_len: int
    ) -> None:
        bad = np.flatnonzero(captured["count"] < 0)
        if len(bad) and self.config.on_nonfinite == "fail":
            row, token = divmod(int(position_ids[bad[0]]), seq_len)
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


def to_numpy(captured: Capture) -> dict[str, np.ndarray]:
    """Move what the store keeps to the CPU, cut to the widest support."""
    width = max(int(captured.count_R.max()) if len(captured.count_R) else 1, 1)
    return {
        "ids": captured.ids_RK[:, :width].cpu().numpy(),
        "logp": captured.logp_RK[:, :width].float().cpu().numpy(),
        "inclusion": captured.inclusion_RK[:, :width].float().cpu().numpy(),
        "certain": (captured.inclusion_RK[:, :width] >= 1).cpu().numpy(),
        "count": captured.count_R.cpu().numpy(),
        "tail": captured.tail_log_partition_RT.float().cpu().numpy(),
        "entropy": captured.entropy_R.float().cpu().numpy(),
        "top1": captured.top1_logp_R.float().cpu().numpy(),
        "gold": captured.gold_logp_R.float().cpu().numpy(),
    }
