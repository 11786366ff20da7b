"""Captures on their way from the device to arrays of the host."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from logitcache_kernels import Capture

# By the names that ``support`` knows.
_FIELDS = {
    "ids": "ids_RK",
    "logp": "logp_RK",
    "inclusion": "inclusion_RK",
    "count": "count_R",
    "tail": "tail_log_partition_RT",
    "entropy": "entropy_R",
    "top1": "top1_logp_R",
    "gold": "gold_logp_R",
}


def fetch(parts: Sequence[Capture], stream: torch.cuda.Stream | None = None) -> dict[str, Any]:
    """What the store keeps of captured positions, parts end to end, as numpy arrays.

    ids int32, logp, inclusion float32 and certain bool [P, K], K the widest support; count int32,
    entropy, top1 and gold float32 [P]; tail float32 [P, T]. From a GPU only whole tensors are
    copied, by the stream, into pinned memory, and waited for once: to cut them there would take
    kernels, each of which waits until a teacher's matrix product lets go of the GPU.
    """
    on_gpu = parts[0].ids_RK.is_cuda
    with torch.cuda.stream(stream) if on_gpu else contextlib.nullcontext():
        host = {
            key: _end_to_end([getattr(part, name) for part in parts])
            for key, name in _FIELDS.items()
        }
        if on_gpu:
            torch.cuda.current_stream().synchronize()
    found = {key: (x.float() if x.is_floating_point() else x).numpy() for key, x in host.items()}
    width = max(int(found["count"].max(initial=1)), 1)
    for key in ("ids", "logp", "inclusion"):
        # Masks of rows that do not lie end to end take three times as long.
        found[key] = np.ascontiguousarray(found[key][:, :width])
    found["certain"] = found["inclusion"] >= np.float32(1)
    return found


def _end_to_end(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parts as one tensor of the host, on its way."""
    first = parts[0]
    size = (sum(map(len, parts)), *first.shape[1:])
    host = torch.empty(size, dtype=first.dtype, pin_memory=first.is_cuda)
    start = 0
    for part in parts:
        host[start : start + len(part)].copy_(part, non_blocking=True)
        start += len(part)
    return host
