"""Dense float64 numpy forms of what the package does on factors. Shares no code with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def dense_sum(parts: Sequence[tuple[float, float, Any, Any]]) -> np.ndarray:
    """sum_i w_i s_i B_i A_i from (w, s, B, A), formed densely."""
    total = None
    for w, s, B, A in parts:
        term = w * s * np.einsum("mr,rn->mn", np.asarray(B, dtype=np.float64), np.asarray(A, dtype=np.float64))
        total = term if total is None else total + term
    assert total is not None
    return total


def best_rank_k(delta: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """The Eckart-Young optimum of rank k and its Frobenius error, from the dense SVD."""
    U, S, Vh = np.linalg.svd(delta, full_matrices=False)
    return (U[:, :k] * S[:k]) @ Vh[:k], float(np.sqrt(np.sum(S[k:] ** 2)))


def spectrum(delta: np.ndarray) -> np.ndarray:
    return np.linalg.svd(delta, compute_uv=False)


def energy_rank(delta: np.ndarray, energy: float) -> int:
    """Smallest k whose best approximation keeps `energy` of the squared norm, by trying each k."""
    squares = spectrum(delta) ** 2
    return next(k for k in range(1, len(squares) + 1) if squares[:k].sum() >= energy * squares.sum() * (1 - 1e-14))


def effective_rank(S: np.ndarray) -> float:
    p = S[S > 0] / S.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))


def relative(found: Any, exact: np.ndarray) -> float:
    """Relative Frobenius error."""
    return float(np.linalg.norm(np.asarray(found, dtype=np.float64) - exact) / np.linalg.norm(exact))
