"""The oracle of ``capture``: what is kept of a teacher's distribution, written to be read.

Estimators (DESIGN section 5), with p the teacher's distribution and p^S the teacher tempered by S:

* sampled: r = max(p, p^S). Certain: p >= min_prob, or r >= threshold, or the largest p. Every
  other entry is kept with probability r / threshold, independently; a target divides by that
  inclusion, so its expectation is the full distribution at every temperature up to S.
* topk: the largest entries with p >= min_prob, at most top_k of them and at least one; all certain.
* full: everything, certain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .types import Capture
from .uniform import group_of, least_of_groups, numbers, row_keys

# Entries per position of the sampled estimator; its defaults stay below 245 (5 sigma).
MAX_KEPT = 256


def _log_softmax(z_RV: torch.Tensor) -> torch.Tensor:
    """log_softmax with a pairwise sum: torch's own, on a CPU, errs by 4e-5 over 151936 float32s."""
    return z_RV - z_RV.logsumexp(-1, keepdim=True)


def _sampled_keep(
    inclusion_RV: torch.Tensor, certain_RV: torch.Tensor, seed: int, position_ids_R: torch.Tensor
) -> torch.Tensor:
    """Mask of certain entries and of those whose uniform number is below their inclusion."""
    key0_R, key1_R = row_keys(seed, position_ids_R)
    ids_V = torch.arange(inclusion_RV.shape[1], device=inclusion_RV.device)
    group_V = group_of(ids_V)
    groups = torch.arange(int(group_V[-1]) + 128, device=ids_V.device)
    least_RG = least_of_groups(key0_R[:, None], groups)
    # u = (number + 1/2) / 2^32 < inclusion; most ids are decided by the least of their group.
    maybe_RV = (least_RG.float()[:, group_V] <= inclusion_RV * 4294967296.0 + 1024) & ~certain_RV
    rows, ids = maybe_RV.nonzero(as_tuple=True)
    uniform = numbers(key1_R[rows], ids, least_RG[rows, group_V[ids]]).double() + 0.5
    drawn = uniform < inclusion_RV[rows, ids].double() * 4294967296.0
    keep_RV = certain_RV.clone()
    keep_RV[rows, ids] = drawn
    return keep_RV


def _gather_kept(
    keep_RV: torch.Tensor, logp_RV: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and logp of kept entries, R x width, by falling logp, ties by lower id; their count."""
    num_rows = keep_RV.shape[0]
    rows, ids = keep_RV.nonzero(as_tuple=True)  # in order of row, then id
    count_R = torch.bincount(rows, minlength=num_rows)
    start_R = count_R.cumsum(0) - count_R
    slot = torch.arange(len(rows), device=rows.device) - start_R[rows]
    widest = max(int(count_R.max()) if num_rows else 0, 1)
    ids_RK = torch.full((num_rows, widest), -1, dtype=torch.int64, device=rows.device)
    logp_RK = torch.full((num_rows, widest), -torch.inf, dtype=logp_RV.dtype, device=rows.device)
    ids_RK[rows, slot] = ids
    logp_RK[rows, slot] = logp_RV[rows, ids]
    logp_RK, order = logp_RK.sort(dim=-1, descending=True, stable=True)
    ids_RK = ids_RK.gather(-1, order)
    if widest < width:
        ids_RK = torch.nn.functional.pad(ids_RK, (0, width - widest), value=-1)
        logp_RK = torch.nn.functional.pad(logp_RK, (0, width - widest), value=-torch.inf)
    return ids_RK[:, :width].to(torch.int32), logp_RK[:, :width], count_R.to(torch.int32)


def capture_reference(
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
) -> Capture:
    """See ``capture``. Computes in float64 for float64 logits, else in float32."""
    dtype = torch.float64 if logits_RV.dtype == torch.float64 else torch.float32
    z_RV = logits_RV.detach()[:, :num_tokens].to(dtype)
    bad_R = torch.isnan(z_RV).any(-1) | torch.isposinf(z_RV).any(-1) | torch.isneginf(z_RV).all(-1)
    z_RV = z_RV.masked_fill(bad_R[:, None], 0.0)

    logp_RV = _log_softmax(z_RV)
    p_RV = logp_RV.exp()
    entropy_R = -torch.where(p_RV > 0, p_RV * logp_RV, 0.0).sum(-1)
    top1_logp_R = logp_RV.amax(-1)
    top1_R1 = logp_RV.argmax(-1, keepdim=True)  # the first of equals, as torch documents
    inclusion_RV = torch.ones_like(p_RV)
    if estimator == "full":
        certain_RV = keep_RV = torch.ones_like(p_RV, dtype=torch.bool)
        width = num_tokens
    elif estimator == "topk":
        width = min(top_k, num_tokens)
        kth_R1 = logp_RV.topk(width).values[:, -1:]
        keep_RV = (p_RV >= min_prob) & (logp_RV >= kth_R1)
        keep_RV.scatter_(-1, top1_R1, True)
        # Among entries equal to the kth, those with the lower ids stay.
        tied_RV = keep_RV & (logp_RV == kth_R1)
        room_R1 = width - (keep_RV & ~tied_RV).sum(-1, keepdim=True)
        certain_RV = keep_RV = keep_RV & ~(tied_RV & (tied_RV.cumsum(-1) > room_R1))
    else:
        tempered_RV = _log_softmax(z_RV / sample_temperature).exp()
        ratio_RV = torch.maximum(p_RV, tempered_RV)
        certain_RV = (p_RV >= min_prob) | (ratio_RV >= threshold)
        certain_RV.scatter_(-1, top1_R1, True)
        # An inclusion of 1 marks a certain entry, so no quotient may be rounded up to it.
        below_one = 1.0 - torch.finfo(dtype).eps / 2
        inclusion_RV = torch.where(certain_RV, 1.0, (ratio_RV / threshold).clamp_max(below_one))
        keep_RV = _sampled_keep(inclusion_RV, certain_RV, seed, position_ids_R)
        width = min(MAX_KEPT, num_tokens)

    tail_RV = logp_RV.masked_fill(certain_RV, -torch.inf)
    tail_RT = torch.stack([torch.logsumexp(tail_RV / t, dim=-1) for t in temperatures], dim=-1)
    gold_R = torch.full_like(entropy_R, torch.nan)
    if labels_R is not None:
        has_label_R = (labels_R >= 0) & (labels_R < num_tokens)
        gathered_R = logp_RV.gather(-1, torch.where(has_label_R, labels_R, 0)[:, None].long())
        gold_R = torch.where(has_label_R, gathered_R[:, 0], gold_R)

    ids_RK, logp_RK, count_R = _gather_kept(keep_RV, logp_RV, width)
    inclusion_RK = inclusion_RV.gather(-1, ids_RK.clamp_min(0).long()).masked_fill(ids_RK < 0, 0.0)
    bad_R1, nan = bad_R[:, None], torch.nan
    return Capture(
        ids_RK.masked_fill(bad_R1, -1),
        logp_RK.masked_fill(bad_R1, -torch.inf),
        inclusion_RK.masked_fill(bad_R1, 0.0),
        tail_RT.masked_fill(bad_R1, nan),
        entropy_R.masked_fill(bad_R, nan),
        top1_logp_R.masked_fill(bad_R, nan),
        gold_R.masked_fill(bad_R, nan),
        count_R.masked_fill(bad_R, -1),
    )
