"""Entries as words of two or three bytes, and a list of what only few of them have. No torch.

An entry is a value of a few bits, a gap to the entry before it at its position (the first has its
number itself), and something extra that is nearly always 0. Its word is

    value | more << b | (gap mod 2^c) << (b + 1)        b bits of value, c = 8 planes - b - 1

and where more = 1 the list has gap >> c | extra << n, n = bits of the largest gap less c. The bytes
of the words are planes, lowest first, then those of the list, which is as long as it needs to be
and zeros from there on. No plane is so regular that zstd spends time on matches in it: 40 % less of
its time than with a plane for each of low byte, high byte and value, and half a byte less a token
(2026-11, certain entries of SmolLM2-135M).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .errors import StoreError

_U32 = np.uint32


@dataclass(frozen=True)
class Words:
    """The shape of words. extra_bits: what the extra number takes."""

    value_bits: int
    word_planes: int
    extra_bits: int

    @property
    def gap_bits(self) -> int:
        return 8 * self.word_planes - self.value_bits - 1

    def _rest_bits(self, largest: int) -> int:
        return max(largest.bit_length() - self.gap_bits, 0)

    def planes(self, largest: int) -> int:
        """How many planes there are; largest: the largest possible gap."""
        return self.word_planes + (self.extra_bits + self._rest_bits(largest) + 7) // 8

    def pack(
        self, values: np.ndarray, gaps: np.ndarray, extra: np.ndarray, largest: int
    ) -> np.ndarray:
        """Planes of the entries, uint8 [planes, E]. All uint32 [E]; extra is overwritten."""
        planes = np.zeros((self.planes(largest), len(values)), np.uint8)
        rare = gaps >> _U32(self.gap_bits)
        extra <<= _U32(self._rest_bits(largest))
        rare |= extra
        more = rare != 0
        kind = np.uint16 if self.word_planes == 2 else np.uint32  # the higher bits are not needed
        word: np.ndarray = gaps.astype(kind)
        word <<= kind(1)
        word |= more
        word <<= kind(self.value_bits)
        word |= values.astype(kind)
        split(word, planes[: self.word_planes])
        rare = rare.take(np.flatnonzero(more))
        split(rare, planes[self.word_planes :, : len(rare)])
        return planes

    def unpack(
        self, planes: np.ndarray, largest: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Undo pack: values, uint8 [E]; gaps, uint32 [E]; which entries may have an extra number,
        and what it is, uint32."""
        bits, rest_bits = self.value_bits, self._rest_bits(largest)
        if self.word_planes == 2:  # half the memory until the last step
            short = planes[1].astype(np.uint16)
            short <<= np.uint16(8)
            short |= planes[0].astype(np.uint16)
            short >>= np.uint16(bits + 1)
            gaps = short.astype(np.uint32)
        else:
            gaps = join(planes[: self.word_planes])
            gaps >>= _U32(bits + 1)
        more = np.flatnonzero((planes[bits // 8] & np.uint8(1 << bits % 8)) != 0)
        extra = join(planes[self.word_planes :, : len(more)])
        if rest_bits:
            gaps[more] |= (extra & _U32((1 << rest_bits) - 1)) << _U32(self.gap_bits)
            extra >>= _U32(rest_bits)
        if len(extra) and int(extra.max()) >= 1 << self.extra_bits:
            raise StoreError(
                f"an entry's extra number is {extra.max()}, not {self.extra_bits} bits"
            )
        return planes[0] & np.uint8((1 << bits) - 1), gaps, more, extra


def split(values: np.ndarray, planes: np.ndarray) -> None:
    """Write the bytes of values, lowest first, into rows of planes."""
    for number, plane in enumerate(planes):
        plane[:] = values >> values.dtype.type(8 * number) if number else values  # keeps 8 bits


def join(planes: np.ndarray) -> np.ndarray:
    """Undo split; uint32 [E]."""
    values = planes[0].astype(np.uint32)
    for number, plane in enumerate(planes[1:], start=1):
        if plane.max(initial=0):
            part = plane.astype(np.uint32)
            part <<= _U32(8 * number)
            values |= part
    return values


class Runs(NamedTuple):
    """The entries of positions that have any. kept: which positions; first: their first entries."""

    kept: np.ndarray
    first: np.ndarray


def runs_of(count_P: np.ndarray) -> Runs:
    kept = np.flatnonzero(count_P > 0)
    return Runs(kept, (count_P.cumsum() - count_P).take(kept))


def spread(values: np.ndarray, runs: Runs, length: int) -> np.ndarray:
    """Repeat a value of each of runs.kept for its entries; uint32 [length].

    A running sum of differences, modulo 2^32: np.repeat takes longer, as it loops over a position's
    few entries, a mispredicted branch each time.
    """
    steps = np.zeros(length, np.uint32)
    steps[runs.first[1:]] = values[1:] - values[:-1]
    steps[:1] = values[:1]
    return np.add.accumulate(steps, out=steps)


def spread_floats(values: np.ndarray, runs: Runs, length: int) -> np.ndarray:
    """The same for float32, by their bits."""
    return spread(values.view(np.uint32), runs, length).view(np.float32)


def gaps_of(numbers: np.ndarray, runs: Runs, between: int) -> np.ndarray:
    """Rising numbers of each position as gaps, ``between`` less than the difference."""
    gaps = np.empty_like(numbers)
    np.subtract(numbers[1:], numbers[:-1], out=gaps[1:])
    if between:
        gaps -= _U32(between)
    gaps[runs.first] = numbers.take(runs.first)
    return gaps


def running(gaps: np.ndarray, runs: Runs, between: int) -> np.ndarray:
    """Undo gaps_of, in place."""
    if between:
        gaps += _U32(between)
    sums = np.empty(len(gaps) + 1, np.uint32)
    sums[0] = 0
    np.cumsum(gaps, out=sums[1:])
    before = sums.take(runs.first)
    if between:
        before += _U32(between)
    return np.subtract(sums[1:], spread(before, runs, len(gaps)), out=gaps)
