"""``linear_distill_loss`` around the row kernel: gate first, then chunks of positions.

Per chunk of n positions that carry a loss (h: n x D, W: V x D, dtype of the products bf16):

    z = h W'                  cuBLAS   2 n V D operations   2 n V bytes written
    g = dloss/dz, in place    Triton   ``distill_rows``     2 n V read, 2 n V written
    dh = g W                  cuBLAS   2 n V D              2 n V read
    dW += g' h, in float32    cuBLAS   2 n V D              2 n V read, 8 V D for the sum

The floor is the three products, 6 R V D operations; every chunk after the first adds 8 V D bytes
for the float32 sum, so chunks are as large as the memory asked for allows. One chunk needs no
float32 sum: dW comes straight out of its product, which accumulates in float32 inside.

Positions without loss (ignored, SKIP) are left out of the products. Their number must be known on
the host to size the products: the one place where the host waits for the GPU, for the gate alone,
while the logits of the first positions kept are computed. Inside a CUDA graph nothing is left out
and nothing waits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from .distill_fused import scale_in_place
from .distill_launch import Row, add_up, gate, launch, positions_kept
from .types import DistillOutput

# Of a chunk's logits. 4096 rows of 151936 bf16 logits are 1.16 GiB, and on an H200 the products
# lose little by that split; at most this share of what is free.
_CHUNK_BYTES = 5 * 2**28
_SHARE_OF_FREE = 0.25
_ROW_MULTIPLE = 128  # tiles of the matrix units
# Positions whose logits are computed before the host knows how many there are: enough to keep the
# GPU busy until it does, and no loss where fewer are kept.
_LEAD = 1024


class Head(NamedTuple):
    """How hidden states become logits."""

    softcap: float | None
    scale: float
    logits_dtype: torch.dtype  # of the chunk
    product_dtype: torch.dtype  # of the operands of all three products


def _room(device: torch.device) -> int:
    """Bytes that a chunk's logits may take."""
    if device.type != "cuda":
        return _CHUNK_BYTES
    return min(_CHUNK_BYTES, int(torch.cuda.mem_get_info(device)[0] * _SHARE_OF_FREE))


def choose_chunk(num_rows: int, vocab_size: int, element_size: int, room: int) -> int:
    """Positions per chunk, whole tiles of the matrix units: chunks whose logits fit into room
    bytes, equal ones where no position is left out."""
    num_rows = max(num_rows, 1)
    most = max(room // (vocab_size * element_size), _ROW_MULTIPLE)
    even = triton.cdiv(num_rows, triton.cdiv(num_rows, most))
    return triton.cdiv(even, _ROW_MULTIPLE) * _ROW_MULTIPLE


class _Kept:
    """Positions that carry a loss, in order; their number is on its way to the host.

    Inside a CUDA graph nothing can come back: there all positions are kept.
    """

    def __init__(self, strategy_R: torch.Tensor):
        self.num_rows = len(strategy_R)
        self.index_R: torch.Tensor | None = None
        self._count: torch.Tensor | None = None
        self._there: torch.cuda.Event | None = None
        if strategy_R.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        # As many as there are positions, the surplus pointing at the first: nothing waits for it.
        self.index_R, self._count = positions_kept(strategy_R)
        if strategy_R.is_cuda:
            there = torch.empty((), dtype=torch.int64, pin_memory=True)
            self._count = there.copy_(self._count, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def wait(self) -> tuple[int, torch.Tensor | None]:
        """Their number, and which they are (None: all)."""
        if self._there is not None:
            self._there.synchronize()
        count = self.num_rows if self._count is None else int(self._count)
        if self.index_R is None or count == self.num_rows:
            return count, None
        return count, self.index_R[:count]


def _product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: int, alpha: float) -> None:
    """out <- beta out + alpha a b, accumulated and written in out's dtype."""
    if a.dtype == out.dtype:
        if beta == 0 and alpha == 1.0:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    elif out.is_cuda:
        if beta == 0 and alpha == 1.0:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:  # the CPU knows no mixed products
        sums = alpha * (a.to(out.dtype) @ b.to(out.dtype))
        out.copy_(sums + out if beta else sums)


def _logits(
    out: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    head: Head,
) -> None:
    if bias is not None and hidden.dtype == out.dtype:
        bias = bias.to(out.dtype)
        torch.addmm(bias, hidden, weight.T, beta=head.scale, alpha=head.scale, out=out)
        return
    _product(out, hidden, weight.T, 0, head.scale)
    if bias is not None:
        out += head.scale * bias.to(out.dtype)


def _narrow(sums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float32 sums as a 16-bit tensor in the memory they lie in: dW twice would be the peak.

    Elements [n, 2n) go to where [n/2, n) lay, which have gone before.
    """
    wide = sums.view(-1)
    narrow = wide.view(dtype)[: len(wide)]
    done = min(2**16, len(wide))
    narrow[:done] = wide[:done].clone()
    while done < len(wide):
        stop = min(2 * done, len(wide))
        narrow[done:stop] = wide[done:stop]
        done = stop
    return narrow.view(sums.shape)


class _Plan(NamedTuple):
    """What does not depend on the gate, made before there is an answer."""

    weight: torch.Tensor  # in the products' dtype
    grad_hidden: torch.Tensor | None
    buffer: torch.Tensor  # a chunk's logits, then their gradient
    chunk: int


def _plan(hidden_RD: torch.Tensor, weight_VD: torch.Tensor, head: Head, chunk: int) -> _Plan:
    num_rows, vocab_size, device = len(hidden_RD), len(weight_VD), hidden_RD.device
    width = triton.cdiv(vocab_size, 64) * 64  # rows begin at aligned addresses
    return _Plan(
        weight_VD.detach().to(head.product_dtype),
        torch.empty_like(hidden_RD) if hidden_RD.requires_grad else None,
        torch.empty(min(chunk, num_rows), width, dtype=head.logits_dtype, device=device),
        chunk,
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, bias_V, row, head, plans, kept, diagnostics):
        ctx.factor = per_item = row.per_item
        ctx.late = head.product_dtype == torch.float16  # whose range 1 / num_items would leave
        if ctx.late:
            row = row._replace(per_item=torch.ones_like(per_item))
        wants = [ctx.needs_input_grad[i] for i in range(3)]
        vocab_size, device = weight_VD.shape[0], hidden_RD.device
        weight, grad_hidden, buffer, chunk = plans.pop()
        lead = 0
        if kept.index_R is not None:
            lead = min(_LEAD, len(buffer))
            hidden = hidden_RD.detach().index_select(0, kept.index_R[:lead]).to(head.product_dtype)
            _logits(buffer[:lead, :vocab_size], hidden, weight, bias_V, head)
        num_rows, index_R = kept.wait()
        if grad_hidden is not None and index_R is not None:
            grad_hidden.zero_()
        grad_weight = grad_bias = None
        if wants[1]:
            # One product fills it; several are summed in float32.
            sums = weight_VD.dtype if num_rows <= chunk else torch.float32
            fill = torch.zeros_like if num_rows == 0 else torch.empty_like
            grad_weight = fill(weight_VD, dtype=sums, memory_format=torch.contiguous_format)
        if wants[2]:
            grad_bias = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        for start in range(0, num_rows, chunk):
            stop = min(start + chunk, num_rows)
            rows = None if index_R is None else index_R[start:stop]
            hidden = hidden_RD.detach()
            hidden = hidden[start:stop] if rows is None else hidden.index_select(0, rows)
            hidden = hidden.to(head.product_dtype)
            logits = buffer[: stop - start, :vocab_size]
            done = min(lead, stop) if start == 0 else 0
            if done < stop - start:
                _logits(logits[done:], hidden[done:], weight, bias_V, head)
            if rows is None:
                rows = torch.arange(start, stop, dtype=torch.int32, device=device)
            launch(logits, logits, row, diagnostics, index_R=rows, softcap=head.softcap)
            if not any(wants):
                continue
            gradient = logits.to(head.product_dtype)
            if grad_hidden is not None:
                if index_R is None and hidden_RD.dtype in (head.product_dtype, torch.float32):
                    _product(grad_hidden[start:stop], gradient, weight, 0, head.scale)
                else:
                    part = hidden.new_empty(hidden.shape)
                    _product(part, gradient, weight, 0, head.scale)
                    grad_hidden.index_copy_(0, rows.long(), part.to(grad_hidden.dtype))
            if grad_weight is not None:
                _product(grad_weight, gradient.T, hidden, int(start > 0), head.scale)
            if grad_bias is not None:
                grad_bias += head.scale * gradient.sum(0, dtype=torch.float32)
        buffer = logits = gradient = hidden = weight = None  # before dW is copied to its dtype
        if grad_weight is not None and grad_weight.dtype != weight_VD.dtype:
            grad_weight = _narrow(grad_weight, weight_VD.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias_V.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(*diagnostics[3:5])
        ctx.set_materialize_grads(False)
        return (add_up(diagnostics[0], per_item), *diagnostics[3:5])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_unused):
        if grad_loss is None:  # nothing came back
            return (None,) * 8
        gradients = ctx.saved_tensors
        if ctx.late:
            grad_loss = grad_loss * ctx.factor
        for gradient in gradients:
            if gradient is not None:
                scale_in_place(gradient if gradient.ndim == 2 else gradient[None], grad_loss)
        return (*gradients, None, None, None, None, None)


def linear_distill_loss_fused(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    row: Row,
    head: Head,
    chunk: int | None,
    max_chunk: int | None,
) -> DistillOutput:
    """See ``linear_distill_loss``; hidden states in float32, bfloat16 or float16."""
    num_rows, vocab_size = len(hidden_RD), len(weight_VD)
    diagnostics = gate(row, vocab_size)
    _, strategy_R, js_R, _, _, weight_R = diagnostics
    if not torch.is_grad_enabled():
        hidden_RD, weight_VD = hidden_RD.detach(), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    if chunk is None:
        size = head.logits_dtype.itemsize
        chunk = choose_chunk(num_rows, vocab_size, size, _room(hidden_RD.device))
        chunk = chunk if max_chunk is None else min(chunk, max_chunk)
    plans = [_plan(hidden_RD, weight_VD, head, chunk)]  # a list, to be let go of inside
    kept = _Kept(strategy_R)
    loss, kd_R, ce_R = _Linear.apply(
        hidden_RD, weight_VD, bias_V, row, head, plans, kept, diagnostics
    )
    return DistillOutput(loss, strategy_R, js_R, kd_R, ce_R, weight_R)
