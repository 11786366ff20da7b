"""Which id of a group holds its least number, in numpy: the same as the capture's. No torch.

``capture`` keeps an entry where u(seed, position, id) is below its inclusion. Ids come in groups of
32, and the id that holds the least u of its group, the holder, is drawn without regard to u itself
(logitcache_kernels.uniform). A sampled id is nearly always the holder of its group, which a reader
can compute: so the codec names ids by their group and a rank, which is 0 for the holder:

    group  = id // 4096 * 128 + id // 8 % 128
    member = id // 1024 % 4 * 8 + id % 8
    holder = upper 5 bits of mix(key - (group + 1) * 0x85EBCA6B)
    rank   = member xor holder

That is a bijection whatever the numbers are; they only make ranks small.
"""

from __future__ import annotations

import numpy as np

from .words import Runs, spread

GROUP_SIZE = 32  # ids
_GROUP_STEP, _ID_STEP = 0x9E3779B9, 0x85EBCA6B
_KEY1_SALT = 0x2545F491
_U32 = np.uint32


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 32-bit words, in place (lowbias32 of C. Wellons' hash prospector, public domain)."""
    spare = x >> _U32(16)
    x ^= spare
    x *= _U32(0x7FEB352D)
    np.right_shift(x, _U32(15), out=spare)
    x ^= spare
    x *= _U32(0x846CA68B)
    np.right_shift(x, _U32(16), out=spare)
    x ^= spare
    return x


def position_keys(seed: int, positions: np.ndarray) -> np.ndarray:
    """The key of holders at each position, uint32; positions: int64, row * seq_len + token."""
    low = positions.astype(np.uint32)
    start = _mix(np.array([(seed & 0xFFFFFFFF) ^ _GROUP_STEP], np.uint32))
    start ^= _U32(seed >> 32)
    key = _mix(_mix(start) ^ low)
    key ^= (positions >> 32).astype(np.uint32)
    key = _mix(key)
    key ^= low
    key ^= _U32(_KEY1_SALT)
    return _mix(key)


def num_groups(vocab_size: int) -> int:
    """Groups that the ids below vocab_size are in."""
    return (vocab_size - 1 >> 12) * 128 + min((vocab_size - 1) % 4096 // 8, 127) + 1


def holders(keys_P: np.ndarray, runs: Runs, groups: np.ndarray) -> np.ndarray:
    """Holders of the groups at each position, uint32 [E]."""
    # Bytes of memory are what this costs: two arrays, used again and again.
    word = spread(keys_P.take(runs.kept) - _U32(_ID_STEP), runs, len(groups))
    spare = groups * _U32(_ID_STEP)
    word -= spare
    np.right_shift(word, _U32(16), out=spare)
    word ^= spare
    word *= _U32(0x7FEB352D)
    np.right_shift(word, _U32(15), out=spare)
    word ^= spare
    word *= _U32(0x846CA68B)
    word >>= _U32(27)  # the mixer's last shift changes lower bits only
    return word


def split_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group and member of each id, uint32."""
    groups = ids >> _U32(12)
    groups <<= _U32(7)
    spare = ids >> _U32(3)
    spare &= _U32(127)
    groups |= spare
    members = ids >> _U32(7)
    members &= _U32(24)
    np.bitwise_and(ids, _U32(7), out=spare)
    members |= spare
    return groups, members


def join_ids(groups: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Undo split_ids; uint32."""
    ids = groups >> _U32(7)
    ids *= _U32(4096 - 128 * 8)
    spare = groups << _U32(3)
    ids += spare
    np.multiply(members, _U32(129), out=spare)  # c at bit 0, b at bit 10
    spare &= _U32(0xC07)
    ids |= spare
    return ids
