"""Uniform numbers that are a pure function of (seed, position, token id).

Ids come in groups of 32, those that one GPU thread reads in one step: id = 4096 a + 1024 b + 8 l +
c with b < 4, l < 128, c < 8 is member 8 b + c of group 128 a + l. The least of a group's 32 numbers
is drawn first, by inverting its distribution, P(least > x) = (1 - x)^32; then which member has it,
each as likely as the others; then the other 31, uniform above it. So the 32 are independent and
uniform (order statistics: L. Devroye, Non-Uniform Random Variate Generation, 1986, V.2), and one
word tells of 32 ids that none is drawn, which is true of nearly all groups. In units of 2^-32:

    least   floor(2^32 (1 - (1 - (x + 1/2) / 2^32)^(1/32))),  x = mix(key0 + group * 0x9E3779B9)
    holder  upper 5 bits of mix(key1 - (group + 1) * 0x85EBCA6B)
    others  least + 1 + floor((2^32 - 1 - least) v / 2^31),
            v = upper 31 bits of mix(key1 + id * 0x85EBCA6B)

and half a unit is added. The 32-bit mixer is "lowbias32" of C. Wellons' hash prospector (public
domain): two rounds of xor-shift and multiply, chosen there for the lowest avalanche bias. The root
is five square roots in float64, which IEEE 754 rounds the same everywhere; the rest is integer. Two
keys are made of (seed, position). Every implementation gets the same bits.

Checked on 12 million numbers: level (chi-square of the upper and of the lower 16 bits), below 1e-6
to 0.5 as often as they should be, for every member of a group alike, binomially many of a group at
once; no correlation with neighbours in id, group, run, position or seed; seeds or positions that
differ in one bit share half of the bits.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
GROUP_STEP, ID_STEP = 0x9E3779B9, 0x85EBCA6B
KEY1_SALT = 0x2545F491
GROUP_SIZE = 32


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
    start = mix(torch.full_like(position, (seed & _MASK) ^ GROUP_STEP)) ^ ((seed >> 32) & _MASK)
    key0 = mix(mix(mix(start) ^ low) ^ high)
    return key0, mix(key0 ^ low ^ KEY1_SALT)


def group_of(ids: torch.Tensor) -> torch.Tensor:
    """Give the number of the group that each id is in."""
    return (ids >> 12) * 128 + ((ids >> 3) & 127)


def least_of_groups(key0: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Give the least number of each group in units of 2^-32; key0 broadcasts against groups."""
    word = mix(key0 + groups * GROUP_STEP)
    root = 1.0 - (word.double() + 0.5) * 2.0**-32
    for _ in range(5):
        root = root.sqrt()
    return ((1.0 - root) * 2.0**32).to(torch.int64)


def numbers(key1: torch.Tensor, ids: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Give the numbers of ids in units of 2^-32; least: that of each one's group."""
    ids = ids.to(torch.int64)
    holder = mix(key1 - (group_of(ids) + 1) * ID_STEP) >> 27
    member = ((ids >> 10) & 3) * 8 + (ids & 7)
    above = ((_MASK - least) * (mix(key1 + ids * ID_STEP) >> 1)) >> 31
    return torch.where(member == holder, least, least + 1 + above)
