"""Confidence intervals of scores: Wilson's for shares, the percentile bootstrap over rows for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

Interval = tuple[float, float]
# Row numbers (draws, n) -> the statistic of each draw (draws,), NaN where a draw has none.
Statistic = Callable[[NDArray[np.int64]], NDArray[np.float64]]

LEVEL, DRAWS = 0.95, 1000
# Row numbers that are held at once.
_BLOCK = 2_000_000


def wilson(correct: float, n: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of the share correct / n (Wilson 1927); (0, 1) for no rows.

    Args:
        correct: Rows that are right, 0 to n.
        n: Rows.
        level: Confidence, in (0, 1).
    """
    if n == 0:
        return 0.0, 1.0
    z = float(norm.ppf(0.5 + level / 2))
    share = correct / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the bound is 0 or 1 itself; rounding would leave it a hair inside.
    return (0.0 if correct == 0 else middle - half), (1.0 if correct == n else middle + half)


def resample(statistic: Statistic, n: int, seed: int | Sequence[int] = 0, draws: int = DRAWS) -> NDArray[np.float64]:
    """A statistic of `draws` samples of n rows with replacement; equal seeds and n draw the same rows."""
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // max(n, 1))
    found = [statistic(generator.integers(0, n, (min(block, draws - start), n))) for start in range(0, draws, block)]
    return np.concatenate([np.empty(0), *found])


def percentile_interval(values: NDArray[np.float64], level: float = LEVEL) -> Interval | None:
    """The middle `level` of resampled values; None where fewer than half of the draws have a value."""
    known = values[np.isfinite(values)]
    if 2 * len(known) < len(values) or not len(known):
        return None
    low, high = np.percentile(known, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def bootstrap(
    values: Sequence[float], seed: int | Sequence[int] = 0, draws: int = DRAWS, level: float = LEVEL
) -> Interval | None:
    """Interval of the mean of row scores; None without rows."""
    rows = np.asarray(values, dtype=np.float64)
    if not len(rows):
        return None
    return percentile_interval(resample(lambda index: rows[index].mean(axis=1), len(rows), seed, draws), level)


def paired_bootstrap(
    one: Sequence[float],
    other: Sequence[float],
    seed: int | Sequence[int] = 0,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> tuple[float, Interval | None]:
    """Mean of one minus other over the same rows, and its interval.

    Raises:
        ValueError: Different numbers of rows, or none.
    """
    if len(one) != len(other) or not len(one):
        raise ValueError(f"paired scores need the same rows: {len(one)} and {len(other)}")
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    return float(difference.mean()), bootstrap(list(difference), seed, draws, level)
