"""Spectral merges in dense numpy float64: SVDs of the m x n matrices themselves. Independent of the package.

Shape letters: m out, n in, N adapters. `deltas[i]` (m, n) is s_i B_i A_i without the user's weight, None where an
adapter lacks the module; D_i = w_i deltas[i]. A missing module and a delta of zero are the same thing: both are left
out of everything that is built from singular vectors.

On adapters sum_i D_i has rank R < min(m, n), so every rule acts on the numerical support alone: what it would do to
the null space is decided by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Deltas = Sequence["Array | None"]

TAU = 1e-10  # relative to the largest singular value; exact dependence leaves 1e-16, random factors 1e-3


def parts(deltas: Deltas, weights: Sequence[float]) -> list[Array]:
    """D_i = w_i s_i B_i A_i of the adapters that have a delta other than zero."""
    return [w * d for w, d in zip(weights, deltas, strict=True) if d is not None and w != 0.0 and np.any(d)]


def total(deltas: Deltas, weights: Sequence[float]) -> Array:
    """sum_i D_i: task arithmetic, concat, and (weights 1/N) the weighted average."""
    shape = next(d.shape for d in deltas if d is not None)
    return np.sum([np.zeros(shape), *parts(deltas, weights)], axis=0)


def support(S: Array) -> int:
    """Number of singular values that are not rounding."""
    return int(np.sum(S > TAU * S[0])) if S.size and S[0] > 0.0 else 0


def svd(W: Array) -> tuple[Array, Array, Array]:
    """U (m, p), S (p,), V^T (p, n) of the numerical support alone."""
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    p = support(S)
    return U[:, :p], S[:p], Vh[:p]


def truncated(W: Array, k: int) -> Array:
    """Best approximation of rank k (Eckart and Young)."""
    U, S, Vh = svd(W)
    return (U[:, :k] * S[:k]) @ Vh[:k]


def polar(X: Array) -> Array:
    """The orthogonal polar factor P Q^T of X = P S Q^T; directions without a singular value are dropped."""
    P, _, Qh = svd(X)
    return P @ Qh


def average(S: Array, size: int, kind: str = "mean") -> float:
    """mean: sum S / size. rms: sqrt(sum S^2 / size). geo: the geometric mean of S, whatever the size."""
    if kind == "geo":
        return float(np.exp(np.log(S).mean()))
    return float(S.sum() / size) if kind == "mean" else float(np.sqrt((S**2).sum() / size))


def flattened(
    W: Array,
    *,
    rank: int | None = None,
    mean_over: str = "support",
    kind: str = "mean",
    power: float = 1.0,
    alpha: float = 1.0,
) -> Array:
    """Iso: U_k diag(alpha c S^(1 - power)) V_k^T, truncated first, then flattened, then scaled.

    c keeps the average (mean, rms or geo) of the kept S; with power 1 that is alpha sbar U_k V_k^T and sbar is
    (1/k) sum S over the kept k (support) or (1/min(m, n)) sum S (full: the zeros count too).
    Iso-C is this of sum_i D_i. Marczak et al., arXiv 2502.04959; rms, geo and power are additions.
    """
    U, S, Vh = svd(W)
    if S.size == 0:
        return np.zeros_like(W)
    k = min(rank or S.size, S.size)
    shape = S[:k] ** (1.0 - power)
    size = k if mean_over == "support" else min(W.shape)
    return (U[:, :k] * (alpha * average(S[:k], size, kind) / average(shape, k, kind) * shape)) @ Vh[:k]


def stacked_rank(D: Sequence[Array]) -> int:
    """q: the smaller of the dimensions that all column spaces and all row spaces span together."""
    return min(svd(np.concatenate(D, axis=1))[1].size, svd(np.concatenate(D, axis=0))[1].size)


def iso_cts(deltas: Deltas, weights: Sequence[float], fraction: float = 0.8, q: int | None = None) -> Array:
    """Iso-CTS before its flattening: polar(U*) diag(s*) polar(V*)^T. Same paper, section 4.

    q = rank of the stack; k0 = int(q f); the task-specific dimensions round((q - k0) / N) N are shared evenly, t each;
    k = the rest is common. U_c = the leading k left vectors of W = sum D_i. Of E_i = D_i - U_c U_c^T D_i the leading t
    triplets. An adapter has no more than r_i: the surplus goes back to the common ones. U* = [U_1 .. U_N, U_c]. Where
    rounding up would share out more than there is (k < 0, small f), t is what all can have, floor(q / N).
    """
    D = parts(deltas, weights)
    W = total(deltas, weights)
    if not D:
        return W
    N = len(D)
    q = q or stacked_rank(D)
    shared = min(round((q - int(q * fraction)) / N), q // N)
    t = [min(shared, svd(d)[1].size) for d in D]
    U, S, Vh = svd(W)
    k = q - sum(t)
    lefts, values, rights = [], [], []
    for d, count in zip(D, t, strict=True):
        Ui, Si, Vi = svd(d - U[:, :k] @ (U[:, :k].T @ d))
        lefts.append(Ui[:, :count])
        values.append(Si[:count])
        rights.append(Vi[:count])
    left = polar(np.concatenate([*lefts, U[:, :k]], axis=1))
    right = polar(np.concatenate([*rights, Vh[:k]], axis=0))
    return (left * np.concatenate([*values, S[:k]])) @ right


def tsv(deltas: Deltas, weights: Sequence[float], k: int | None = None) -> Array:
    """TSV-M: polar([U_1 .. U_N]) diag([s_1 .. s_N]) polar([V_1; .. V_N]), k triplets a task (default: all it has).

    Gargiulo et al., arXiv 2412.00081.
    """
    D = parts(deltas, weights)
    if not D:
        return total(deltas, weights)
    triplets = [svd(d) for d in D]
    left = polar(np.concatenate([U[:, :k] for U, _, _ in triplets], axis=1))
    right = polar(np.concatenate([Vh[:k] for _, _, Vh in triplets], axis=0))
    return (left * np.concatenate([S[:k] for _, S, _ in triplets])) @ right


def wudi(deltas: Deltas, weights: Sequence[float], ridge: float = 0.0) -> Array:
    """argmin_W sum_i ||(W - D_i) D_i^T||^2 / ||D_i||^2 = (sum D_i G_i)(sum G_i + ridge I)^+.

    G_i = D_i^T D_i / ||D_i||^2 has trace 1. Closed form of WUDI-Merging's objective (ICML 2025). The pseudo-inverse
    cuts at 1e-13 of the largest eigenvalue, far below the squares of the singular values that count here.
    """
    D = parts(deltas, weights)
    W = total(deltas, weights)
    if not D:
        return W
    grams = [d.T @ d / np.sum(d * d) for d in D]
    values, vectors = np.linalg.eigh(np.sum(grams, axis=0))
    keep = values > 1e-13 * values[-1]
    inverse = (vectors[:, keep] / (values[keep] + ridge)) @ vectors[:, keep].T
    return np.sum([d @ g for d, g in zip(D, grams, strict=True)], axis=0) @ inverse


def svc(deltas: Deltas, weights: Sequence[float], floor: float) -> Array:
    """SVC: each singular value of W = sum D_i times N / sum_i max(floor, s_i). arXiv 2602.05536.

    Of the r-th pair: a_i = u^T D_i, c = S v^T, s_i = <c, a_i> / ||a_i||^2: how much of the merged response each task
    finds counted again. An adapter without a part in the direction (a_i = 0) is not counted in that direction.
    """
    D = parts(deltas, weights)
    U, S, Vh = svd(total(deltas, weights))
    out = np.zeros((U.shape[0], Vh.shape[1]))
    for u, s, v in zip(U.T, S, Vh, strict=True):
        found = []
        for d in D:
            a = u @ d
            if np.sum(a * a) > (TAU * np.linalg.norm(d)) ** 2:
                found.append(max(floor, float((s * v) @ a / (a @ a))))
        out += (len(found) / sum(found)) * s * np.outer(u, v)
    return out
