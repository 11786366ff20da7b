"""The log-partition F(T) between the points of the temperature grid.

F(T) = logaddexp(logsumexp over certain entries of logp/T, G(T)). The first part is exact at any T;
only the tail's G is interpolated, by a cubic spline in 1/T. In the exponential family G is smooth
and convex in 1/T, its derivative the tail's mean logp, which is why 1/T is the right abscissa.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .types import TEMPERATURES


def _not_a_knot(knots: torch.Tensor, x: float) -> torch.Tensor:
    """Weights c with spline(x) = c @ values, a cubic spline through >= 4 knots (rising order)."""
    n = len(knots)
    h = knots[1:] - knots[:-1]
    # Rows of A m = B y for the second derivatives m at the knots.
    a = torch.zeros(n, n, dtype=torch.float64)
    b = torch.zeros(n, n, dtype=torch.float64)
    for i in range(1, n - 1):
        a[i, i - 1], a[i, i], a[i, i + 1] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
        b[i, i - 1], b[i, i], b[i, i + 1] = 6 / h[i - 1], -6 / h[i - 1] - 6 / h[i], 6 / h[i]
    # Not-a-knot: the third derivative does not jump at the first and last inner knot.
    a[0, 0], a[0, 1], a[0, 2] = h[1], -(h[0] + h[1]), h[0]
    a[-1, -3], a[-1, -2], a[-1, -1] = h[-1], -(h[-2] + h[-1]), h[-2]
    m: torch.Tensor = torch.linalg.solve(a, b)
    i = min(max(int((knots <= x).sum()) - 1, 0), n - 2)
    left, right = knots[i + 1] - x, x - knots[i]
    weights = (left**3 / (6 * h[i]) - left * h[i] / 6) * m[i]
    weights = weights + (right**3 / (6 * h[i]) - right * h[i] / 6) * m[i + 1]
    weights[i] += left / h[i]
    weights[i + 1] += right / h[i]
    return weights


def spline_weights(
    temperature: float, temperatures: Sequence[float] = TEMPERATURES
) -> torch.Tensor:
    """Give float64 weights c (one per grid point) such that G(temperature) = c @ G(grid).

    A unit vector where the temperature is on the grid. ValueError outside the grid, or between
    points of a grid of fewer than four.
    """
    grid = [float(t) for t in temperatures]
    if temperature in grid:
        weights = torch.zeros(len(grid), dtype=torch.float64)
        weights[grid.index(temperature)] = 1.0
        return weights
    if not min(grid) < temperature < max(grid):
        raise ValueError(
            f"temperature: expected a value within the stored grid {grid}, found {temperature:g}; "
            "choose one inside, or capture with a wider grid"
        )
    if len(grid) < 4:
        raise ValueError(
            f"temperature: expected a point of the stored grid {grid}, which is too short to "
            f"interpolate (that needs four points), found {temperature:g}"
        )
    inverse = 1.0 / torch.tensor(grid, dtype=torch.float64)
    order = torch.argsort(inverse)
    weights = torch.empty_like(inverse)
    weights[order] = _not_a_knot(inverse[order], 1.0 / temperature)
    return weights


def log_partition(
    logp_RK: torch.Tensor,
    certain_RK: torch.Tensor,
    tail_log_partition_RT: torch.Tensor,
    temperature: float,
    temperatures: Sequence[float] = TEMPERATURES,
) -> torch.Tensor:
    """Give F(temperature) per position, shape R, from certain entries and the tail's grid.

    certain_RK is a bool mask over logp_RK. An empty tail is -inf at every grid point.
    """
    weights = spline_weights(temperature, temperatures).to(tail_log_partition_RT)
    empty_RT = torch.isneginf(tail_log_partition_RT)
    tail_R = (tail_log_partition_RT.masked_fill(empty_RT, 0.0) * weights).sum(-1)
    tail_R = tail_R.masked_fill(empty_RT.any(-1), -torch.inf)
    certain_R = torch.where(certain_RK, logp_RK / temperature, -torch.inf).logsumexp(-1)
    return torch.logaddexp(certain_R, tail_R)
