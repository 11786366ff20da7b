"""Supports and statistics as integers: the layout of a store's arrays, without torch or files.

Per position the kept ids are replaced by their rank in the corpus's frequency order (frequent
tokens have small ranks), split into certain and sampled ones, and each group is stored as rising
ranks: the first rank, then the gaps minus one. Values, precision "standard": certain entries
round(255 sqrt p), which is uniform in the Fisher metric; sampled entries round(-8 logp). Precision
"high": logp as float16.

Statistics are 16-bit fixed point, see SCALES. Shape suffixes: P positions, K entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Steps per unit: top-1 and gold logp up to 32 nats, entropy up to 16, tail log-partition within
# +-64.
LOGP_STEPS, ENTROPY_STEPS, PARTITION_STEPS = 2048, 4096, 512
_PARTITION_ZERO = 32768
ABSENT = 65535  # of a logp: there is none
_SAMPLED_STEPS = 8


def pack_logp(logp: np.ndarray) -> np.ndarray:
    """Round -logp to 1/2048 nat in uint16; NaN becomes ABSENT, below -32 the smallest that there
    is."""
    fixed = np.clip(
        np.rint(-np.nan_to_num(logp, nan=0.0, neginf=-64.0) * LOGP_STEPS), 0, ABSENT - 1
    )
    return np.where(np.isnan(logp), ABSENT, fixed).astype(np.uint16)


def unpack_logp(fixed: np.ndarray) -> np.ndarray:
    return np.where(fixed == ABSENT, np.nan, fixed / np.float32(-LOGP_STEPS)).astype(np.float32)


def pack_entropy(entropy: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(entropy * ENTROPY_STEPS), 0, 65535).astype(np.uint16)


def unpack_entropy(fixed: np.ndarray) -> np.ndarray:
    return fixed / np.float32(ENTROPY_STEPS)


def pack_partition(tail: np.ndarray) -> np.ndarray:
    """Round a tail's log-partition to 1/512 nat in uint16; 0 is minus infinity, an empty tail."""
    fixed = np.rint(np.nan_to_num(tail, neginf=0.0) * PARTITION_STEPS) + _PARTITION_ZERO
    return np.where(np.isneginf(tail), 0, np.clip(fixed, 1, 65535)).astype(np.uint16)


def unpack_partition(fixed: np.ndarray) -> np.ndarray:
    value = (fixed.astype(np.float32) - _PARTITION_ZERO) / PARTITION_STEPS
    return np.where(fixed == 0, -np.inf, value).astype(np.float32)


def frequency_rank(tokens: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Give (id_of_rank, rank_of_id), uint32: ids by falling count in tokens, ties by the lower
    id."""
    counts = np.bincount(tokens.ravel(), minlength=vocab_size)[:vocab_size]
    id_of_rank = np.argsort(-counts, kind="stable").astype(np.uint32)
    rank_of_id = np.empty(vocab_size, dtype=np.uint32)
    rank_of_id[id_of_rank] = np.arange(vocab_size, dtype=np.uint32)
    return id_of_rank, rank_of_id


def num_gap_planes(vocab_size: int) -> int:
    """Bytes that a gap takes: one array each, the lowest first."""
    return max((int(vocab_size - 1).bit_length() + 7) // 8, 1)


@dataclass(frozen=True)
class Entries:
    """Flat entries of P positions: first each position's certain ones, then its sampled ones, ranks
    rising.

    counts: uint16 [P, 2]. gaps: uint32 [E]. levels: uint8 or float16 [E].
    """

    counts: np.ndarray
    gaps: np.ndarray
    levels: np.ndarray


def level_dtype(precision: str) -> np.dtype:
    return np.dtype(np.uint8 if precision == "standard" else np.float16)


def encode(
    ids_PK: np.ndarray,
    logp_PK: np.ndarray,
    certain_PK: np.ndarray,
    rank_of_id: np.ndarray,
    precision: str,
) -> Entries:
    """Encode supports; ids of -1 are padding."""
    width = ids_PK.shape[1]
    used_PK = ids_PK >= 0
    vocab_size = len(rank_of_id)
    # One sort orders certain before sampled before padding, by rank within each.
    rank_PK = rank_of_id[np.where(used_PK, ids_PK, 0)].astype(np.int64)
    group_PK = np.where(used_PK, np.where(certain_PK, 0, 1), 2)
    key_PK = group_PK * vocab_size + rank_PK
    order_PK = np.argsort(key_PK, axis=1, kind="stable")
    key_PK = np.take_along_axis(key_PK, order_PK, axis=1)
    logp_PK = np.take_along_axis(logp_PK, order_PK, axis=1)
    counts = np.stack(((group_PK == 0).sum(1), (group_PK == 1).sum(1)), axis=1)

    gap_PK = key_PK.copy()
    gap_PK[:, 1:] -= key_PK[:, :-1] + 1
    column = np.arange(width)
    first_PK = (column == 0) | (column == counts[:, :1])  # groups begin anew with a rank
    gap_PK = np.where(first_PK, key_PK % vocab_size, gap_PK)
    sampled_PK = column >= counts[:, :1]
    kept_PK = column < counts.sum(1, keepdims=True)
    return Entries(
        counts.astype(np.uint16),
        gap_PK[kept_PK].astype(np.uint32),
        _to_levels(logp_PK[kept_PK], sampled_PK[kept_PK], precision),
    )


def _to_levels(logp: np.ndarray, sampled: np.ndarray, precision: str) -> np.ndarray:
    if precision == "high":
        return np.maximum(logp, -65000.0).astype(np.float16)
    certain_level = np.clip(np.rint(255.0 * np.exp(0.5 * logp)), 1, 255)
    sampled_level = np.clip(np.rint(np.maximum(logp, -64.0) * -_SAMPLED_STEPS), 0, 255)
    return np.where(sampled, sampled_level, certain_level).astype(np.uint8)


def decode(entries: Entries, id_of_rank: np.ndarray, precision: str) -> tuple[np.ndarray, ...]:
    """Give ids_PK (int32, -1 padding), logp_PK (float32, -inf padding) and certain_PK (bool).

    logp is as stored: the reader sets the largest to the stored top-1 and makes the whole add up to
    1.
    """
    counts = entries.counts.astype(np.int64)
    total_P = counts.sum(1)
    num_positions, width = len(counts), max(int(total_P.max(initial=0)), 1)
    column = np.arange(width)
    kept_PK = column < total_P[:, None]
    certain_PK = column < counts[:, :1]
    gap_PK = np.zeros((num_positions, width), dtype=np.int64)
    gap_PK[kept_PK] = entries.gaps
    # rank = running sum of (gap + 1) - 1 within a group: take off the sum at the end of the certain
    # group.
    running_PK = (gap_PK + 1).cumsum(1)
    last = np.maximum(counts[:, :1] - 1, 0)
    before_P1 = np.where(counts[:, :1] > 0, np.take_along_axis(running_PK, last, axis=1), 0)
    rank_PK = running_PK - 1 - np.where(certain_PK, 0, before_P1)
    ids_PK = np.full((num_positions, width), -1, dtype=np.int32)
    ids_PK[kept_PK] = id_of_rank[rank_PK[kept_PK]]
    logp_PK = np.full((num_positions, width), -np.inf, dtype=np.float32)
    logp_PK[kept_PK] = _from_levels(entries.levels, ~certain_PK[kept_PK], precision)
    return ids_PK, logp_PK, certain_PK


def _from_levels(levels: np.ndarray, sampled: np.ndarray, precision: str) -> np.ndarray:
    if precision == "high":
        return levels.astype(np.float32)
    value = levels.astype(np.float32)
    return np.where(sampled, value / -_SAMPLED_STEPS, 2.0 * np.log(np.maximum(value, 1) / 255.0))
