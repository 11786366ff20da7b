"""Uniform numbers that are a pure function of (seed, position, token id).

The 32-bit mixer is "lowbias32" of C. Wellons' hash prospector (public domain): two rounds of
xor-shift and multiply, chosen there for the lowest avalanche bias. Two keys are made of (seed,
position); the number for token id v is

    high 16 bits: half (v mod 2) of mix(key0 + (v // 2) * 0x9E3779B9)
    low  16 bits: upper half of mix(key1 + v * 0x85EBCA6B)

so a kernel computes one word per two ids, and the low half only for the few ids whose high half
does not decide. Integers only: every implementation gets the same bits.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
PAIR_STEP, LOW_STEP = 0x9E3779B9, 0x85EBCA6B
KEY1_SALT = 0x2545F491


def mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit words held in int64."""
    x = x & _MASK
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def row_keys(seed: int, position_ids_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the two 32-bit keys (as int64, shape R) of each position."""
    position = position_ids_R.to(torch.int64)
    low, high = position & _MASK, (position >> 32) & _MASK
    start = mix(torch.full_like(position, (seed & _MASK) ^ PAIR_STEP)) ^ ((seed >> 32) & _MASK)
    key0 = mix(mix(mix(start) ^ low) ^ high)
    return key0, mix(key0 ^ low ^ KEY1_SALT)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """``mix`` on int32 words, in place: half the memory. Products wrap; shifts need a mask."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - (1 << 32)
    return x.bitwise_xor_((x >> 16) & 0xFFFF)


def high_bits(key0_R: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Give the high 16 bits for ids 0..num_tokens-1 as int32, shape R x num_tokens."""
    pairs = torch.arange((num_tokens + 1) // 2, device=key0_R.device, dtype=torch.int64)
    steps = pairs * PAIR_STEP & _MASK
    word = _mix32(_to_int32(key0_R)[:, None] + _to_int32(steps))
    # Little-endian halves of a word are the numbers of its even and odd id, in this order.
    return word.view(torch.int16)[:, :num_tokens].to(torch.int32) & 0xFFFF


def _to_int32(word: torch.Tensor) -> torch.Tensor:
    """32-bit words held in int64 as int32 with the same bits."""
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def low_bits(key1: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Give the low 16 bits for the given ids; key1 broadcasts against ids."""
    return mix(key1 + ids.to(torch.int64) * LOW_STEP) >> 16
