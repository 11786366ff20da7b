"""A teacher's rows as the loss takes them: padded arrays, and tensors at a temperature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .buffers import Buffers
from .codec import dither_gain
from .support import Support

if TYPE_CHECKING:
    from logitcache_kernels import SparseTeacher

# An entry that was drawn stays one whatever rounding does to its probability.
_MOST_INCLUSION = np.float32(1 - 2**-20)


@dataclass(frozen=True)
class TeacherSupport:
    """One teacher at P positions, decoded. Shapes: K entries, T grid points.

    ids_PK: int32, -1 padding. logp_PK: float32, normalised so that certain entries and tail add up
    to 1. inclusion_PK: float32, 1 = certain; None for top-k supports. flat_PK: bool, sampled
    entries whose inclusion is p / threshold, not p^S / threshold; None for top-k supports. tail_PT,
    entropy_P, top1_logp_P, gold_logp_P: float32. A position without anything stored has ids -1,
    logp -inf and tail -inf.
    """

    ids_PK: np.ndarray
    logp_PK: np.ndarray
    inclusion_PK: np.ndarray | None
    flat_PK: np.ndarray | None
    tail_PT: np.ndarray
    entropy_P: np.ndarray
    top1_logp_P: np.ndarray
    gold_logp_P: np.ndarray
    temperatures: tuple[float, ...]
    sample_temperature: float
    precision: str
    buffers: Buffers = field(repr=False, compare=False)  # for what sparse_teacher makes

    def sparse_teacher(self, temperature: float) -> SparseTeacher:
        """The support as tensors with the log-partition at this temperature.

        The estimate p^T / inclusion of sampled entries has no bias from rounding: see ``codec``.
        """
        import torch

        from logitcache_kernels import SparseTeacher, log_partition

        logp_PK, inclusion_PK = self.logp_PK, self.inclusion_PK
        if inclusion_PK is None:
            certain_PK = self.ids_PK >= 0
        else:
            certain_PK = inclusion_PK >= 1  # 0 where there is no entry
            logp_PK, inclusion_PK = self._weighted(temperature, certain_PK)
        # Certain entries come first; columns that hold none take as long as others.
        columns = np.flatnonzero(certain_PK.any(0))
        width = int(columns[-1]) + 1 if len(columns) else 1
        certain = torch.from_numpy(certain_PK[:, :width])
        partition_P = log_partition(
            torch.from_numpy(self.logp_PK[:, :width]),
            certain,
            torch.from_numpy(self.tail_PT),
            temperature,
            self.temperatures,
        )
        partition_P = torch.where(certain.any(-1), partition_P, 0.0)
        return SparseTeacher(
            torch.from_numpy(self.ids_PK),
            torch.from_numpy(logp_PK),
            partition_P,
            torch.from_numpy(self.entropy_P),
            None if inclusion_PK is None else torch.from_numpy(inclusion_PK),
        )

    def _weighted(
        self, temperature: float, certain_PK: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """logp and inclusion such that p^T / inclusion is the unbiased weight, and inclusion below
        1: where it would not be, logp gives way."""
        assert self.inclusion_PK is not None
        assert self.flat_PK is not None
        tempered = dither_gain(1 / temperature - 1 / self.sample_temperature, self.precision)
        flat = dither_gain(1 / temperature - 1, self.precision)
        # In as few passes, and as little new memory, as there can be.
        raised_PK = self.buffers.full(self.inclusion_PK.shape, tempered, np.float32)
        np.copyto(raised_PK, np.float32(flat), where=self.flat_PK)
        raised_PK *= self.inclusion_PK
        np.copyto(raised_PK, np.float32(1), where=certain_PK)
        over_PK = raised_PK > _MOST_INCLUSION
        over_PK ^= certain_PK
        logp_PK = self.logp_PK
        if over_PK.any():
            logp_PK = self.buffers.copy(logp_PK)
            logp_PK[over_PK] -= temperature * np.log(raised_PK[over_PK])
            raised_PK[over_PK] = _MOST_INCLUSION
        return logp_PK, raised_PK


def side_by_side(
    supports: Sequence[Support],
    attributes: Mapping[str, Any],
    temperatures: tuple[float, ...],
    length: int,
    buffers: Buffers | None = None,
) -> TeacherSupport:
    """Rows of ``length`` positions as one, as wide as the widest position."""
    buffers = buffers or Buffers()
    totals = [s.certain.count_P + (0 if s.sampled is None else s.sampled.count_P) for s in supports]
    width = max([1, *(int(total.max(initial=0)) for total in totals)])
    shape = (len(supports) * length, width)
    sampled = attributes["estimator"] == "sampled"
    ids_PK = buffers.full(shape, -1, np.int32)
    logp_PK = buffers.full(shape, -np.inf, np.float32)
    inclusion_PK = buffers.full(shape, 0, np.float32) if sampled else None
    flat_PK = buffers.full(shape, False, bool) if sampled else None
    for number, support in enumerate(supports):
        part = slice(number * length, (number + 1) * length)
        ids, logp = ids_PK[part].reshape(-1), logp_PK[part].reshape(-1)
        at = np.arange(length) * width
        places = _places(at, support.certain.count_P)
        ids[places] = support.certain.ids
        logp[places] = support.certain.logp
        if support.sampled is None:
            continue
        assert inclusion_PK is not None
        assert flat_PK is not None
        inclusion, flat = inclusion_PK[part].reshape(-1), flat_PK[part].reshape(-1)
        inclusion[places] = 1.0
        places = _places(at + support.certain.count_P, support.sampled.count_P)
        ids[places] = support.sampled.ids
        logp[places] = support.sampled.logp
        flat[places] = support.sampled.flat
        inclusion[places] = _inclusion(attributes, support, temperatures)
    fields = [support.fields for support in supports]
    grid = np.zeros((0, len(temperatures)), np.float32)

    def joined(name: str) -> np.ndarray:
        parts = [getattr(each, name) for each in fields]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    return TeacherSupport(
        ids_PK,
        logp_PK,
        inclusion_PK,
        flat_PK,
        joined("tail_PT") if fields else grid,
        joined("entropy_P"),
        joined("top1_P"),
        joined("gold_P"),
        temperatures,
        float(attributes.get("sample_temperature", 1.0)),
        attributes["precision"],
        buffers,
    )


def _inclusion(
    attributes: Mapping[str, Any], support: Support, temperatures: tuple[float, ...]
) -> np.ndarray:
    """With what probability each sampled entry was kept, float32 [E], below 1."""
    temperature = np.float32(attributes["sample_temperature"])
    certain, sampled = support.certain, support.sampled
    assert sampled is not None
    assert sampled.flat is not None
    total_P = np.exp(_tail(support.fields.tail_PT, float(temperature), temperatures))
    has = certain.count_P > 0
    if len(certain.logp):
        starts = (certain.count_P.cumsum() - certain.count_P)[has]
        total_P[has] += np.add.reduceat(np.exp(certain.logp / temperature), starts)
    partition_P = np.log(total_P, where=has, out=np.zeros_like(total_P))
    tempered = sampled.logp / temperature - np.repeat(partition_P, sampled.count_P)
    np.copyto(tempered, sampled.logp, where=sampled.flat)
    inclusion = np.exp(tempered, out=tempered)
    inclusion /= np.float32(attributes["threshold"])
    return np.minimum(inclusion, _MOST_INCLUSION, out=inclusion)


def _tail(tail_PT: np.ndarray, temperature: float, temperatures: tuple[float, ...]) -> np.ndarray:
    """G(temperature), which need not be on the grid."""
    if temperature in temperatures:
        return tail_PT[:, temperatures.index(temperature)]
    from logitcache_kernels.log_partition import spline_weights

    weights = spline_weights(temperature, temperatures).numpy().astype(np.float32)
    empty_P = np.atleast_1d(np.isneginf(tail_PT).any(1))
    tail_P = np.where(empty_P[:, None], 0, tail_PT) @ weights
    tail_P[empty_P] = -np.inf
    return tail_P


def _places(starts_P: np.ndarray, count_P: np.ndarray) -> np.ndarray:
    """Where each entry goes: starts_P[p], starts_P[p] + 1, ... for the count_P[p] of position p."""
    before_P = count_P.cumsum() - count_P
    return np.arange(int(count_P.sum())) + np.repeat(starts_P - before_P, count_P)
