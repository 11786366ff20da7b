"""Multiply a gradient in place by a scalar that lies on the device.

g <- s g. Bytes moved per row, bf16: 4 V; none but the scalar where s = 1, the usual case (the loss
is what backward() starts from), so nobody has to ask for its value on the host.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
