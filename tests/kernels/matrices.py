"""Small matrices that are hard on a decomposition, and how far one of theirs is from exact."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def hard_matrices(R: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """(R, R) matrices by name."""
    rng = np.random.default_rng(seed + R)
    X, Y = rng.standard_normal((2, R, R))
    Q, P = np.linalg.qr(X)[0], np.linalg.qr(Y)[0]
    slope = np.logspace(0, -12, R)
    half = (R + 1) // 2
    found = {
        "normal": X,
        "graded": (Q * slope) @ P,
        "graded columns": X * slope,
        "graded rows": X * slope[:, None],
        "equal columns": np.concatenate([X[:, :half], X[:, : R - half]], axis=1),
        "equal rows": np.concatenate([X[:half], X[: R - half]]),
        "zero columns": X * (np.arange(R) % 3 > 0),
        "rank 1": np.ones((R, R)),
        "zeros": np.zeros((R, R)),
        "identity": np.eye(R),
        "two clusters": (Q * np.where(np.arange(R) < half, 1.0, 1e-6)) @ P,
        "triangles": np.triu(X) @ np.triu(Y).T,
    }
    return {name: torch.from_numpy(matrix).to(dtype) for name, matrix in found.items()}


def orthogonality(Q: Tensor) -> float:
    """Largest entry of Q^T Q - I."""
    wide = Q.to(torch.float64)
    return float((wide.mT @ wide - torch.eye(Q.shape[-1], dtype=torch.float64)).abs().max()) if Q.shape[-1] else 0.0


def assert_decomposes(C: Tensor, U: Tensor, S: Tensor, Vh: Tensor, name: str = "") -> None:
    """Values, vectors and product of one matrix: errors against float64 at most twice those of LAPACK in the dtype.

    On top comes a floor of a few roundings, for matrices on which LAPACK happens to make none.
    """
    m, n = C.shape
    k, eps = min(m, n), torch.finfo(C.dtype).eps
    assert (U.shape, S.shape, Vh.shape) == ((m, k), (k,), (k, n)) and {U.dtype, S.dtype, Vh.dtype} == {C.dtype}
    exact = np.linalg.svd(C.numpy().astype(np.float64), compute_uv=False)
    plain_U, plain_S, plain_Vh = torch.linalg.svd(C, full_matrices=False)
    top = exact[0]
    # A reflection, a rotation and a division each round an entry, of which k are added up.
    floor = 4.0 * eps * max(1.0, k) ** 0.5

    def values(S: Tensor) -> float:
        return float(np.abs(S.numpy().astype(np.float64) - exact).max())

    def product(U: Tensor, S: Tensor, Vh: Tensor) -> float:
        wide = (U.to(torch.float64) * S.to(torch.float64)) @ Vh.to(torch.float64)
        return float((wide - C.to(torch.float64)).abs().max())

    assert (S[:-1] >= S[1:]).all() and (S >= 0).all(), name
    assert values(S) <= 2 * values(plain_S) + floor * top, (name, values(S) / top)
    assert product(U, S, Vh) <= 2 * product(plain_U, plain_S, plain_Vh) + floor * top, name
    for mine, plain in ((U, plain_U), (Vh.mT, plain_Vh.mT)):
        assert orthogonality(mine) <= 2 * orthogonality(plain) + floor, (name, orthogonality(mine))
