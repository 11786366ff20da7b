"""What is kept of a position besides its entries, a byte or two each. Imports no torch.

    top1     level of ``levels.FINE``
    gold     (level of FINE - top1's) mod 256; FINE's ABSENT, where there is no gold label
    entropy  (round(16 entropy) - 3 top1 / 4, rounded down) mod 256
    floor    level that the certain entries count down from, see ``codec`` (plain top-k only)
    G(T)     round(G / step + d) minus what earlier ones predict, d the position's dither, as a
             sign-last number (0, -1, 1, -2, ... as 0, 1, 2, 3, ...), plus 1; 0 is minus infinity,
             an empty tail. Low and high byte are a field each, the latter nearly always 0.

Error bounds: top-1 and gold as in ``levels``; entropy 1/32 nat up to 15.9 nats; G(1) half its step,
and above T = 1 half a step of F (see encode_fields).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .levels import ABSENT, FINE, dither

ENTROPY_STEPS = 16
_G_MOST = 32000  # in steps: beyond, G is cut off


@dataclass(frozen=True)
class TailStep:
    """How G at one temperature is kept: q = round(G / step), predicted from earlier temperatures'
    q as (sum weight * q + constant) >> 8."""

    temperature: float
    per_nat: int
    weights: tuple[tuple[float, int], ...] = ()
    constant: int = 0


# Least-squares predictions on SmolLM2-135M (2026-11), rounded: the mean of what is left is 0.3 to 1
# byte. Any store's G is exact to its step whatever they are.
_CHAIN = (
    TailStep(1.0, 32, (), -256 * 112),
    TailStep(2.0, 64, ((1.0, 348),), 256 * 270),
    TailStep(4.0, 64, ((1.0, -74), (2.0, 188)), 256 * 257),
    TailStep(1.5, 128, ((1.0, 229), (2.0, 646), (4.0, -364)), 256 * 302),
    TailStep(3.0, 64, ((2.0, 52), (4.0, 241)), -256 * 95),
    TailStep(0.5, 8, ((1.0, 183), (1.5, -28)), -256 * 10),
)


def tail_steps(temperatures: Sequence[float], precision: str) -> tuple[TailStep, ...]:
    """The steps of a grid of temperatures, in the order in which they are predicted."""
    finer = 1 if precision == "standard" else 4
    if {step.temperature for step in _CHAIN} != {float(t) for t in temperatures}:
        return tuple(TailStep(float(t), 64 * finer) for t in temperatures)
    return tuple(
        TailStep(step.temperature, step.per_nat * finer, step.weights, step.constant * finer)
        for step in _CHAIN
    )


def field_names(steps: Sequence[TailStep], floor: bool) -> list[str]:
    """Names of the fields in their order in a store."""
    names = ["top1", "gold", "entropy", *(["floor"] if floor else [])]
    tails = [f"tail_{step.temperature:g}" for step in steps]
    return names + tails + [f"{tail}_high" for tail in tails]


@dataclass(frozen=True)
class Fields:
    """Shapes: P positions, T temperatures of the grid in its own order. All float32.

    tail_PT: G(T), -inf for an empty tail. entropy_P: nats. gold_P: NaN where there is none.
    """

    tail_PT: np.ndarray
    entropy_P: np.ndarray
    top1_P: np.ndarray
    gold_P: np.ndarray


@dataclass(frozen=True)
class CertainLogp:
    """logp of all certain entries, exact and as a reader finds them; count_P of them a position."""

    count_P: np.ndarray
    exact: np.ndarray
    found: np.ndarray

    def sums(self, logp: np.ndarray, temperature: float) -> np.ndarray:
        """Sum of exp(logp / temperature) at each position, 0 where there are none."""
        total_P = np.zeros(len(self.count_P), np.float32)
        has = self.count_P > 0
        if len(logp):
            starts = (self.count_P.cumsum() - self.count_P)[has]
            total_P[has] = np.add.reduceat(np.exp(logp * np.float32(1 / temperature)), starts)
        return total_P


def top1_levels(top1_P: np.ndarray, kept_P: np.ndarray) -> np.ndarray:
    """Levels of the top-1 entries' logp; a reader finds FINE.logp of them."""
    return np.minimum(FINE.encode(np.where(kept_P, top1_P, 0)), ABSENT - 1)


def encode_fields(
    fields: Fields,
    certain: CertainLogp,
    floor_P: np.ndarray | None,
    temperatures: Sequence[float],
    precision: str,
) -> np.ndarray:
    """Give uint8 [fields, P], zero where nothing is kept.

    Above T = 1 the stored G also makes up for the rounding of the certain entries, as far as that
    is less than half of the tail: so F(T), which is what G is for, is right to a step.
    """
    kept_P = certain.count_P > 0
    steps = tail_steps(temperatures, precision)
    names = field_names(steps, floor_P is not None)
    out = np.zeros((len(names), len(kept_P)), np.uint8)
    out[0] = top1 = top1_levels(fields.top1_P, kept_P)
    gold = np.minimum(FINE.encode(np.nan_to_num(fields.gold_P, nan=0.0)), ABSENT - 1)
    out[1] = np.where(np.isnan(fields.gold_P), ABSENT, gold) - top1
    entropy = np.rint(np.clip(np.nan_to_num(fields.entropy_P), 0, 15.9) * ENTROPY_STEPS)
    out[2] = entropy.astype(np.uint8) - _three_quarters(top1)
    if floor_P is not None:
        out[3] = floor_P
    known: dict[float, np.ndarray] = {}
    noise = dither(len(kept_P))
    empty = ~np.isfinite(fields.tail_PT).all(1)
    shift_P: np.ndarray | None = None
    for step in steps:
        temperature = step.temperature
        tail = fields.tail_PT[:, list(temperatures).index(temperature)]
        tail = np.where(empty, np.float32(0), tail)
        if shift_P is not None and temperature > 1:
            shift = shift_P / np.float32(temperature)
            missing = certain.sums(certain.exact, temperature)
            missing -= certain.sums(certain.found, temperature) * np.exp(-shift)
            tail = tail + shift + np.log1p(np.clip(missing * np.exp(-tail), -0.5, 0.5))
        q = np.rint(tail * np.float32(step.per_nat) + noise)
        q = np.clip(q, -_G_MOST, _G_MOST).astype(np.int32)
        q[empty] = 0
        known[temperature] = q
        if temperature == 1:
            found = np.where(empty, 0, np.exp((q - noise) / np.float32(step.per_nat)))
            total_P = certain.sums(certain.found, 1.0) + found
            shift_P = np.log(total_P, where=kept_P, out=np.zeros_like(total_P))
        left = q - _predicted(step, known)
        code = np.clip(np.where(left < 0, -2 * left - 1, 2 * left) + 1, 1, 65535)
        code = np.where(empty, 0, code)
        name = f"tail_{temperature:g}"
        out[names.index(name)] = code & 255
        out[names.index(f"{name}_high")] = code >> 8
    out[:, ~kept_P] = 0
    return out


def decode_fields(
    out: np.ndarray, temperatures: Sequence[float], precision: str, floor: bool
) -> tuple[Fields, np.ndarray | None]:
    """Undo encode_fields; also the floors, if there are any. What is not kept decodes to numbers
    without meaning, and an empty tail."""
    steps = tail_steps(temperatures, precision)
    names = field_names(steps, floor)
    top1, gold = out[0], out[1] + out[0]
    gold_P = np.where(gold == ABSENT, np.float32(np.nan), FINE.logp.take(gold))
    entropy_P = (out[2] + _three_quarters(top1)).astype(np.float32) / np.float32(ENTROPY_STEPS)
    tail_PT = np.empty((out.shape[1], len(temperatures)), np.float32)
    known: dict[float, np.ndarray] = {}
    noise = dither(out.shape[1])
    for step in steps:
        name = f"tail_{step.temperature:g}"
        code = out[names.index(name)].astype(np.int32)
        high = out[names.index(f"{name}_high")]
        if high.any():
            code |= high.astype(np.int32) << 8
        empty = code == 0
        code -= 1
        q = (code >> 1) ^ -(code & 1)
        q += _predicted(step, known)
        q[empty] = 0
        known[step.temperature] = q
        tail = (q - noise) / np.float32(step.per_nat)
        tail[empty] = -np.inf
        tail_PT[:, list(temperatures).index(step.temperature)] = tail
    fields = Fields(tail_PT, entropy_P, FINE.logp.take(top1), gold_P)
    return fields, out[3] if floor else None


def _three_quarters(top1: np.ndarray) -> np.ndarray:
    return ((top1.astype(np.uint16) * np.uint16(3)) >> np.uint16(2)).astype(np.uint8)


def _predicted(step: TailStep, known: dict[float, np.ndarray]) -> np.ndarray | int:
    total: np.ndarray | int = step.constant + 128
    for temperature, weight in step.weights:
        total = total + known[temperature] * weight
    return total >> 8
