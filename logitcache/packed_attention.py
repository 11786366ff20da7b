"""Attention within the segments of packed rows.

Given a mask, SDPA computes all L x L products of a row, with keys repeated for each query head.
torch's flash attention for sequences of several lengths computes those within each segment alone:
decoder and its gradients of 0.5 billion parameters take 150 ms instead of 182 (docs/training.md).
Here it is an attention implementation of transformers, ``VARLEN``, for calls of which the host
knows the segments.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

varlen_attn: Any = None
with contextlib.suppress(ImportError):
    from torch.nn.attention.varlen import varlen_attn

VARLEN = "varlen"
TRIAL_ENDS = (10, 17)
# torch 2.11 finds out by itself, 2.12 asks.
_ASKS_FOR_GQA = varlen_attn is not None and (
    "enable_gqa" in inspect.signature(varlen_attn).parameters
)
_POSITIONS = ("position_ids", "cache_position")  # tensors that layers hand on, of no use here
_BOUNDS: ContextVar[tuple[torch.Tensor, int | None] | None] = ContextVar("bounds", default=None)


def segment_bounds(positions_BL: np.ndarray) -> np.ndarray:
    """Where segments begin in the flattened batch, and its end: int32 [S + 1]. A segment begins
    with each row and wherever a position id does not follow the one before it."""
    begins_BL = np.diff(positions_BL, axis=1, prepend=-2) != 1  # no position follows -2
    return np.append(np.flatnonzero(begins_BL), positions_BL.size).astype(np.int32)


def longest_segment(bounds: np.ndarray) -> int:
    """Positions in the longest segment of these bounds."""
    return int(np.diff(bounds).max(initial=0))


@contextlib.contextmanager
def known_bounds(
    bounds: torch.Tensor | None, num_rows: int, longest: int | None = None
) -> Iterator[None]:
    """Tell transformers what the segments of a batch are, as ``segment_bounds`` gives them, and the
    kernel how long they are at most, None: as long as rows. Without bounds transformers asks the
    position ids, and the host waits for the GPU.

    It has no argument for that, so the function that asks is replaced; one that has gone by another
    name stays as it is.
    """
    before = getattr(masking_utils, "find_packed_sequence_indices", None)
    if bounds is None or before is None:
        yield
        return
    packed = len(bounds) > num_rows + 1

    def segments(position_ids: torch.Tensor) -> torch.Tensor | None:
        first = position_ids[:, :1] - 1
        return (position_ids.diff(prepend=first) != 1).cumsum(-1) if packed else None

    masking_utils.find_packed_sequence_indices = segments
    token = _BOUNDS.set((bounds, longest) if packed else None)
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before
        _BOUNDS.reset(token)


def trial_batch(model: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two rows of two documents each, on the model's device, to try a model on: tokens and
    positions [2, 24], bounds [5]. The boundaries, TRIAL_ENDS, differ: some attention
    implementations pack batches of one row only."""
    device = next(model.parameters()).device
    length, generator = 24, torch.Generator().manual_seed(0)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(0, vocab_size, (len(TRIAL_ENDS), length), generator=generator)
    positions = np.stack([np.r_[:end, : length - end] for end in TRIAL_ENDS])
    bounds = torch.from_numpy(segment_bounds(positions))
    return tokens.to(device), torch.from_numpy(positions).to(device), bounds.to(device)


def use_varlen(model: Any) -> bool:
    """Let a model attend by ``VARLEN`` where it can; whether it does.

    It stays as it is if it is not on a GPU, if its attention is not SDPA, as transformers chooses
    it, or if a small packed batch comes out otherwise or, for a model in training, without a
    gradient: some want of their attention what this one has not (dropout, softcaps, choices of
    their own).
    """
    tokens, positions, bounds = trial_batch(model)
    device, config, was_training = tokens.device, model.config, model.training
    if (
        varlen_attn is None
        or _dtype_of_products(bounds, torch.bfloat16) is None
        or config._attn_implementation != "sdpa"
        or not getattr(model, "_supports_attention_backend", False)
        or getattr(config.get_text_config(), "attention_chunk_size", None)
    ):
        return False

    def hidden() -> torch.Tensor:
        batch = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
        with torch.autocast(device.type, torch.bfloat16), known_bounds(bounds, len(tokens)):
            return model.get_decoder()(**batch).last_hidden_state.float()

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            model.eval()
            with torch.no_grad():
                expected = hidden()
                model.set_attn_implementation(VARLEN)
                same = bool((hidden() - expected).abs().mean() <= 0.05 * expected.std())
            if was_training:
                model.train()
                _gradient_of_embeddings(model, hidden)
        except Exception:  # whatever a model makes of it
            same = False
    model.train(was_training)
    if not same:
        model.set_attn_implementation("sdpa")
    return same


def _gradient_of_embeddings(model: Any, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Of the sum of what a call gives: through all layers, with no room for weights' gradients."""
    found: list[torch.Tensor] = []

    def keep(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        found.append(output if output.requires_grad else output.requires_grad_())
        return output

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            return torch.autograd.grad(call().sum(), found[0])[0]
    finally:
        handle.remove()


def _dtype_of_products(bounds: torch.Tensor, dtype: torch.dtype) -> torch.dtype | None:
    """What attention computes in there; None where flash attention cannot."""
    if torch.is_autocast_enabled(bounds.device.type):
        dtype = torch.get_autocast_dtype(bounds.device.type)
    return dtype if bounds.is_cuda and dtype in (torch.bfloat16, torch.float16) else None


def _mask(**arguments: Any) -> torch.Tensor | None:
    """The bounds of segments, a view [N, 1 + W, S + 1]: none has more than N positions, and each of
    these sees W with itself, or where W is 0 all before it; not all layers know their window of
    themselves. SDPA's mask where bounds are not known, of no use, or not all there is to it."""
    known = _BOUNDS.get()
    if known is None:
        return masking_utils.sdpa_mask(**arguments)
    bounds, longest = known
    if (
        _dtype_of_products(bounds, arguments["dtype"]) is None
        or arguments.get("use_vmap")  # of functions of the model's own
    ):
        return masking_utils.sdpa_mask(**arguments)
    window = arguments.get("local_size") or 0
    return bounds.expand(longest or arguments["kv_length"], 1 + window, -1)


def _attend(
    module: Any,
    query_BHLD: torch.Tensor,
    key_BGLD: torch.Tensor,
    value_BGLD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface of an attention: [B, L, H, D], and no weights."""
    if attention_mask is None or attention_mask.dim() == 4:
        return sdpa_attention_forward(
            module, query_BHLD, key_BGLD, value_BGLD, attention_mask, dropout, scaling, **others
        )
    asked = ["dropout"] if dropout else []
    asked += [n for n in others if isinstance(others[n], torch.Tensor) and n not in _POSITIONS]
    asked += ["softcap"] if others.get("softcap") is not None else []
    if asked:
        raise ValueError(f"{VARLEN} attention: has no {', '.join(asked)}")
    longest, window, bounds = *attention_mask.shape[:2], attention_mask[0, 0]
    length, dtype = query_BHLD.shape[2], _dtype_of_products(bounds, query_BHLD.dtype)
    query, key, value = (
        x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query_BHLD, key_BGLD, value_BGLD)
    )
    grouped = {"enable_gqa": True} if _ASKS_FOR_GQA and key.shape[1] != query.shape[1] else {}
    out = varlen_attn(
        query, key, value, bounds, bounds, longest, longest,
        scale=scaling, window_size=(window - 2, 0), **grouped,
    )  # fmt: skip
    return out.unflatten(0, (-1, length)), None


AttentionInterface.register(VARLEN, _attend)
AttentionMaskInterface.register(VARLEN, _mask)
