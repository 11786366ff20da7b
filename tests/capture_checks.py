"""What the CPU and GPU tests of capture share: inputs, and the comparison with the oracle."""

import torch


def peaked_logits(num_rows, vocab, generator, scale=1.8):
    """Power laws with a random exponent per row, ids in random order, some rows peaked."""
    device = generator.device
    rank_V = torch.arange(1, vocab + 1, device=device, dtype=torch.float32)
    slope_R1 = scale + 0.4 * torch.randn(num_rows, 1, generator=generator, device=device)
    logits_RV = -slope_R1.clamp(1.1, 5.0) * torch.log(rank_V + 0.8)
    logits_RV[:, 0] += torch.empty(num_rows, device=device).exponential_(generator=generator)
    order_RV = torch.rand(num_rows, vocab, generator=generator, device=device).argsort(-1)
    return logits_RV.gather(-1, order_RV) + 12.0


def assert_matches(found, expected, tolerance=2e-5):
    """Compare two captures. expected is the oracle's, of the same logits in float64.

    Supports may differ only by entries that rounding can move: at a bound, or tied in fp32 logp.
    """
    assert found.ids_RK.shape == expected.ids_RK.shape
    for name in ("entropy_R", "top1_logp_R", "gold_logp_R", "tail_log_partition_RT"):
        one, other = getattr(found, name).double(), getattr(expected, name)
        torch.testing.assert_close(
            one, other, rtol=2e-6, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    different_R = (found.ids_RK != expected.ids_RK).any(-1) | (found.count_R != expected.count_R)
    same_R = ~different_R
    for name in ("logp_RK", "inclusion_RK"):
        one, other = getattr(found, name)[same_R].double(), getattr(expected, name)[same_R]
        torch.testing.assert_close(one, other, rtol=2e-5, atol=tolerance)
        certain = (one == 1.0) == (other == 1.0)
        assert name != "inclusion_RK" or certain.all()
    for row in different_R.nonzero().flatten().tolist():
        _assert_same_but_for_ties(row, found, expected, tolerance)


def _assert_same_but_for_ties(row, found, expected, tolerance):
    """The kth logp are equal, and ids that are kept by one only have a neighbour of equal logp."""
    assert found.count_R[row] == expected.count_R[row], (row, found.count_R, expected.count_R)
    one, other = found.logp_RK[row].double(), expected.logp_RK[row]
    torch.testing.assert_close(one, other, rtol=2e-6, atol=tolerance)
    moved = (found.ids_RK[row] != expected.ids_RK[row]).nonzero().flatten()
    gaps = torch.full_like(other, torch.inf)
    gaps[:-1] = (other[:-1] - other[1:]).abs()
    gaps[1:] = torch.minimum(gaps[1:], gaps[:-1].clone())
    last = len(other) - 1
    assert all(gaps[i] < tolerance or i == last for i in moved.tolist()), (row, moved, gaps[moved])
