"""Loss by source of a store: how a student does on each of the files that the store was built from.

Sums travel with those of the whole loss: made on the device inside forward(), added up over
micro-batches and processes, read when a record is logged. So they are exact, and cost no step a
wait of its own. A store of one source has none of this.

Legend: R positions, S sources.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from logitcache import StoreReader
from logitcache.reader import TeacherBatch

log = logging.getLogger(__name__)
MOST_SOURCES = 64  # of a log record: a store of many small files is one text in many pieces


def reported_sources(reader: StoreReader) -> tuple[str, ...]:
    """Names of the sources whose loss is reported: all of them, or none if there is one only."""
    names = reader.source_names
    if len(names) > MOST_SOURCES:
        log.warning(
            "%s: %d sources: no loss by source is logged (of %d at most)",
            *(reader.store.path, len(names), MOST_SOURCES),
        )
    return names if 1 < len(names) <= MOST_SOURCES else ()


def source_inputs(reader: StoreReader, batch: TeacherBatch, num: int) -> dict[str, Any]:
    """Arguments of the student's forward: the source of each position, int64 [B, L] (-1 is
    padding), and how many there are; nothing where none is reported."""
    if not num:
        return {}
    return {"sources": torch.from_numpy(reader.source_numbers(batch.rows)), "num_sources": num}


def source_sums(
    loss_R: torch.Tensor, valid_R: torch.Tensor, sources_R: torch.Tensor, num: int
) -> torch.Tensor:
    """Valid positions and summed loss of each source, float64 [2 S], without a wait for the device
    and in a fixed order of addition."""
    member_SR = sources_R[None, :] == torch.arange(num, device=sources_R.device)[:, None]
    member_SR &= valid_R
    loss_SR = torch.where(member_SR, loss_R.double(), 0.0)
    return torch.cat((member_SR.sum(1).double(), loss_SR.sum(1)))


def source_metrics(sums: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """``source_loss/NAME`` of every source with a valid position, in nats per valid position."""
    values = sums.tolist()
    counts, losses = values[: len(names)], values[len(names) :]
    return {
        f"source_loss/{name}": loss / count
        for name, count, loss in zip(names, counts, losses, strict=True)
        if count
    }
