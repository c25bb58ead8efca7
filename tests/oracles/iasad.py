"""Iso-IASAD in dense numpy float64: alternating low-rank and sparse projections of scaled deltas.

Shapes and names as in tests/oracles/spectral.py. The document's loop with the readings that make sense of it: input
statistics divided by their mean, the same k and pruned share in every round, columns scaled back at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.oracles.spectral import Array, Deltas, svd, total, truncated


def input_scale(stat: Array | None, n: int) -> Array:
    """sqrt(d / mean d), floored at 1e-6 of the mean before the root; ones without statistics. Shape (n,)."""
    if stat is None:
        return np.ones(n)
    return np.sqrt(np.maximum(stat / stat.mean(), 1e-6))


def iasad_budget(m: int, n: int, sparsity: float, rank_ratio: float) -> int:
    """k = int(rank_ratio (1 - sparsity) m n / (m + n)), clamped to [1, min(m, n) - 1]."""
    return max(1, min(int(rank_ratio * (1.0 - sparsity) * m * n / (m + n)), min(m, n) - 1))


def pruned(X: Array, z: float, level: str, keep: str) -> Array:
    """Zeroes the int(len z) smallest entries of each row (or of the whole matrix), or keeps only those."""
    rows = X if level == "row" else X.reshape(1, -1)
    out = np.zeros_like(rows)
    count = int(rows.shape[1] * z)
    for i, row in enumerate(rows):
        order = np.argsort(np.abs(row), kind="stable")
        chosen = order[count:] if keep == "largest" else order[:count]
        out[i, chosen] = row[chosen]
    return out.reshape(X.shape)


def iasad_part(
    D: Array,
    k: int,
    stat: Array | None = None,
    *,
    iters: int = 10,
    sparsity: float = 0.1,
    rank_ratio: float = 0.75,
    prune_level: str = "row",
    keep: str = "largest",
    final_svd: bool = True,
) -> Array:
    """P = (L + Sp) / sqrt(d): alternate L = rank-k part of Z - Sp and Sp = pruned(Z - L), with Z = D sqrt(d).

    z = 1 - (1 - rank_ratio)(1 - sparsity) is the pruned share; final_svd takes L once more after the last Sp.
    """
    scale = input_scale(stat, D.shape[1])
    Z = D * scale
    z = 1.0 - (1.0 - rank_ratio) * (1.0 - sparsity)
    sparse = np.zeros_like(Z)
    low = truncated(Z, k)
    for _ in range(iters):
        low = truncated(Z - sparse, k)
        sparse = pruned(Z - low, z, prune_level, keep)
    if final_svd:
        low = truncated(Z - sparse, k)
    return (low + sparse) / scale


def iso_iasad(
    deltas: Deltas,
    weights: Sequence[float],
    ranks: Sequence[int],
    stats: Sequence[Array | None] | None = None,
    *,
    rank_basis: str = "budget",
    center: str = "none",
    sparsity: float = 0.1,
    rank_ratio: float = 0.75,
    **options: object,
) -> Array:
    """Iso-IASAD before its flattening: sum_i P_i, with `center` mean of D_i - mean and N mean added back.

    rank_basis lora: k_i = max(1, floor(rank_ratio r_i)). A part that has no more than k directions is its own
    decomposition (L = Z, Sp = 0), which is exact arithmetic and not a special case.
    """
    W = total(deltas, weights)
    m, n = W.shape
    N = len(deltas)
    mean = W / N if center == "mean" else np.zeros_like(W)
    out = N * mean
    for i, (w, d) in enumerate(zip(weights, deltas, strict=True)):
        D = (np.zeros_like(W) if d is None else w * d) - mean
        k = iasad_budget(m, n, sparsity, rank_ratio)
        if rank_basis == "lora":
            k = max(1, int(np.floor(rank_ratio * ranks[i])))
        stat = None if stats is None else stats[i]
        part = D
        if np.any(D) and svd(D * input_scale(stat, n))[1].size > k:
            part = iasad_part(D, k, stat, sparsity=sparsity, rank_ratio=rank_ratio, **options)  # type: ignore[arg-type]
        out = out + part
    return out
