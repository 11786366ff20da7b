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
        """Planes of the entries, uint8 [planes, E]. All uint32 [E]; gaps are overwritten."""
        planes = np.zeros((self.planes(largest), len(values)), np.uint8)
        rare = gaps >> _U32(self.gap_bits)
        rare |= extra << _U32(self._rest_bits(largest))
        more = rare != 0
        gaps <<= _U32(1)
        gaps |= more
        gaps <<= _U32(self.value_bits)
        gaps |= values
        split(gaps, planes[: self.word_planes])
        rare = rare[np.flatnonzero(more)]
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
        plane[:] = values >> _U32(8 * number) if number else values  # the cast keeps 8 bits


def join(planes: np.ndarray) -> np.ndarray:
    """Undo split; uint32 [E]."""
    values = planes[0].astype(np.uint32)
    for number, plane in enumerate(planes[1:], start=1):
        if plane.max(initial=0):
            part = plane.astype(np.uint32)
            part <<= _U32(8 * number)
            values |= part
    return values


def starts(count_P: np.ndarray) -> np.ndarray:
    """Where each position's entries begin."""
    return count_P.cumsum() - count_P


def gaps_of(numbers: np.ndarray, count_P: np.ndarray, between: int) -> np.ndarray:
    """Rising numbers of each position as gaps, ``between`` less than the difference."""
    gaps = numbers.copy()
    gaps[1:] -= numbers[:-1] + _U32(between)
    first = starts(count_P)[count_P > 0]
    gaps[first] = numbers[first]
    return gaps


def running(gaps: np.ndarray, count_P: np.ndarray, between: int) -> np.ndarray:
    """Undo gaps_of, in place."""
    if between:
        gaps += _U32(between)
    sums = np.empty(len(gaps) + 1, np.uint32)
    sums[0] = 0
    np.cumsum(gaps, out=sums[1:])
    before_P = sums.take(starts(count_P))
    if between:
        before_P += _U32(between)
    return np.subtract(sums[1:], np.repeat(before_P, count_P), out=gaps)
