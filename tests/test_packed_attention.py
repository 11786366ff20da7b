"""Attention segment by segment: what transformers hands to it, with the kernel that only a GPU has
replaced by its definition."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from test_families import FAMILIES, SMALL, L, make
from training_runs import make_inputs

from distill.student import attach_loss, to_inputs
from logitcache import open_store, packed_attention
from logitcache.causal_lm import hidden_states, load_causal_lm
from logitcache.packed_attention import (
    VARLEN,
    known_bounds,
    longest_segment,
    segment_bounds,
    use_varlen,
)
from logitcache_kernels import DistillSpec

ENDS = (10, 17)
POSITIONS = np.stack([np.concatenate((np.arange(n), np.arange(L - n))) for n in ENDS])
BOUNDS = torch.from_numpy(segment_bounds(POSITIONS))
TOKENS = torch.randint(0, 61, (2, L), generator=torch.Generator().manual_seed(3))
# Its softcap of attention scores has no SDPA.
WITH_SDPA = [name for name in FAMILIES if "Gemma2" not in name]


def definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Of torch's varlen_attn, which CALLS counts: [T, H, D] from [T, H, D] and twice [T, G, D]."""
    CALLS.append((max_q, *window_size))
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k >= int(cu_seq_q.diff().max())
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = []
    for start, stop in itertools.pairwise(cu_seq_q.tolist()):
        scores = scale * torch.einsum("qhd,khd->hqk", query[start:stop], key[start:stop])
        back = torch.arange(len(scores[0]))[:, None] - torch.arange(len(scores[0]))
        seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, value[start:stop]))
    return torch.cat(out)


CALLS: list[tuple[int, int, int]] = []
LONGEST = 17
dtype_of_products = packed_attention._dtype_of_products


@pytest.fixture(autouse=True)
def _kernel_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setattr(packed_attention, "varlen_attn", definition)
    monkeypatch.setattr(packed_attention, "_ASKS_FOR_GQA", True)
    monkeypatch.setattr(packed_attention, "_dtype_of_products", lambda bounds, dtype: dtype)


def hidden_and_gradients(
    model: Any, bounds: torch.Tensor | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    hidden = hidden_states(model, TOKENS, torch.from_numpy(POSITIONS), bounds, LONGEST)
    weights = [p for p in model.get_decoder().parameters() if p.requires_grad]
    return hidden, list(torch.autograd.grad(hidden.square().mean(), weights, allow_unused=True))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", WITH_SDPA)
def test_it_is_sdpa_with_a_mask(name: str, recompute: bool) -> None:
    """recompute: in the backward pass no context knows the bounds any more."""
    model = make(name)
    if "Gemma3" in name:
        model.config.sliding_window = 4  # narrower than a segment
    assert model.config._attn_implementation == "sdpa"
    expected, theirs = hidden_and_gradients(model, None)
    assert not CALLS
    model.set_attn_implementation(VARLEN)
    if recompute:
        recompute_all = getattr(model, "activation_checkpointing_enable", None)
        (recompute_all or model.gradient_checkpointing_enable)()
    found, ours = hidden_and_gradients(model, BOUNDS)
    assert len(CALLS) == 2 * (1 + recompute)
    assert set(CALLS) == {(LONGEST, 3 if "Gemma3" in name else -1, 0)}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-5)


def test_a_window_is_that_of_the_mask() -> None:
    """Layers of this family do not hand on the window that they have."""
    torch.manual_seed(0)
    moe = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    moe |= {"shared_expert_intermediate_size": 16, "sliding_window": 4, "use_sliding_window": True}
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Qwen2MoeConfig(**SMALL, **moe, layer_types=kinds)
    model = transformers.Qwen2MoeForCausalLM(config).eval()
    with torch.no_grad():
        expected = hidden_states(model, TOKENS, torch.from_numpy(POSITIONS), BOUNDS)
        model.set_attn_implementation(VARLEN)
        found = hidden_states(model, TOKENS, torch.from_numpy(POSITIONS), BOUNDS)
    assert CALLS == [(L, 3, 0), (L, -1, 0)]  # as long as a row, where it is not told
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_students_and_teachers_tell_the_kernel_of_the_longest_segment(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)  # with a build, in one batch
    batch = open_store(inputs / "store")[:]
    longest = np.diff(segment_bounds(batch.positions)).max()
    assert longest < batch.positions.shape[1]
    assert {call[0] for call in CALLS} == {L, longest}, "trial and build"
    given = to_inputs(batch, 1.0)
    assert given["longest"] == longest
    model = load_causal_lm(inputs / "one", torch.float32, torch.device("cpu")).train()
    attach_loss(model, DistillSpec(temperature=1.0))
    assert use_varlen(model)
    CALLS.clear()
    model(**given)
    assert {call[0] for call in CALLS} == {longest}


def test_masks_of_a_models_own_making_stay_masks() -> None:
    model = make("Llama")
    model.set_attn_implementation(VARLEN)
    ask = {"config": model.config, "inputs_embeds": torch.zeros(2, L, 32), "attention_mask": None}
    ask |= {"past_key_values": None, "position_ids": torch.from_numpy(POSITIONS)}
    with known_bounds(BOUNDS, 2):
        usual = packed_attention.masking_utils.create_causal_mask(**ask)
        own = packed_attention.masking_utils.create_causal_mask(
            **ask, and_mask_function=lambda batch, head, query, key: key > 0
        )
    assert usual.shape == (L, 1, len(BOUNDS))
    assert usual.data_ptr() == BOUNDS.data_ptr()
    assert own.shape == (2, 1, L, L)


def test_without_bounds_or_with_one_segment_a_row_it_is_sdpa_itself() -> None:
    model = make("Llama")
    model.set_attn_implementation(VARLEN)
    hidden_and_gradients(model, None)
    whole = segment_bounds(np.tile(np.arange(L), (2, 1)))
    hidden_states(model, TOKENS, torch.arange(L).expand(2, L), torch.from_numpy(whole))
    model.generate(TOKENS, max_new_tokens=2, do_sample=False)
    assert not CALLS


@pytest.mark.parametrize(
    "asked",
    [
        {"dropout": 0.1},
        {"softcap": 50.0},
        {"s_aux": torch.ones(4)},
        {"block_indices": torch.zeros(2, 4, L, 1)},
    ],
)
def test_what_it_has_not_is_refused(asked: dict[str, Any]) -> None:
    query, mask = torch.zeros(2, 4, L, 8), BOUNDS.expand(L, 1, -1)
    with pytest.raises(ValueError, match="has no "):
        packed_attention._attend(torch.nn.Module(), query, query, query, mask, **asked)


def test_a_model_attends_so_where_a_small_batch_comes_out_the_same() -> None:
    model = make("Gemma3")
    assert use_varlen(model)
    assert model.config._attn_implementation == VARLEN
    assert model.training
    assert len(CALLS) == 2 * 2  # layers, and a gradient
    assert not use_varlen(make("Gemma2 softcap"))


def test_dropout_of_attention_alone_is_in_the_way_and_no_random_state_moves() -> None:
    model = make("GPT-2 tied")
    before = torch.random.get_rng_state()
    model.transformer.drop.p = 0.1
    assert use_varlen(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    model = make("GPT-2 tied")
    for layer in model.transformer.h:
        layer.attn.attn_dropout.p = 0.1
    assert not use_varlen(model)
    assert use_varlen(model.eval())
    assert not model.training


def test_a_model_without_a_gradient_keeps_sdpa_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = definition(*args, **kwargs)
        if out.requires_grad:
            raise RuntimeError("head dimension 256 has no backward pass here")
        return out

    monkeypatch.setattr(packed_attention, "varlen_attn", without)
    model = make("Llama")
    assert not use_varlen(model)
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    assert use_varlen(model.eval())
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_a_model_whose_masks_are_chunks_stays_as_it_is() -> None:
    model = make("Llama")
    model.config.attention_chunk_size = 8
    assert not use_varlen(model)


@pytest.mark.parametrize("outcome", [IndexError("of a model's own"), torch.zeros(48, 4, 8)])
def test_a_model_that_makes_something_else_of_it_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, outcome: Exception | torch.Tensor
) -> None:
    kernel = Mock(side_effect=[outcome, outcome])
    monkeypatch.setattr(packed_attention, "varlen_attn", kernel)
    model = make("Llama")
    assert not use_varlen(model)
    assert kernel.called
    assert model.config._attn_implementation == "sdpa"


def test_a_model_without_a_decoder_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("Llama")
    monkeypatch.setattr(model, "get_decoder", lambda: model)  # gives logits, as some families do
    assert not use_varlen(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_on_a_cpu_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "_dtype_of_products", dtype_of_products)
    model = make("Llama")
    assert not use_varlen(model)
    assert not CALLS
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("positions", "bounds"),
    [
        ([[0, 1, 2], [0, 1, 2]], [0, 3, 6]),
        ([[0, 1, 0], [0, 0, 0]], [0, 2, 3, 4, 5, 6]),
        ([[5, 6, 0], [7, 8, 9]], [0, 2, 3, 6]),  # the rest of a document begins a row
        ([[0], [0]], [0, 1, 2]),
    ],
)
def test_segments_begin_where_positions_do_not_go_on(
    positions: list[list[int]], bounds: list[int]
) -> None:
    found = segment_bounds(np.array(positions, dtype=np.int64))
    assert found.dtype == np.int32
    assert found.tolist() == bounds
    assert longest_segment(found) == max(b - a for a, b in itertools.pairwise(bounds))


def test_bounds_are_known_inside_their_context_alone() -> None:
    before = packed_attention.masking_utils.find_packed_sequence_indices
    with known_bounds(BOUNDS, 2, LONGEST):
        assert packed_attention._BOUNDS.get() == (BOUNDS, LONGEST)
    assert packed_attention._BOUNDS.get() is None
    assert packed_attention.masking_utils.find_packed_sequence_indices is before
