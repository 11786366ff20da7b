"""Memory is used again only when nobody holds it."""

from __future__ import annotations

import pickle

import numpy as np
import torch

from logitcache.buffers import Buffers

SHAPE = (512, 512)


def test_memory_of_an_array_that_is_gone_is_used_again():
    buffers = Buffers()
    first = buffers.full(SHAPE, 1, np.float32)
    address = first.ctypes.data
    del first
    second = buffers.full(SHAPE, 2, np.int32)
    assert second.ctypes.data == address
    assert (second == 2).all()


def test_what_is_held_in_any_way_is_never_written_again():
    buffers = Buffers()
    held = [
        buffers.full(SHAPE, 1, np.float32),
        buffers.full(SHAPE, 2, np.float32)[3:5],
        torch.from_numpy(buffers.full(SHAPE, 3, np.float32)),
        torch.from_numpy(buffers.full(SHAPE, 4, np.float32))[0],
        buffers.full(SHAPE, 5, np.float32).view(np.int32).T,
    ]
    before = [np.asarray(array).copy() for array in held]
    for number in range(100):
        buffers.full(SHAPE, number, np.float32)
    for array, expected in zip(held, before, strict=True):
        np.testing.assert_array_equal(np.asarray(array), expected)


def test_a_copy_is_one_and_a_pool_comes_out_of_a_pickle_empty():
    buffers = Buffers()
    array = buffers.full(SHAPE, 7, np.float32)
    copied = buffers.copy(array)
    array.fill(8)
    assert (copied == 7).all()
    assert (pickle.loads(pickle.dumps(buffers)).full(SHAPE, 1, np.int32) == 1).all()
