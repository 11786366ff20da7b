"""Attention segment by segment on a GPU: as near to float32 as SDPA with a mask is."""

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from test_families import FAMILIES, V, make
from test_packed_attention import WITH_SDPA

from logitcache.causal_lm import hidden_states
from logitcache.packed_attention import VARLEN, segment_bounds, use_varlen

pytestmark = pytest.mark.gpu

POSITIONS = np.stack(
    [np.concatenate([np.arange(n) for n in lengths]) for lengths in ((40, 1, 23), (7, 57))]
)
BOUNDS = torch.from_numpy(segment_bounds(POSITIONS)).cuda()
LONGEST = 57
TOKENS = torch.randint(0, V, POSITIONS.shape, generator=torch.Generator().manual_seed(4)).cuda()


def hidden_and_gradient(model: torch.nn.Module, half: bool) -> torch.Tensor:
    """End to end in one vector, float32."""
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        where = torch.from_numpy(POSITIONS).cuda()
        hidden = hidden_states(model, TOKENS, where, BOUNDS, LONGEST).float()
    weights = [p for p in model.get_decoder().parameters() if p.requires_grad]
    found = torch.autograd.grad(hidden.square().mean(), weights, allow_unused=True)
    return torch.cat([hidden.flatten(), *(g.float().flatten() for g in found if g is not None)])


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_as_exact_as_sdpa(name: str) -> None:
    model = make(name).cuda()
    if name not in WITH_SDPA:
        assert not use_varlen(model)
        return
    exact = hidden_and_gradient(model, half=False)
    masked = hidden_and_gradient(model, half=True)
    assert use_varlen(model)
    assert model.config._attn_implementation == VARLEN
    assert torch.equal(hidden_and_gradient(model, half=False), exact)  # float32: SDPA as before
    alone = hidden_and_gradient(model, half=True)
    assert not torch.equal(alone, masked)
    assert (alone - exact).norm() <= 1.3 * (masked - exact).norm()


def test_a_model_with_dropout_keeps_sdpa() -> None:
    model = make("GPT-2 tied").cuda()
    for layer in model.get_decoder().h:
        layer.attn.attn_dropout.p = 0.1
    assert not use_varlen(model)
    assert use_varlen(model.eval())


def test_what_a_model_learns_of_a_segment_has_nothing_of_the_others() -> None:
    model = make("Llama").cuda()
    assert use_varlen(model)
    where = torch.from_numpy(POSITIONS).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        found = hidden_states(model, TOKENS, where, BOUNDS)[0, 41:]
        changed = TOKENS.clone()
        changed[0, :41] = (changed[0, :41] + 1) % V
        again = hidden_states(model, changed, where, BOUNDS)[0, 41:]
    assert torch.equal(found, again)
