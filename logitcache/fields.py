"""What is kept of a position besides its entries, a byte or two each. Imports no torch.

    top1     level of ``levels.FINE``
    gold     (level of FINE - top1's) mod 256; FINE's ABSENT, where there is no gold label
    entropy  (round(16 entropy) - 3 top1 / 4, rounded down) mod 256
    floor    level that the certain entries count down from, see ``codec`` (plain top-k only)
    G(T)     round(G / step + d) minus what earlier ones predict, d the position's dither, as a
             sign-last number (0, -1, 1, -2, ... as 0, 1, 2, 3, ...), plus 1; 0 is minus infinity,
             an empty tail. The high byte is nearly always 0.

They lie in three planes, each as wide as T (at least three or four) fields of P positions, end to
end, zeros after them: the first four above; the tails' low bytes; their high bytes.

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


PLANES = 3


def fields_width(temperatures: Sequence[float], floor: bool) -> int:
    """How many fields a plane has room for."""
    return max(len(temperatures), 4 if floor else 3)


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
    """Give uint8 [3, width, P], zero where nothing is kept.

    Above T = 1 the stored G also makes up for the rounding of the certain entries, as far as that
    is less than half of the tail: so F(T), which is what G is for, is right to a step.
    """
    kept_P = certain.count_P > 0
    steps = tail_steps(temperatures, precision)
    out = np.zeros((PLANES, fields_width(temperatures, floor_P is not None), len(kept_P)), np.uint8)
    head, low, high = out
    head[0] = top1 = top1_levels(fields.top1_P, kept_P)
    gold = np.minimum(FINE.encode(np.nan_to_num(fields.gold_P, nan=0.0)), ABSENT - 1)
    head[1] = np.where(np.isnan(fields.gold_P), ABSENT, gold) - top1
    entropy = np.rint(np.clip(np.nan_to_num(fields.entropy_P), 0, 15.9) * ENTROPY_STEPS)
    head[2] = entropy.astype(np.uint8) - _three_quarters(top1)
    if floor_P is not None:
        head[3] = floor_P
    known: dict[float, np.ndarray] = {}
    noise = dither(len(kept_P))
    empty = ~np.isfinite(fields.tail_PT).all(1)
    shift_P: np.ndarray | None = None
    for number, step in enumerate(steps):
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
        low[number] = code & 255
        high[number] = code >> 8
    out[:, :, ~kept_P] = 0
    return out


def decode_fields(
    out: np.ndarray, temperatures: Sequence[float], precision: str, floor: bool
) -> tuple[Fields, np.ndarray | None]:
    """Undo encode_fields; also the floors, if there are any. What is not kept decodes to numbers
    without meaning, and an empty tail."""
    steps = tail_steps(temperatures, precision)
    head, low, high = out
    top1, gold = head[0], head[1] + head[0]
    gold_P = np.where(gold == ABSENT, np.float32(np.nan), FINE.logp.take(gold))
    entropy_P = (head[2] + _three_quarters(top1)).astype(np.float32) / np.float32(ENTROPY_STEPS)
    # G of all temperatures at once, but for the predictions: small arrays cost by the call.
    q_TP = low[: len(steps)].astype(np.int32)
    q_TP |= high[: len(steps)].astype(np.int32) << 8
    empty_TP = q_TP == 0
    q_TP -= 1
    sign_TP = q_TP & 1
    q_TP >>= 1
    np.negative(sign_TP, out=sign_TP)
    q_TP ^= sign_TP
    no_tail = bool(empty_TP.any())
    known: dict[float, np.ndarray] = {}
    for q, empty, step in zip(q_TP, empty_TP, steps, strict=True):
        q += _predicted(step, known)
        if no_tail:
            q[empty] = 0
        known[step.temperature] = q
    tail_TP = np.subtract(q_TP, dither(out.shape[2]), dtype=np.float32)
    tail_TP *= np.array([[1 / step.per_nat] for step in steps], np.float32)
    if no_tail:
        tail_TP[empty_TP] = -np.inf
    chain = [step.temperature for step in steps]
    tail_PT = tail_TP[[chain.index(float(t)) for t in temperatures]].T
    fields = Fields(tail_PT, entropy_P, FINE.logp.take(top1), gold_P)
    return fields, head[3] if floor else None


def _three_quarters(top1: np.ndarray) -> np.ndarray:
    return ((top1.astype(np.uint16) * np.uint16(3)) >> np.uint16(2)).astype(np.uint8)


def _predicted(step: TailStep, known: dict[float, np.ndarray]) -> np.ndarray | int:
    total: np.ndarray | int = step.constant + 128
    for temperature, weight in step.weights:
        total = total + known[temperature] * weight
    return total >> 8
