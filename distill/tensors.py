"""Tensors and state in files without pickle: safetensors written tensor by tensor, and nested state
(of an optimizer, of random generators) as JSON with its tensors aside.

safetensors' own writer wants all tensors in host memory at once and reports a full disk as an error
of its own kind; this one copies one tensor at a time from its device and raises OSError.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from logitcache.errors import UsageError

# Names of the format, https://huggingface.co/docs/safetensors.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PIECE = 1 << 24  # bytes written at once


def tensor_file(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes]:
    """The bytes of tensors, on any device, as a safetensors file, in parts that are copied from
    there when they are asked for. UsageError at once for a dtype or a kind of tensor that the
    format does not know."""
    # Wide elements first: then each starts at a multiple of its size, as its readers expect.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise UsageError(
                f"{name}: a {type(tensor).__name__} of {tensor.dtype} cannot be written as "
                "safetensors",
                "choose another optimizer, or save_strategy=no",
            )
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    head = json.dumps(header, separators=(",", ":")).encode("utf-8")
    head += b" " * (-len(head) % 8)

    def parts() -> Iterator[bytes]:
        yield struct.pack("<Q", len(head)) + head
        for name in names:
            content = tensors[name].detach().cpu().contiguous()
            content = content.as_strided((content.numel(),), (1,)).view(torch.uint8)
            for piece in content.split(_PIECE):
                yield piece.numpy().tobytes()

    return parts()


def pack(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """Turn nested state into what JSON can hold; its tensors go into ``tensors`` under names that
    start with ``name``. Keys of dicts may be numbers. TypeError for what is neither."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [[key, pack(part, tensors, f"{name}.{key}")] for key, part in value.items()]
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        parts = [pack(part, tensors, f"{name}.{at}") for at, part in enumerate(value)]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(float(value))}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: {type(value).__name__} cannot be written to a checkpoint")


def unpack(packed: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The state that pack() was given."""
    if isinstance(packed, list):
        return [unpack(part, tensors) for part in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: unpack(part, tensors) for key, part in value}
    if kind == "tuple":
        return tuple(unpack(part, tensors) for part in value)
    return float(value)
