"""Which implementation runs."""

from __future__ import annotations

import importlib.util

import torch

from .types import _one_of

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _interpreted() -> bool:
    """Whether Triton's interpreter is on (TRITON_INTERPRET=1), which runs kernels on a CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def choose_impl(impl: str, tensor: torch.Tensor) -> str:
    """Turn "auto" into the implementation that runs on this tensor: "triton" on CUDA, else "eager".

    float64 is computed by the oracle alone. ValueError where impl="triton" cannot run.
    """
    _one_of("impl", impl, ("auto", "triton", "eager"))
    if impl == "eager":
        return "eager"
    # torch.compile can trace neither this look nor the one at the interpreter, and needs Triton.
    installed = torch.compiler.is_compiling() or importlib.util.find_spec("triton") is not None
    fits = tensor.dtype in _TRITON_DTYPES
    if impl == "auto":
        return "triton" if installed and fits and tensor.is_cuda else "eager"
    if not installed:
        raise ValueError('impl="triton": Triton is not installed; use "auto" or "eager"')
    if not fits:
        raise ValueError(
            'impl="triton": expected float32, bfloat16 or float16, '
            f'found {tensor.dtype}; use "auto" or "eager"'
        )
    if not tensor.is_cuda and not torch.compiler.is_compiling() and not _interpreted():
        raise ValueError(
            f'impl="triton": expected a CUDA tensor, found one on {tensor.device}; use "auto" or '
            '"eager", or set TRITON_INTERPRET=1 to run the kernels in Triton\'s interpreter'
        )
    return "triton"
