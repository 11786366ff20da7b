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
from functools import cache, cached_property
from typing import Any

import numpy as np

from .levels import ABSENT, FINE, dither
from .words import Runs, runs_of, spread_floats

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


@cache
def _chain(temperatures: tuple[float, ...], precision: str) -> tuple[TailStep, ...]:
    finer = 1 if precision == "standard" else 4
    if {step.temperature for step in _CHAIN} != set(temperatures):
        return tuple(TailStep(t, 64 * finer) for t in temperatures)
    return tuple(
        TailStep(step.temperature, step.per_nat * finer, step.weights, step.constant * finer)
        for step in _CHAIN
    )


def tail_steps(temperatures: Sequence[float], precision: str) -> tuple[TailStep, ...]:
    """The steps of a grid of temperatures, in the order in which they are predicted."""
    return _chain(tuple(float(t) for t in temperatures), precision)


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


def joined(rows: Sequence[Fields]) -> Fields:
    """Fields of several rows, end to end."""
    return Fields(
        np.concatenate([row.tail_PT for row in rows]),
        np.concatenate([row.entropy_P for row in rows]),
        np.concatenate([row.top1_P for row in rows]),
        np.concatenate([row.gold_P for row in rows]),
    )


@dataclass(frozen=True)
class CertainLogp:
    """logp of all certain entries, exact and as a reader finds them; count_P of them a position."""

    count_P: np.ndarray
    exact: np.ndarray
    found: np.ndarray

    @cached_property
    def runs(self) -> Runs:
        return runs_of(self.count_P)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum of the entries' values at each position, 0 where there are none."""
        total_P = np.zeros(len(self.count_P), np.float32)
        if len(values):
            total_P[self.runs.kept] = np.add.reduceat(values, self.runs.first)
        return total_P

    def missing(self, shift_P: np.ndarray, temperatures: Sequence[float]) -> dict[float, Any]:
        """By temperature: sum of exp(exact / T) less that of what a reader finds, float32 [P].

        shift_P: what a reader takes off the entries' logp.
        """
        shift = spread_floats(shift_P.take(self.runs.kept), self.runs, len(self.found))
        found = self.found - shift
        powers: dict[float, tuple[np.ndarray, np.ndarray]] = {}
        out = {}
        for temperature in sorted(temperatures, reverse=True):
            double = powers.get(2 * temperature)
            if double is not None:  # a square costs a fifth of an exp
                pair = double[0] * double[0], double[1] * double[1]
            else:
                inverse = np.float32(1 / temperature)
                pair = np.exp(self.exact * inverse), np.exp(found * inverse)
            powers[temperature] = pair
            out[temperature] = self.sums(pair[0] - pair[1])
        return out


def top1_levels(top1_P: np.ndarray, kept_P: np.ndarray) -> np.ndarray:
    """Levels of the top-1 entries' logp; a reader finds FINE.logp of them."""
    return np.minimum(FINE.encode(np.where(kept_P, top1_P, 0)), ABSENT - 1)


def encode_fields(
    fields: Fields,
    certain: Sequence[CertainLogp],
    top1: np.ndarray,
    floor_P: np.ndarray | None,
    temperatures: Sequence[float],
    precision: str,
) -> np.ndarray:
    """Give uint8 [3, width, P], zero where nothing is kept. top1: of ``top1_levels``.

    P: the positions of one or more rows of the same length, each with its entry in certain.

    Above T = 1 the stored G also makes up for the rounding of the certain entries, as far as that
    is less than half of the tail: so F(T), which is what G is for, is right to a step.
    """
    kept_P = np.concatenate([row.count_P for row in certain]) > 0
    steps = tail_steps(temperatures, precision)
    out = np.zeros((PLANES, fields_width(temperatures, floor_P is not None), len(kept_P)), np.uint8)
    head, low, high = out
    head[0] = top1
    absent = np.isnan(fields.gold_P)
    gold = np.minimum(FINE.encode(np.where(absent, np.float32(0), fields.gold_P)), ABSENT - 1)
    gold[absent] = ABSENT
    head[1] = gold - top1
    entropy = np.where(kept_P, fields.entropy_P, np.float32(0))  # NaN where a teacher was skipped
    entropy *= np.float32(ENTROPY_STEPS)
    np.clip(entropy, 0, 15.9 * ENTROPY_STEPS, out=entropy)
    head[2] = np.rint(entropy).astype(np.uint8) - _three_quarters(top1)
    if floor_P is not None:
        head[3] = floor_P
    rows = [list(temperatures).index(step.temperature) for step in steps]
    tail_TP = np.ascontiguousarray(fields.tail_PT.T[rows], np.float32)  # in the chain's order
    empty: np.ndarray = np.logical_not(np.isfinite(tail_TP).all(axis=0))
    tail_TP[:, empty] = 0
    noise = np.tile(dither(len(kept_P) // len(certain)), len(certain))
    _make_up(tail_TP, steps, certain, kept_P, empty, noise)
    tail_TP *= np.array([[step.per_nat] for step in steps], np.float32)
    tail_TP += noise
    np.rint(tail_TP, out=tail_TP)
    np.clip(tail_TP, -_G_MOST, _G_MOST, out=tail_TP)
    q_TP = tail_TP.astype(np.int32)
    q_TP[:, empty] = 0
    known = {step.temperature: q for step, q in zip(steps, q_TP, strict=True)}
    left_TP = np.stack([q - _predicted(step, known) for step, q in zip(steps, q_TP, strict=True)])
    code_TP = (left_TP << 1) ^ (left_TP >> 31)  # 0, -1, 1, ... as 0, 1, 2, ...
    code_TP += 1
    np.clip(code_TP, 1, 65535, out=code_TP)
    code_TP[:, empty] = 0
    low[: len(steps)] = code_TP
    high[: len(steps)] = code_TP >> 8
    out[:, :, ~kept_P] = 0
    return out


def _make_up(
    tail_TP: np.ndarray,
    steps: Sequence[TailStep],
    certain: Sequence[CertainLogp],
    kept_P: np.ndarray,
    empty_P: np.ndarray,
    noise: np.ndarray,
) -> None:
    """Change G above T = 1, in place, by what the certain entries lose in rounding."""
    chain = [step.temperature for step in steps]
    above = [t for t in chain if t > 1]
    if not above:
        return
    one = chain.index(1.0)
    per_nat = np.float32(steps[one].per_nat)
    q = np.clip(np.rint(tail_TP[one] * per_nat + noise), -_G_MOST, _G_MOST)
    found = np.exp((q - noise) / per_nat)
    found[empty_P] = 0
    found += np.concatenate([row.sums(np.exp(row.found)) for row in certain])
    shift_P = np.log(found, where=kept_P, out=np.zeros_like(found))
    shift_RP = shift_P.reshape(len(certain), -1)
    rows = [row.missing(shift, above) for row, shift in zip(certain, shift_RP, strict=True)]
    for tail, temperature in zip(tail_TP, chain, strict=True):
        if temperature > 1:
            missing = np.concatenate([row[temperature] for row in rows])
            share = missing * np.exp(np.minimum(-tail, np.float32(80)))
            np.clip(share, -0.5, 0.5, out=share)
            tail += shift_P * np.float32(1 / temperature) + np.log(share + np.float32(1))


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
    code_TP = low[: len(steps)].astype(np.uint16)
    if high.any():
        code_TP |= high[: len(steps)].astype(np.uint16) << np.uint16(8)
    empty_TP = code_TP == 0
    code_TP -= np.uint16(1)
    half_TP = (code_TP >> np.uint16(1)).view(np.int16)
    code_TP &= np.uint16(1)
    half_TP ^= -code_TP.view(np.int16)
    q_TP = half_TP.astype(np.int32)
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
