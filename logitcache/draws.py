"""The numbers that decided which entries were sampled, in numpy: the same as the capture's.

``capture`` keeps an entry where u(seed, position, id) is below its inclusion. A reader can compute
u too: among the eight ids of a block the kept one is nearly always that with the smallest u, which
need not be written down. So the codec numbers the ids of a block in the order of u. Only the high
16 bits of u are used; ties go to the lower id. The codec is exact whatever the numbers are; they
only make it small.

    u16(id) = half (id mod 2) of mix(key + (id // 2) * 0x9E3779B9)
"""

from __future__ import annotations

import numpy as np

BLOCK = 8  # ids
_PAIR_STEP = 0x9E3779B9
_U32 = np.uint32
_STRIDE = 1 << 15  # entries at a time, for a bounded memory


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble 32-bit words (lowbias32 of C. Wellons' hash prospector, public domain)."""
    x = x ^ (x >> _U32(16))
    x *= _U32(0x7FEB352D)
    x ^= x >> _U32(15)
    x *= _U32(0x846CA68B)
    x ^= x >> _U32(16)
    return x


def position_keys(seed: int, positions: np.ndarray) -> np.ndarray:
    """One key per position, uint32; positions: int64, row * seq_len + token."""
    low = (positions & 0xFFFFFFFF).astype(np.uint32)
    high = (positions >> 32).astype(np.uint32)
    start = mix(np.array([(seed & 0xFFFFFFFF) ^ _PAIR_STEP], np.uint32)) ^ _U32(seed >> 32)
    return mix(mix(mix(start) ^ low) ^ high)


def _ordered(keys: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """u16 << 16 | number in block of the eight ids of each block, uint32 [8, n]."""
    word = blocks * _U32(BLOCK // 2 * _PAIR_STEP & 0xFFFFFFFF)
    word += keys
    ordered = np.empty((BLOCK, len(blocks)), np.uint32)
    spare = np.empty_like(word)
    for pair in range(BLOCK // 2):
        even, odd = ordered[2 * pair], ordered[2 * pair + 1]
        np.right_shift(word, 16, out=odd)  # mix, without new arrays
        odd ^= word
        odd *= _U32(0x7FEB352D)
        np.right_shift(odd, 15, out=spare)
        odd ^= spare
        odd *= _U32(0x846CA68B)
        np.right_shift(odd, 16, out=spare)
        odd ^= spare
        np.left_shift(odd, 16, out=even)
        even |= _U32(2 * pair)
        odd &= _U32(0xFFFF0000)
        odd |= _U32(2 * pair + 1)
        word += _U32(_PAIR_STEP)
    return ordered


def to_order(keys: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Replace each id's place in its block by its place in the order of u. ids: uint32."""
    ordered = _ordered(keys, ids >> _U32(3))
    own = np.take_along_axis(ordered, (ids & _U32(7)).astype(np.int64)[None], axis=0)
    return (ids & ~_U32(7)) | (ordered < own).sum(0, dtype=np.uint32)


def from_order(keys: np.ndarray, blocks: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Undo to_order: ids of the order-th smallest u in each block. uint32."""
    ids = np.empty(len(blocks), np.uint32)
    for start in range(0, len(blocks), _STRIDE):
        part = slice(start, start + _STRIDE)
        ordered = _ordered(keys[part], blocks[part])
        best = ids[part]
        np.minimum(ordered[0], ordered[1], out=best)
        for row in ordered[2:]:
            np.minimum(best, row, out=best)
        later = np.flatnonzero(order[part] != 0)  # some 4 % of the entries
        if len(later):
            several = ordered[:, later]
            wanted = order[part][later]
            # Nearly all of them want the second: the smallest of what is larger than the first.
            rest = np.where(several > best[later], several, _U32(0xFFFFFFFF)).min(0)
            third = np.flatnonzero(wanted > 1)
            if len(third):
                places = wanted[third], np.arange(len(third))
                rest[third] = np.sort(several[:, third], axis=0)[places]
            best[later] = rest
    ids &= _U32(7)
    ids |= blocks << _U32(3)
    return ids
