"""Rules on two files' factors as the rSVD document has them, and two published rules on factors, in numpy float64.

B_i (m, r_i), A_i (r_i, n), s_i the scaling of the file, w_i the user's weight. Only the step that the document leaves
to `torch.svd_lowrank` is torch's: its random sketch is part of what is reproduced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tests.oracles.ranks import chosen
from tests.oracles.spectral import svd, truncated

Array = NDArray[np.float64]


def rsvd(W: Array, energy: float = 0.99, min_rank: int = 4, max_rank: int = 32) -> Array:
    """What randomized SVD approximates: the best rank-k part of W = sum w_i D_i, k by energy over the full spectrum."""
    S = np.linalg.svd(W, compute_uv=False)
    return truncated(W, chosen(S, "energy", energy, min_rank, max_rank)) if S[0] > 0.0 else W


def document_mix(B: Sequence[Array], A: Sequence[Array], alphas: Sequence[float]) -> Array:
    """Steps 1 to 4 of the published script for two adapters: w N_1 + (1 - w) sqrt(alpha_2 / alpha_1) N_2.

    N_i = B_i A_i alpha_i / r_i, n_i = ||N_i|| + 1e-12; w = 1/2 if min n / max n < 1/2, else n_1 / (n_1 + n_2). alpha
    counts twice and the order of the files matters: that is what is reproduced.
    """
    N = [b @ (a * (alpha / max(a.shape[0], 1))) for b, a, alpha in zip(B, A, alphas, strict=True)]
    n1, n2 = (np.linalg.norm(x) + 1e-12 for x in N)
    w = 0.5 if min(n1, n2) / max(n1, n2) < 0.5 else n1 / (n1 + n2)
    g = math.sqrt(alphas[1] / alphas[0]) if alphas[0] > 0 else 1.0
    return w * N[0] + (1.0 - w) * g * N[1]


def document_width(r1: int, r2: int, m: int, n: int, energy: float, min_rank: int, max_rank: int) -> int:
    """Step 5: q = min(max(min_rank, int(int(sqrt(r1 r2)) energy)), m, n, max_rank), the whole width of the sketch."""
    base = int(math.sqrt(min(r1, r2) * max(r1, r2)))
    return min(max(min_rank, int(base * energy)), m, n, max_rank)


def document_rank(S: Array, energy: float, min_rank: int, max_rank: int) -> int:
    """Step 7: first powers of the computed values only; searchsorted (left) + 1, clamped, at most len(S)."""
    cum = np.cumsum(S) / (S.sum() + 1e-12)
    k = int(np.searchsorted(cum, energy, side="left")) + 1
    return min(min(max_rank, max(min_rank, k)), len(S))


def document_rsvd(
    B: Sequence[Array],
    A: Sequence[Array],
    alphas: Sequence[float],
    seed: int,
    energy: float = 0.99,
    min_rank: int = 4,
    max_rank: int = 32,
) -> tuple[Array, int, int]:
    """All steps: merged delta (m, n), sketch width q and rank k. The generator is seeded right before the sketch."""
    W = document_mix(B, A, alphas)
    q = document_width(A[0].shape[0], A[1].shape[0], *W.shape, energy, min_rank, max_rank)
    torch.manual_seed(seed)
    U, S, V = torch.svd_lowrank(torch.from_numpy(W).float(), q=q, niter=2)
    values = S.double().numpy()
    k = document_rank(values, energy, min_rank, max_rank)
    return (U.double().numpy()[:, :k] * (values[:k] + 1e-12)) @ V.double().numpy()[:, :k].T, q, k


def geometric_factor(factors: Sequence[Array]) -> Array:
    """sign(prod X_i) |prod X_i|^(1/N), entry by entry; for two the document's sign(X1 X2) sqrt|X1 X2|."""
    product = np.prod(np.stack(factors), axis=0)
    return np.sign(product) * np.abs(product) ** (1.0 / len(factors))


def geometric_mean(B: Sequence[Array], A: Sequence[Array], scales: Sequence[float]) -> Array:
    """geo(s) geo(B) geo(A) of the raw factors; the geometric mean of the scalings is folded in."""
    scale = math.prod(scales) ** (1.0 / len(scales))
    return scale * geometric_factor(B) @ geometric_factor(A)


def geometric_code(B: Sequence[Array], A: Sequence[Array], scales: Sequence[float]) -> Array:
    """What the document's code does with two adapters: 1e-8 under both roots, and A has the sign of A_1 alone."""
    left = np.sign(B[0] * B[1]) * np.sqrt(np.abs(B[0] * B[1]) + 1e-8)
    right = np.sign(A[0] * np.abs(A[1])) * np.sqrt(np.abs(A[0] * A[1]) + 1e-8)
    return math.sqrt(scales[0] * scales[1]) * left @ right


def geometric_aligned(deltas: Sequence[Array]) -> Array:
    """Entry by entry |prod C_i|^(1/N) where all C_i have one sign (which it keeps), else 0.

    D_i = U C_i V^T between the left vectors U of [D_1 .. D_N] and the right ones V of [D_1; ..; D_N]. The signs of
    their columns do not matter.
    """
    U, V = svd(np.concatenate(deltas, axis=1))[0], svd(np.concatenate(deltas, axis=0))[2].T
    C = np.stack([U.T @ d @ V for d in deltas])
    agreed = np.all(C > 0.0, axis=0) | np.all(C < 0.0, axis=0)
    return U @ (agreed * np.sign(C[0]) * np.abs(np.prod(C, axis=0)) ** (1.0 / len(deltas))) @ V.T


def kept_largest(X: Array, density: float) -> Array:
    """The floor(density n) largest entries by magnitude, equal ones at the threshold all kept."""
    count = math.floor(density * X.size)
    cut = np.sort(np.abs(X).ravel())[::-1][count - 1] if count else math.inf
    return np.where(np.abs(X) >= cut, X, 0.0)


def robust_merge(
    B: Sequence[Array],
    A: Sequence[Array],
    scales: Sequence[float],
    weights: Sequence[float],
    density: float = 0.8,
    strength: float = 2.0,
) -> Array:
    """strength sum_i w_i s_i B~_i diag(S_i) A~_i; X~ = the largest share of X, S_i,k = |A_i,k|_1 / |A~_i,k|_1.

    S is then divided by its sum over the adapters, row k by row k; adapters of less rank have no row k to count.
    RobustMerge (NeurIPS 2025).
    """
    pruned = [(kept_largest(b, density), kept_largest(a, density)) for b, a in zip(B, A, strict=True)]
    ratios = []
    for a, (_, small) in zip(A, pruned, strict=True):
        left = np.abs(small).sum(axis=1)
        ratios.append(np.divide(np.abs(a).sum(axis=1), left, out=np.zeros_like(left), where=left > 0.0))
    out = np.zeros((B[0].shape[0], A[0].shape[1]))
    for (b, a), S, s, w in zip(pruned, ratios, scales, weights, strict=True):
        for k in range(len(S)):
            share = S[k] / sum(other[k] for other in ratios if len(other) > k) if S[k] else 0.0
            out += strength * w * s * share * np.outer(b[:, k], a[k])
    return out


def balanced_units(B: Array, A: Array) -> list[tuple[Array, Array]]:
    """Columns and rows (b, a) of one product with ||b|| = ||a||; each unit is defined up to the sign of both."""
    units = []
    for b, a in zip(B.T, A, strict=True):
        size = math.sqrt(np.linalg.norm(b) * np.linalg.norm(a))
        units.append((b / np.linalg.norm(b) * size, a / np.linalg.norm(a) * size))
    return units


def lego(units: Sequence[tuple[Array, Array]], labels: Sequence[int], rank: float) -> Array:
    """LoRA-LEGO for given clusters: sum of the clusters' centroids, times sqrt(rank / clusters).

    A centroid is the mean of its raw units [b; a], rescaled so that its largest entry is the mean of theirs. `rank` is
    that of the adapters. Zhao et al., ICLR 2025.
    """
    clusters = sorted(set(labels))
    out = np.zeros((len(units[0][0]), len(units[0][1])))
    for cluster in clusters:
        members = [np.concatenate(u) for u, label in zip(units, labels, strict=True) if label == cluster]
        centre = np.mean(members, axis=0)
        centre *= np.mean([np.abs(u).max() for u in members]) / np.abs(centre).max()
        b, a = centre[: len(units[0][0])], centre[len(units[0][0]) :]
        out += np.outer(b, a)
    return out * math.sqrt(rank / len(clusters))
