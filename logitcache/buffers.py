"""Memory of batches, used again once nobody holds them any more.

A padded batch takes tens of megabytes. Fresh pages of the system cost more than the decoding that
fills them (2026-11: 4400 page faults, 30 of 53 ms for four rows of 2048 tokens and two teachers).
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np

_KEPT = 96  # buffers: up to six a teacher and batch, and as many batches as are read ahead
_SMALL = 1 << 18  # bytes; below, the allocator keeps its pages itself


def _references(buffers: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(buffer) for buffer in buffers]


# Of a buffer that is in no array; what Python itself holds meanwhile differs by its version.
(_FREE,) = _references([np.empty(1, np.uint8)])


class Buffers:
    """Hands out arrays. Any thread may ask; an array may be kept for as long as one likes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffers: list[np.ndarray] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Buffers, ()  # its lock has no pickle

    def full(self, shape: tuple[int, ...], value: Any, dtype: Any) -> np.ndarray:
        """Like np.full."""
        array = self._empty(shape, np.dtype(dtype))
        array.fill(value)
        return array

    def copy(self, array: np.ndarray) -> np.ndarray:
        """Like np.copy."""
        copied = self._empty(array.shape, array.dtype)
        np.copyto(copied, array)
        return copied

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        size = int(np.prod(shape)) * dtype.itemsize
        if size < _SMALL:
            return np.empty(shape, dtype)
        with self._lock:
            buffer = self._free(size)
            array = buffer[:size].view(dtype).reshape(shape)  # holds the buffer from here on
            del buffer
        return array

    def _free(self, size: int) -> np.ndarray:
        for number, references in enumerate(_references(self._buffers)):
            if references == _FREE and size <= len(self._buffers[number]) <= 2 * size:
                return self._buffers[number]
        made = np.empty(size + size // 4, np.uint8)
        self._buffers = [*self._buffers[-(_KEPT - 1) :], made]
        return made
