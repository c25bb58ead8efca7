"""Oracle: spectra of updates, intruder dimensions and alignment with the base, all from full dense SVDs in float64."""

from __future__ import annotations

import math

import numpy as np

from tests.oracles.heads import Matrix, fro


def singular_values(x: Matrix) -> np.ndarray:
    """Descending, by LAPACK's dense SVD."""
    return np.linalg.svd(np.asarray(x, dtype=np.float64), compute_uv=False)


def stable_rank(sv: np.ndarray) -> float:
    """sum s^2 / s_1^2; 0 for a zero matrix."""
    return 0.0 if sv[0] == 0 else float(sum(s * s for s in sv) / sv[0] ** 2)


def effective_rank(sv: np.ndarray) -> float:
    """exp of the entropy of s / sum s (Roy and Vetterli, 2007); 0 for a zero matrix."""
    total = float(sum(sv))
    if total == 0.0:
        return 0.0
    return math.exp(-sum(s / total * math.log(s / total) for s in sv if s > 0))


def rank_holding(sv: np.ndarray, part: float) -> int:
    """Smallest k whose first k singular values hold `part` of the energy sum s^2; 0 for a zero matrix."""
    energy = [float(s) ** 2 for s in sv]
    whole, held = sum(energy), 0.0
    if whole == 0.0:
        return 0
    for k, value in enumerate(energy, 1):
        held += value
        if held >= part * whole:
            return k
    return len(energy)


def overlaps(base: Matrix, change: Matrix, k: int) -> np.ndarray:
    """m_j = max_i |<u1_j, u0_i>| for the first k left singular vectors of W0 + dW, over all left vectors of W0."""
    U0 = np.linalg.svd(base, full_matrices=False)[0]
    U1 = np.linalg.svd(base + change, full_matrices=False)[0]
    return np.array([max(abs(float(U1[:, j] @ U0[:, i])) for i in range(U0.shape[1])) for j in range(k)])


def intruders(base: Matrix, change: Matrix, k: int, eps: float) -> int:
    """Intruder dimensions (Shuttleworth et al., 2024): of the top k of W1, those with m_j < eps."""
    k = min(k, *base.shape)
    return int(sum(m < eps for m in overlaps(base, change, k)))


def alignment(base: Matrix, change: Matrix, k: int) -> float:
    """||U0_k^T dW V0_k|| / ||dW||: the part of dW inside the top-k left and right subspaces of W0."""
    U0, _, V0t = np.linalg.svd(base, full_matrices=False)
    return fro(U0[:, :k].T @ change @ V0t[:k].T) / fro(change)


def alignment_by_chance(change: Matrix, k: int, draws: int = 400, seed: int = 0) -> float:
    """Root mean square of the alignment with random k-dimensional subspaces; tends to k / sqrt(m n)."""
    rng = np.random.default_rng(seed)
    m, n = change.shape
    found = []
    for _ in range(draws):
        U = np.linalg.qr(rng.standard_normal((m, k)))[0]
        V = np.linalg.qr(rng.standard_normal((n, k)))[0]
        found.append((fro(U.T @ change @ V) / fro(change)) ** 2)
    return float(np.mean(found)) ** 0.5


def amplification(base: Matrix, change: Matrix, r: int) -> float:
    """||dW|| / ||U_r^T W0 V_r|| with dW's own top-r vectors (Hu et al., 2021, section 7.3)."""
    U, _, Vt = np.linalg.svd(change, full_matrices=False)
    return fro(change) / fro(U[:, :r].T @ base @ Vt[:r].T)
