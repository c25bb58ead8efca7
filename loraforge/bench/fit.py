"""The exponent of a power law, with what it is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fit:
    """y ~ factor * x^exponent.

    Attributes:
        exponent: Slope of log y over log x by least squares.
        stderr: Its standard error from the residuals; None for two points, which any line goes through.
        factor: y at x = 1.
        points: Number of points.
    """

    exponent: float
    stderr: float | None
    factor: float
    points: int


def fit_power(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """Least squares of log y over log x.

    A constant cost beside the power law (calls, libraries) pulls the exponent towards 0: it is that of the range
    measured, not of the limit.

    Returns:
        The fit, or None where fewer than two different positive x with a positive y are left.
    """
    logs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a > 0.0 and b > 0.0]
    if len({a for a, _ in logs}) < 2:
        return None
    count = len(logs)
    mean_x, mean_y = (math.fsum(p[i] for p in logs) / count for i in (0, 1))
    spread = math.fsum((a - mean_x) ** 2 for a, _ in logs)
    exponent = math.fsum((a - mean_x) * (b - mean_y) for a, b in logs) / spread
    left = math.fsum((b - mean_y - exponent * (a - mean_x)) ** 2 for a, b in logs)
    stderr = math.sqrt(left / (count - 2) / spread) if count > 2 else None
    return Fit(exponent, stderr, math.exp(mean_y - exponent * mean_x), count)
