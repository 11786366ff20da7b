"""What the tests of the eager distillation loss share."""

from __future__ import annotations

import math

import torch
from dense_reference import sparse

from logitcache_kernels import SparseTeacher, distill_loss

TEMPERATURES = (0.5, 1.0, 1.5, 2.0, 4.0)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
WEIGHTS = {"alpha": 0.3, "beta": 0.7, "gamma": 0.4}
BLENDED, T1_ONLY, GOLD_FALLBACK, SKIP = range(4)
NAN, INF = math.nan, math.inf


def teacher(probabilities, temperature=1.0, support=None, **options) -> SparseTeacher:
    """A teacher from rows of probabilities, all tokens kept unless a support is given."""
    logp_RV = torch.tensor(probabilities, dtype=torch.float64).log()
    tokens = list(range(logp_RV.shape[1])) if support is None else support
    return sparse(logp_RV, [tokens] * len(logp_RV), temperature, junk=False, **options)


def gradient(logits_RV, *args, **options) -> torch.Tensor:
    z = logits_RV.detach().clone().requires_grad_()
    distill_loss(z, *args, **options).loss.backward()
    return z.grad


def full_case(temperature: float, seed: int = 0, vocab_size: int = 9):
    g = torch.Generator().manual_seed(seed)
    logp = torch.log_softmax(2 * torch.randn(1, vocab_size, generator=g, dtype=torch.float64), -1)
    z = torch.randn(1, vocab_size, generator=g, dtype=torch.float64)
    return logp, z, sparse(logp, [list(range(vocab_size))], temperature, junk=False)
