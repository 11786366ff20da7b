"""Probabilities as one byte: level tables, and dither for sampled entries. Imports no torch.

A level table is uniform in sqrt(p) (the Fisher metric: an error there weighs the same in KL
whatever p is) down to the probability where such a step is ``nats`` wide, and uniform in log p
below. Level x stands for what rounds to it,

    sqrt(p) = 1 - x step                           for x <= x0 = (1 - 2 step / nats) / step
    log p = 2 log(2 step / nats) - nats (x - x0)   beyond,

and decodes to a little less than that, sqrt(p) - step^2 / (8 sqrt(p)), log p - nats^2 / 24: small
probabilities are more frequent than large ones, so the mean of a cell lies below its middle. (Half
of what Zipf's law says; sums over the entries of real teachers are nearest the truth with it.)

Error bound: |sqrt(p') - sqrt(p)| <= step / 2 + step nats / 16 above the bend; |log p' - log p| <=
nats / 2 + nats^2 / 24 below it, down to the last level of the table (about -30 nats).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

LEVELS = 256
_KEPT = 1 << 18  # of the dither
_WEYL = 0x9E3779B9  # 2^32 divided by the golden ratio: its multiples fill [0, 2^32) evenly


@dataclass(frozen=True)
class LevelTable:
    """Levels ``first`` to 255; those below ``first`` mean something else to whoever uses it."""

    step: float
    nats: float
    first: int = 0

    @cached_property
    def _bend(self) -> tuple[float, float]:
        """Level and log p where the two halves meet."""
        sqrt_p = 2 * self.step / self.nats
        return (1 - sqrt_p) / self.step, 2 * float(np.log(sqrt_p))

    @cached_property
    def logp(self) -> np.ndarray:
        """What each level decodes to, float32 [256]; 0 below ``first``."""
        level = np.arange(LEVELS) - float(self.first)
        bend, logp = self._bend
        root = np.maximum(1 - np.clip(level, 0, bend) * self.step, self.step / 2)
        root -= self.step**2 / (8 * root) * (level > 0)
        line = logp - self.nats * (level - bend) - self.nats**2 / 24
        table = np.where(level <= bend, 2 * np.log(root), line)
        return np.where(level < 0, 0.0, table).astype(np.float32)

    def encode(self, logp: np.ndarray) -> np.ndarray:
        """Nearest levels, uint8; -inf gets the last one. NaN is the caller's mistake."""
        bend, bend_logp = self._bend
        at_bend = np.float32(bend + self.first + 0.5)
        # Both halves everywhere, each cut off at the bend: to select some of them takes longer.
        level = np.float32(0.5) * logp
        np.exp(level, out=level)
        level /= np.float32(self.step)
        np.subtract(1 / self.step + self.first + 0.5, level, out=level)
        np.clip(level, self.first, at_bend, out=level)
        lowest = bend_logp - self.nats * (LEVELS - 0.5 - float(at_bend))
        line = np.clip(logp, np.float32(lowest), np.float32(bend_logp))
        np.subtract(bend_logp, line, out=line)
        line /= np.float32(self.nats)
        level += line
        return level.astype(np.uint8)


# Top-1 and gold logp: +-0.004 of sqrt(p), or +-1/16 nat below p = 1/64; down to -22 nats.
FINE = LevelTable(1 / 128, 1 / 8)
ABSENT = LEVELS - 1  # of FINE, as gold logp: there is none


def dither(count: int, start: int = 0) -> np.ndarray:
    """Numbers ``start`` and up of a fixed sequence that fills [-1/2, 1/2) evenly, float32 [count].

    What is rounded after adding one of them and decoded by taking it off again has an error that
    does not depend on the value: rounding adds variance to an estimate, and no bias.
    """
    if start + count <= _KEPT:
        return _kept()[start : start + count]
    return _dither(start, count)


def _dither(start: int, count: int) -> np.ndarray:
    index = np.arange(start, start + count, dtype=np.uint32)
    index *= np.uint32(_WEYL)
    index >>= np.uint32(8)
    return index.astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)


@cache
def _kept() -> np.ndarray:
    """The sequence's beginning, made once: as long as any usual row needs."""
    kept = _dither(0, _KEPT)
    kept.flags.writeable = False
    return kept
