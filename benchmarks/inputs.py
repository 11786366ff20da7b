"""Logits shaped like a teacher's: what is measured on noise is not what a user gets."""

from __future__ import annotations

import torch

# Exponent s ~ N(mean, spread) in [1.02, 6]; b = exp(N(mean, spread)); mean extra logit of the
# first. Fitted to Qwen2.5-Coder on V = 151936: strong teacher on web text and chat, weak teacher
# on web text.
SHAPES = {
    "web": (1.81, 0.28, 0.75, 0.25, 0.86),
    "chat": (2.28, 0.21, 0.48, 0.31, 1.33),
    "weak": (1.59, 0.20, 0.74, 0.61, 0.98),
}


def teacher_logits(
    num_rows: int,
    vocab: int,
    shape: str = "web",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: torch.device | str = "cuda",
) -> torch.Tensor:
    """Draw R x V logits: logit of rank r is -s log(r + b - 1), ids in random order.

    The order is one random permutation per call, turned by a random offset in each row. Works in
    slices, so that nothing larger than the result is held for long.
    """
    generator = torch.Generator(device).manual_seed(seed)
    s_mean, s_spread, b_mean, b_spread, extra = SHAPES[shape]

    def normal(mean: float, spread: float) -> torch.Tensor:
        drawn = torch.randn(num_rows, 1, generator=generator, device=device)
        return drawn * spread + mean

    slope_R1 = normal(s_mean, s_spread).clamp(1.02, 6.0)
    offset_R1 = normal(b_mean, b_spread).exp()
    first_R = torch.empty(num_rows, device=device).exponential_(1 / extra, generator=generator)
    turn_R1 = torch.randint(0, vocab, (num_rows, 1), generator=generator, device=device)
    order_V = torch.randperm(vocab, generator=generator, device=device)
    place_V = torch.arange(vocab, device=device)
    logits_RV = torch.empty(num_rows, vocab, dtype=dtype, device=device)
    for start in range(0, num_rows, 512):
        part = slice(start, start + 512)
        rank_RV = order_V[(place_V + turn_R1[part]) % vocab]
        z_RV = -slope_R1[part] * torch.log(rank_RV + offset_R1[part])
        z_RV += first_R[part, None] * (rank_RV == 0)
        logits_RV[part] = z_RV + 15.0  # real logits are not normalised
    return logits_RV
