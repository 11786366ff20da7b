"""Captures on their way from the device to arrays of the host."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from logitcache_kernels import Capture

# By the names that ``support`` knows; what stands where a part is narrower than another.
_FIELDS = {
    "ids": ("ids_RK", -1),
    "logp": ("logp_RK", -torch.inf),
    "inclusion": ("inclusion_RK", 0),
    "count": ("count_R", 0),
    "tail": ("tail_log_partition_RT", 0),
    "entropy": ("entropy_R", 0),
    "top1": ("top1_logp_R", 0),
    "gold": ("gold_logp_R", 0),
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
            key: _end_to_end([getattr(part, name) for part in parts], fill)
            for key, (name, fill) in _FIELDS.items()
        }
        if on_gpu:
            torch.cuda.current_stream().synchronize()
    found = {key: (x.float() if x.is_floating_point() else x).numpy() for key, x in host.items()}
    width = max(int(found["count"].max(initial=1)), 1)
    for key in ("ids", "logp", "inclusion"):
        found[key] = found[key][:, :width]
    found["certain"] = found["inclusion"] >= np.float32(1)
    return found


def _end_to_end(parts: Sequence[torch.Tensor], fill: float) -> torch.Tensor:
    """The parts as one tensor of the host, on its way."""
    first = parts[0]
    width = [max(part.shape[1] for part in parts)] if first.ndim == 2 else []
    size = [sum(map(len, parts)), *width]
    host = torch.empty(size, dtype=first.dtype, pin_memory=first.is_cuda)
    if any(list(part.shape[1:]) != width for part in parts):
        host.fill_(fill)
    start = 0
    for part in parts:
        place = host[start : start + len(part)]
        (place[:, : part.shape[1]] if width else place).copy_(part, non_blocking=True)
        start += len(part)
    return host
