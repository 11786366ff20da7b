"""The transform before zarr's codecs: one row's supports as byte planes. No torch, no files.

A row has L positions, each with certain and sampled entries (DESIGN section 5). Both kinds lie end
to end, position by position, as the byte planes of ``words``:

* Certain entries, by rising rank of their id in the shard's frequency order. Gap: that to the rank
  before less 1. Value and extra number: low and high bits of a level, 0 for the position's top-1
  entry, whose logp is the field top1, else one of the level table. With a floor (plain top-k)
  levels count from the position's last one down.
* Sampled entries, by rising group and rank (``draws``: rank 0 is the id that holds its group's
  least number, nearly always the one that was drawn). Gap: that to the group before. Value: flat
  << (b - 1) | round(-logp / step + d), d the entry's dither. Extra number: the rank.
  flat says that max(p, p^S) is p itself: the inclusion is p / threshold, and at T = 1 the target's
  share is the threshold, whatever was rounded. It is p^S / threshold elsewhere.

What is certain is never decided by a rounded value. Error of logp, before the reader makes the
whole add up to 1 (``LevelTable`` has the certain ones' proof):

    precision   certain, large p         certain, small p    sampled
    standard    1/48 of sqrt(p)          1/2 nat             3/2 nat, uniform, of mean 0
    high        1/200 of sqrt(p)         1/12 nat            1/4 nat, uniform, of mean 0

(sampled ones down to -42 and -63 nats). An estimate weighs a sampled entry by p^(1/T) / inclusion:
its exponent of p is x = 1/T - 1 where flat, else 1/T - 1/S, and the mean of exp(x error) over the
dither is sinh(x s / 2) / (x s / 2) for the step s, so a reader divides by that and has no bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from .draws import holders, join_ids, num_groups, split_ids
from .errors import StoreError
from .levels import FINE, LEVELS, LevelTable, dither
from .words import Runs, Words, gaps_of, join, running, runs_of, split, spread

_U32 = np.uint32
_FIXED = 1 << 17  # steps per nat while entries are sorted
TOP = 0  # the level that marks the top-1 entry
_RANK_BITS = 5  # of a member of a group
_BLOCK = 64  # positions sorted at a time: two thirds of the time of 2048 (2026-11, AVX-512)


@dataclass(frozen=True)
class Precision:
    """Constants of one precision. Levels have 8 bits, of which nearly all need fewer."""

    table: LevelTable
    certain: Words
    sampled_step: float
    sampled: Words

    @property
    def flat_bit(self) -> int:
        return 1 << (self.sampled.value_bits - 1)


PRECISIONS = {
    "standard": Precision(
        LevelTable(1 / 24, 1.0, first=1), Words(5, 2, 3), 3.0, Words(5, 2, _RANK_BITS)
    ),
    "high": Precision(
        LevelTable(1 / 100, 1 / 6, first=1), Words(7, 3, 1), 0.5, Words(8, 3, _RANK_BITS)
    ),
}
# Plain top-k keeps many entries so small that a step of 2 nats does: 2.5 bytes less at k = 64.
_FLOOR_TABLE, _FLOOR_WORDS = LevelTable(1 / 36, 2.0, first=1), Words(6, 2, 2)


def has_floor(attributes: Mapping[str, Any]) -> bool:
    """Whether a teacher's entries reach down to any probability: levels count from a floor."""
    return attributes["estimator"] != "sampled" and attributes["min_prob"] == 0


def level_table(precision: str, floor: bool) -> LevelTable:
    """The table of certain entries' levels."""
    return _FLOOR_TABLE if floor and precision == "standard" else PRECISIONS[precision].table


def _certain_words(precision: str, floor: bool) -> Words:
    return _FLOOR_WORDS if floor and precision == "standard" else PRECISIONS[precision].certain


def certain_planes(vocab_size: int, precision: str, floor: bool) -> int:
    return _certain_words(precision, floor).planes(vocab_size - 1)


def sampled_planes(vocab_size: int, precision: str) -> int:
    return PRECISIONS[precision].sampled.planes(num_groups(vocab_size) - 1)


@dataclass(frozen=True)
class Entries:
    """Entries of one kind at P positions, end to end.

    count_P: int64. ids: uint32 [E]. logp: float32 [E]. flat: bool [E], of sampled ones; else None.
    """

    count_P: np.ndarray
    ids: np.ndarray
    logp: np.ndarray
    flat: np.ndarray | None = None

    def __getitem__(self, positions: slice) -> Entries:
        ends = np.concatenate(([0], self.count_P.cumsum()))
        part = slice(ends[positions.start], ends[positions.stop])
        flat = None if self.flat is None else self.flat[part]
        return Entries(self.count_P[positions], self.ids[part], self.logp[part], flat)


def _sort(keys: np.ndarray, runs: Runs, block: int) -> None:
    """Sort the keys of each ``block`` positions that have any, in place; see ``_owners``."""
    bounds = [*runs.first[::block].tolist(), len(keys)]
    for start, stop in pairwise(bounds):
        keys[start:stop].sort()


def _owners(runs: Runs, bits: int) -> np.ndarray:
    """Numbers of the positions that have entries, above the bits of the entries' keys; uint32.

    Modulo 2^32, so they start again at a position that a block of ``_sort`` starts at.
    """
    return np.arange(len(runs.kept), dtype=np.uint32) << _U32(bits)


@cache
def _least(table: LevelTable) -> np.ndarray:
    """By level of FINE: the least level whose logp is not larger than that; uint8 [256]."""
    least = np.searchsorted(-table.logp[table.first :], -FINE.logp) + table.first
    return np.minimum(least, LEVELS - 1).astype(np.uint8)


def encode_certain(
    entries: Entries, top1: np.ndarray, rank_of_id: np.ndarray, precision: str, floor: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give the planes, uint8 [planes, E], the floors, uint8 [P] (zeros without floor), and the logp
    that a reader will find, float32 [E] in the order of ``entries``.

    The first of a position's entries must be its top-1. top1: its levels of FINE, uint8 [P].
    """
    count_P, table = entries.count_P, level_table(precision, floor)
    words = _certain_words(precision, floor)
    key_bits = 8 + (len(rank_of_id) - 1).bit_length()
    block = min(_BLOCK, 1 << 32 - key_bits)
    runs = runs_of(count_P)
    top1 = top1.take(runs.kept)
    own = spread(_owners(runs, key_bits) | _least(table).take(top1), runs, len(entries.ids))
    levels = table.encode(entries.logp)
    np.maximum(levels, own.astype(np.uint8), out=levels)  # no other one is larger than the top-1
    own &= _U32(0xFFFFFF00)
    logp = table.logp.take(levels)
    logp[runs.first] = FINE.logp.take(top1)
    levels[runs.first] = TOP
    floor_P = np.zeros(len(count_P), np.uint8)
    if floor and len(levels):
        floor_P[runs.kept] = np.maximum.reduceat(levels, runs.first)
        levels = np.where(levels == TOP, TOP, np.repeat(floor_P, count_P) - levels + 1)
    keys = rank_of_id.take(entries.ids)
    keys <<= _U32(8)
    keys |= levels
    keys |= own
    _sort(keys, runs, block)
    keys &= _U32((1 << key_bits) - 1)
    low = keys & _U32((1 << words.value_bits) - 1)
    high = (keys & _U32(0xFF)) >> _U32(words.value_bits)
    keys >>= _U32(8)
    planes = words.pack(low, gaps_of(keys, runs, 1), high, len(rank_of_id) - 1)
    return planes, floor_P, logp


def decode_certain(
    planes: np.ndarray,
    count_P: np.ndarray,
    floor_P: np.ndarray | None,
    top1_P: np.ndarray,
    id_of_rank: np.ndarray,
    precision: str,
) -> Entries:
    """Undo encode_certain. top1_P: float32, the top-1 entries' logp."""
    words = _certain_words(precision, floor_P is not None)
    levels, ranks, more, high = words.unpack(planes, len(id_of_rank) - 1)
    runs = runs_of(count_P)
    running(ranks, runs, 1)
    if len(ranks) and int(ranks.max()) >= len(id_of_rank):
        raise StoreError(f"a rank is {ranks.max()}, there are {len(id_of_rank)} token ids")
    if high.max(initial=0):
        levels[more] |= (high << _U32(words.value_bits)).astype(np.uint8)
    top = np.flatnonzero(levels == TOP)
    if len(top) != len(runs.kept):
        raise StoreError(f"{len(top)} top-1 entries at {len(runs.kept)} positions")
    if floor_P is not None:
        levels = np.repeat(floor_P, count_P) - levels + np.uint8(1)
    logp = level_table(precision, floor_P is not None).logp.take(levels)
    logp[top] = top1_P.take(runs.kept)
    return Entries(count_P, id_of_rank.take(ranks, mode="clip"), logp)


def encode_sampled(
    entries: Entries, keys_P: np.ndarray, vocab_size: int, precision: str
) -> np.ndarray:
    """Give the planes, uint8 [planes, E]. keys_P: of ``draws.position_keys``."""
    constants, count_P = PRECISIONS[precision], entries.count_P
    assert entries.flat is not None
    places, members = split_ids(entries.ids)
    runs = runs_of(count_P)
    members ^= holders(keys_P, runs, places)
    places <<= _U32(_RANK_BITS)
    places |= members
    # One sort carries the values along, -logp as fixed point; gathering by an order takes longer.
    fixed = entries.logp * np.float32(-_FIXED)
    # Not quite to the last level: adding a dither of nearly 1/2 must not round up.
    most = (constants.flat_bit - 1) * constants.sampled_step - 1 / 256
    np.clip(fixed, 0, _FIXED * most, out=fixed)
    low = fixed.astype(np.int32).view(np.uint32)
    low <<= _U32(1)
    low |= entries.flat.astype(np.uint32)
    places |= spread(_owners(runs, 20), runs, len(places))
    keys = places.astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= low
    _sort(keys, runs, _BLOCK)
    low = keys.astype(np.uint32)
    keys >>= np.uint64(32)
    places = keys.astype(np.uint32)
    places &= _U32((1 << 20) - 1)
    level = (low >> _U32(1)).view(np.int32).astype(np.float32)
    level *= np.float32(1 / (_FIXED * constants.sampled_step))
    level += dither(len(level))
    np.rint(level, out=level)
    value = level.astype(np.int32).view(np.uint32)  # a cast to uint32 takes three times as long
    low &= _U32(1)
    low <<= _U32(constants.sampled.value_bits - 1)
    value |= low
    ranks = places & _U32((1 << _RANK_BITS) - 1)
    places >>= _U32(_RANK_BITS)
    gaps = gaps_of(places, runs, 0)
    return constants.sampled.pack(value, gaps, ranks, num_groups(vocab_size) - 1)


def decode_sampled(
    planes: np.ndarray, count_P: np.ndarray, keys_P: np.ndarray, vocab_size: int, precision: str
) -> Entries:
    """Undo encode_sampled."""
    constants, largest = PRECISIONS[precision], num_groups(vocab_size) - 1
    value, groups, more, ranks = constants.sampled.unpack(planes, largest)
    runs = runs_of(count_P)
    running(groups, runs, 0)
    members = holders(keys_P, runs, groups)
    members[more] ^= ranks
    ids = join_ids(groups, members)
    if len(ids) and (int(groups.max()) > largest or int(ids.max()) >= vocab_size):
        raise StoreError(f"an id is {ids.max()}, there are {vocab_size} token ids")
    flat = value >= np.uint8(constants.flat_bit)
    value &= np.uint8(constants.flat_bit - 1)
    logp = value.astype(np.float32)
    logp -= dither(len(logp))
    logp *= np.float32(-constants.sampled_step)
    return Entries(count_P, ids, logp, flat)


def dither_gain(exponent: float, precision: str) -> float:
    """Mean of exp(exponent * error of a sampled entry's logp)."""
    half = exponent * PRECISIONS[precision].sampled_step / 2
    return float(np.sinh(half) / half) if half else 1.0


def frequency_order(ids: np.ndarray, vocab_size: int, length: int) -> np.ndarray:
    """Ids by falling count in ids, the ``length`` most frequent ones; then the others, rising.

    uint32 [V]. Ties go to the lower id.
    """
    counts = np.bincount(ids, minlength=vocab_size)
    keys = (len(ids) - counts) << 20  # a sort of numbers is five times as fast as one of an order
    keys |= np.arange(vocab_size)
    keys.sort()
    frequent = keys[:length] & ((1 << 20) - 1)
    others = np.ones(vocab_size, bool)
    others[frequent] = False
    return np.concatenate((frequent, np.flatnonzero(others))).astype(np.uint32)


def inverse(id_of_rank: np.ndarray) -> np.ndarray:
    rank_of_id = np.empty_like(id_of_rank)
    rank_of_id[id_of_rank] = np.arange(len(id_of_rank), dtype=np.uint32)
    return rank_of_id


def encode_order(id_of_rank: np.ndarray) -> np.ndarray:
    """The order as byte planes of its differences modulo 2^24: uint8 [3, V]."""
    planes = np.empty((3, len(id_of_rank)), np.uint8)
    split(np.diff(id_of_rank, prepend=_U32(0)) & _U32(0xFFFFFF), planes)
    return planes


def decode_order(planes: np.ndarray) -> np.ndarray:
    """Undo encode_order. StoreError if it does not name each id once."""
    id_of_rank = np.cumsum(join(planes), dtype=np.uint32) & _U32(0xFFFFFF)
    seen = np.zeros(len(id_of_rank), bool)
    seen[id_of_rank[id_of_rank < len(seen)]] = True
    if not seen.all():
        raise StoreError("the frequency order does not name each token id once")
    return id_of_rank
