"""Small matrices for examples that are worked out by hand."""

from __future__ import annotations

import numpy as np

E = np.eye(3)
CLOSE = {"rtol": 0.0, "atol": 1e-14}  # a few operations on numbers of order 1


def diag(*values: float) -> np.ndarray:
    return np.diag(np.array(values, dtype=np.float64))


def row(*values: float) -> np.ndarray:
    return np.array([values], dtype=np.float64)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)
