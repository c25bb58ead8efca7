"""Rank rules by trying every rank, and the shared parameter budget, in numpy float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tests.oracles.spectral import support

Array = NDArray[np.float64]
SLACK = 1.0 - 1e-13  # what a rounded sum may lack of a goal that is met exactly


def wanted(S: Array, goal: str, value: float) -> int:
    """The smallest k that meets a goal, tried from 1 upwards.

    energy: sum_{i<=k} S_i^2 >= value sum S^2. nuclear: the same of S. fro_error: sqrt(sum_{i>k} S_i^2 / sum S^2) <=
    value. ratio: every S_i > S_1 / value. rank: the value itself.
    """
    if goal == "rank":
        return int(value)
    met = {
        "energy": lambda head, tail: np.sum(head**2) >= value * np.sum(S**2) * SLACK,
        "nuclear": lambda head, tail: np.sum(head) >= value * np.sum(S) * SLACK,
        "fro_error": lambda head, tail: np.sum(tail**2) * SLACK <= value**2 * np.sum(S**2),
        "ratio": lambda head, tail: np.all(tail <= S[0] / value),
    }[goal]
    return next(k for k in range(1, len(S) + 1) if met(S[:k], S[k:]))


def chosen(S: Array, goal: str | None, value: float, min_rank: int = 1, max_rank: int | None = None) -> int:
    """clamp(k, min_rank, max_rank), then at most the numerical rank. S (min(m, n),) descending."""
    present = support(S)
    k = present if goal is None else wanted(S[:present], goal, value)
    k = max(k, min_rank)
    k = min(k, max_rank) if max_rank is not None else k
    return max(1, min(k, present))


def budgeted(spectra: Mapping[str, tuple[Array, int, int]], budget: int, least: int = 1) -> dict[str, int]:
    """Ranks for one number of parameters over all modules: the largest S_i^2 / (m + n) first, while they fit.

    A direction of a module costs m + n. spectra[name] = (S, m, n). Every module first gets `least` directions.
    """
    ranks = {name: min(least, max(1, support(S))) for name, (S, _, _) in spectra.items()}
    left = budget - sum(k * sum(spectra[name][1:]) for name, k in ranks.items())
    items = [(S[i] ** 2 / (m + n), m + n, name, i) for name, (S, m, n) in spectra.items() for i in range(support(S))]
    for _, cost, name, i in sorted(items, key=lambda item: -item[0]):
        if i == ranks[name] and cost <= left:
            ranks[name] += 1
            left -= cost
    return ranks
