"""Which implementation runs."""

from __future__ import annotations

import torch

from .types import _one_of


def choose_impl(impl: str, tensor: torch.Tensor) -> str:
    """Turn "auto", "triton" or "eager" into the implementation that runs on this tensor."""
    _one_of("impl", impl, ("auto", "triton", "eager"))
    if impl == "triton":
        raise ValueError('impl: this version has no Triton kernels yet; use "auto" or "eager"')
    return "eager"
