"""Small kernels around the loss: how many positions count, which carry a loss, what they add up
to, a late factor.

One program counts, lists or adds in a fixed order: 8 R, 5 R or 4 R bytes moved, in one launch where
torch's operations would take five, eight and two.

The late factor multiplies a gradient in place by a scalar that lies on the device, g <- s g. Bytes
moved per row, bf16: 4 V; none but the scalar where s = 1, the usual case (the loss is what
backward() starts from), so nobody has to ask for its value on the host.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_kernel(labels_ptr, per_item_ptr, num_rows, IGNORED: tl.constexpr, BLOCK: tl.constexpr):
    """1 / (number of labels that are not ignored, at least 1)."""
    at = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_rows, BLOCK):
        labels = tl.load(labels_ptr + start + at, mask=start + at < num_rows, other=IGNORED)
        count += (labels != IGNORED).to(tl.int32)
    tl.store(per_item_ptr, 1.0 / tl.maximum(tl.sum(count, 0), 1).to(tl.float32))


@triton.jit
def kept_kernel(
    strategy_ptr, index_ptr, count_ptr, num_rows, SKIPPED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Positions that are not skipped, in order, and zeros behind them; their number."""
    at = tl.arange(0, BLOCK)
    count = tl.zeros((), tl.int32)
    for start in range(0, num_rows, BLOCK):
        here = start + at < num_rows
        keep = tl.load(strategy_ptr + start + at, mask=here, other=SKIPPED) != SKIPPED
        before = tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(index_ptr + count + before, start + at, mask=keep)
        count += tl.sum(keep.to(tl.int32), 0)
    nothing = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_rows, BLOCK):
        rest = (start + at >= count) & (start + at < num_rows)
        tl.store(index_ptr + start + at, nothing, mask=rest)
    tl.store(count_ptr, count.to(tl.int64))


@triton.jit
def sum_kernel(loss_ptr, per_item_ptr, total_ptr, num_rows, BLOCK: tl.constexpr):
    """The positions' losses, added up and divided by the number of items."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_rows, BLOCK):
        total += tl.load(loss_ptr + start + at, mask=start + at < num_rows, other=0.0)
    tl.store(total_ptr, tl.sum(total, 0) * tl.load(per_item_ptr))


@triton.jit
def scale_kernel(g_ptr, factor_ptr, num_rows, V, stride, BLOCK: tl.constexpr):
    """Rows are dealt out in turn; all of a row's elements are multiplied in float32."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        at = tl.arange(0, BLOCK)
        for i in range(tl.program_id(0), num_rows, tl.num_programs(0)):
            row = g_ptr + (tl.zeros((), tl.int64) + i) * stride
            for start in range(0, V, BLOCK):
                here = start + at < V
                g = tl.load(row + start + at, mask=here).to(tl.float32) * factor
                tl.store(row + start + at, g.to(row.dtype.element_ty), mask=here)
