"""Capture on a GPU: one read of the logits, R x V values of 2 or 4 bytes, and little else.

Bytes per row: V * itemsize read, K * 12 + 44 written. Between the two kernels go a bit for every 8
logits and, for "sampled", a score of 2 bytes for every 32, written once and read once.

Mathematics. Let z be a row's logits. All sums are taken over logits *clipped* at c, a value that
one or two hundred logits of the row exceed (chosen among the maxima of 64 groups of a sample).
With y = log2(e) (z - c) / 12 and u = 2^y, one exponential, for T = 0.5, 1, 1.5, 2, 3, 4

    A_T = sum_v exp((min(z_v, c) - c) / T) = sum min(u, 1)^(24, 12, 8, 6, 4, 3)
    h   = sum_v min(u, 1)^12 y

can neither overflow nor need a rescale. The clip costs nothing: it is the saturation of the
products min(u u, 1) and min(u u^2, 1), from which the others follow. Each of the n logits above c
adds exactly 1 to A_T and its y to h. They are read again one by one, which gives, with m the
largest logit,

    Z_T  = sum_{z > c} e^{(z - m) / T} + e^{(c - m) / T} (A_T - n),        lse_T = m / T + log Z_T
    H    = log Z_1 - (1 / Z_1) [sum_{z > c} e^{z - m} (z - m) + e^{c - m} ((A_1 - n)(c - m) + h')]
           with h' = 12 log(2) (h - sum_{z > c} y)
    G(T) = (c - lse_1) / T + log(A_T - n + in - out)
    in   = sum_{z > c, not certain} e^{(z - c) / T},    out = sum_{z <= c, certain} e^{(z - c) / T}

The large entries are 1 in the sums whatever their size, so a tail of 1e-9 beside a top of 1 loses
no digits to them. Where it still would lose two (the tail under 1 % of A_T), and wherever else a
row does not fit (NaN, infinity, a list that overflows), it is left to ``capture_careful``, which
subtracts nothing and takes as many sweeps as it needs. Minus infinity makes h NaN, and the row is
swept again with such logits made finite.

Finding what to list. A group of 8 neighbours, which a thread reads at once, holds a logit above c
only if its sum of u^24, a part of A_0.5, reaches 1: one comparison for 8 logits, one bit.

"sampled": an entry is kept if its uniform number U < r(v) / threshold, r = max(p, p^S), but the
partition functions are known only at the end of the row. ``uniform`` gives groups of 32 ids a
least number M that takes one word; so each group, which is what a lane adds up in a tile, is scored
by an upper bound of log2 exp((z - c) / S) / U over its ids,

    log2(sum u^24) / (2 S) - log2 M,        max u^(12 / S) <= (sum u^24)^(1 / (2 S)).

Below c, r(z) <= max(p(c), p^S(c)) exp((z - c) / S): a group can hold a kept entry only if its score
reaches log2(threshold / max(p(c), p^S(c))). Of such groups the ids whose inclusion exceeds M are
listed, and tested in the oracle's own arithmetic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton

from .capture_careful_triton import capture_careful
from .capture_finish_triton import capture_finish
from .capture_parts_triton import PENDING
from .capture_reference import MAX_KEPT
from .capture_sweep_triton import LANES, SUMS, TILE, TILES_PER_WORD, capture_sweep
from .types import TEMPERATURES, Capture
from .uniform import GROUP_STEP

_SWEEP_S = (1.0, 1.5, 2.0, 3.0, 4.0)  # sample temperatures whose sum the sweep has anyway
_SAMPLE_LEAST, _RUN, _GROUPS = 8192, 1024, 64
_LIST_CAP, _NEAR_CAP = 1024, 2048  # groups of a row to read again, ids that may be drawn
# Neighbours of a type are this far apart in the ordered bits of fp32.
_UNITS = {torch.bfloat16: 2**16, torch.float16: 2**13, torch.float32: 1}
_MASK = 0xFFFFFFFF


def _mix(x: int) -> int:
    """``uniform.mix`` on a plain number."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _start_word(seed: int) -> int:
    """The part of the keys that depends on the seed alone, as a signed 32-bit number."""
    value = _mix(_mix((seed & _MASK) ^ GROUP_STEP) ^ ((seed >> 32) & _MASK))
    return value - 2**32 if value >= 2**31 else value


@functools.lru_cache(maxsize=16)
def _grid_tensors(
    grid: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The grid, and its columns among the sweep's six; kept, for a copy to the device waits."""
    columns = None
    if set(grid) <= set(TEMPERATURES):
        columns = torch.tensor([TEMPERATURES.index(t) for t in grid], device=device)
    return torch.tensor(grid, dtype=torch.float32, device=device), columns


def _sample(num_tokens: int) -> tuple[int, int]:
    """Size of the sample of a row, a power of two from 8192 on, and the distance of its runs."""
    size = max(_SAMPLE_LEAST, triton.next_power_of_2(num_tokens // 12))
    # A multiple of 16, so that loads stay vectors; runs of a short row follow each other.
    return size, max((num_tokens - _RUN) // (size // _RUN - 1) // 16 * 16, _RUN)


def _clip_rank(num_tokens: int, wanted: int) -> int:
    """Which of the sample's group maxima about ``wanted`` logits of the row exceed.

    The jth largest of G group maxima has a rank of about -G log(1 - j / G) among the sample. That
    rank is 20 to 30 at large V, so that of a million rows about one has fewer than a third of it.
    """
    rank = wanted * min(_sample(num_tokens)[0] / num_tokens, 1.0)
    return min(max(round(_GROUPS * -math.expm1(-rank / _GROUPS)), 2), _GROUPS - 1)


def _programs(device: torch.device, num_rows: int, per_processor: int) -> int:
    if device.type != "cuda":
        return min(num_rows, 2)
    return min(
        num_rows, per_processor * torch.cuda.get_device_properties(device).multi_processor_count
    )


def capture_triton(
    logits_RV: torch.Tensor,
    *,
    estimator: str,
    min_prob: float,
    threshold: float,
    sample_temperature: float,
    top_k: int,
    temperatures: Sequence[float],
    labels_R: torch.Tensor | None,
    num_tokens: int,
    seed: int,
    position_ids_R: torch.Tensor,
    careful: bool = False,
) -> Capture:
    """See ``capture``; estimator "sampled" or "topk", logits of at most 32 bits.

    careful sends every row to the fallback.
    """
    num_rows, device = logits_RV.shape[0], logits_RV.device
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    sampled = estimator == "sampled"
    kept = min(MAX_KEPT if sampled else top_k, num_tokens)
    width = max(triton.next_power_of_2(kept), 16)
    grid = tuple(float(t) for t in temperatures)
    temperature_T, columns = _grid_tensors(grid, device)

    def new(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    swept = (
        not careful
        and columns is not None
        and (not sampled or sample_temperature in _SWEEP_S)
        and (sampled or min_prob > 0 or kept <= num_tokens // 64)
    )
    ids_RK, logp_RK = new(num_rows, kept, dtype=torch.int32), new(num_rows, kept)
    inclusion_RK = new(num_rows, kept)
    tail_RT = new(num_rows, len(grid))
    entropy_R, top1_logp_R, gold_logp_R = new(num_rows), new(num_rows), new(num_rows)
    count_R = torch.full((num_rows,), PENDING.value, dtype=torch.int32, device=device)
    result = Capture(
        ids_RK, logp_RK, inclusion_RK, tail_RT, entropy_R, top1_logp_R, gold_logp_R, count_R
    )
    if num_rows == 0:
        return result
    start = _start_word(seed)
    sources = (logits_RV, logits_RV.stride(0), labels_R, position_ids_R)
    interpreted = device.type != "cuda"
    if swept:
        tiles = triton.cdiv(num_tokens, TILE.value)
        num_words = triton.cdiv(tiles, TILES_PER_WORD.value) * LANES.value
        num_segments = tiles * LANES.value
        all_tail_RT = tail_RT if grid == TEMPERATURES else new(num_rows, len(TEMPERATURES))
        sums = new(num_rows, SUMS.value)
        bits = new(num_rows, num_words, dtype=torch.int32)
        score = new(num_rows, num_segments if sampled else 0, dtype=torch.bfloat16)
        inverse_s = 1 / sample_temperature if sampled else 1.0
        sample_size, sample_step = _sample(num_tokens)
        capture_sweep[(num_rows,)](
            *(logits_RV, logits_RV.stride(0), position_ids_R, sums, bits, score),
            num_tokens,
            num_words,
            num_segments,
            start,
            _clip_rank(num_tokens, 200 if sampled else 100 + 2 * kept),
            sample_step,
            SAMPLED=sampled,
            INVERSE_S=inverse_s,
            SAMPLE=sample_size,
            GROUPS=_GROUPS,
            COMPILED=not interpreted,
            num_warps=4,
            enable_fp_fusion=True,
            maxnreg=56,  # 9 programs a processor: what the loads' latency asks for
        )
        # Sampled waits more, for logits read again, and has more to gain from more programs.
        registers = 56 if sampled else 64
        programs = _programs(device, num_rows, 2 * 65536 // (128 * registers))
        candidate_cap = 512 if sampled or kept <= 96 else 1024
        capture_finish[(programs,)](
            *sources,
            *(ids_RK, logp_RK, inclusion_RK, all_tail_RT),
            *(entropy_R, top1_logp_R, gold_logp_R, count_R),
            *(sums, bits, score),
            new(programs, _LIST_CAP, dtype=torch.int32),
            new(programs, candidate_cap, dtype=torch.int32),
            new(programs, _NEAR_CAP if sampled else 0, dtype=torch.int32),
            new(programs, candidate_cap + 8, dtype=torch.int64),
            new(programs, candidate_cap),
            num_rows,
            num_tokens,
            num_words,
            num_segments,
            min_prob,
            math.log(min_prob) if min_prob > 0 else -1e29,
            threshold,
            math.log(threshold),
            start,
            SAMPLED=sampled,
            HAS_LABELS=labels_R is not None,
            K=kept,
            WIDTH=width,
            INVERSE_S=inverse_s,
            UNIT=_UNITS[logits_RV.dtype],
            LIST_CAP=_LIST_CAP,
            NEAR_CAP=_NEAR_CAP,
            CANDIDATE_CAP=candidate_cap,
            SIZE=2048,
            num_warps=4,
            enable_fp_fusion=True,
            maxnreg=registers,
        )
        if all_tail_RT is not tail_RT:
            tail_RT.copy_(all_tail_RT[:, columns])
    programs = _programs(device, num_rows, 2)
    capture_careful[(programs,)](
        *sources,
        temperature_T,
        *(ids_RK, logp_RK, inclusion_RK, tail_RT, entropy_R, top1_logp_R, gold_logp_R, count_R),
        new(programs, width + 8, dtype=torch.int64),
        new(programs, width),
        num_rows,
        num_tokens,
        len(grid),
        min_prob,
        threshold,
        1 / sample_temperature if sampled else 1.0,
        start,
        SAMPLED=sampled,
        HAS_LABELS=labels_R is not None,
        K=kept,
        WIDTH=width,
        T_WIDTH=triton.next_power_of_2(max(len(grid), 1)),
        BLOCK=1024 if interpreted else 4096,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return result
