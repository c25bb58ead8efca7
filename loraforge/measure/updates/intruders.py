"""What an update does to the singular directions of its weight: intruder dimensions, alignment, amplification.

Intruder dimensions: with u0_i the left singular vectors of W0 and u1_j those of W1 = W0 + dW,

    m_j = max_i |<u1_j, u0_i>|,    intruders among the top k: those j <= k with m_j < eps

The threshold is arbitrary, so counts come for several eps and k. Where singular values of W0 nearly coincide, u0_i is
any vector of their subspace; `cos_top_subspace` therefore gives ||U0[:, near]^T u1_j|| with all i whose value is within
1 % of that of the best one. Source: Shuttleworth et al., LoRA vs Full Fine-tuning, arXiv 2410.21228.

Alignment: ||U0_k^T dW V0_k||_F / ||dW||_F with the top k of W0 on both sides. For random subspaces of that size its
root mean square is k / sqrt(m n), exactly, which stands beside it. Amplification: ||dW||_F / ||U_r^T W0 V_r||_F with
the r directions of dW. Source: Hu et al., LoRA, arXiv 2106.09685, section 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from loraforge.linalg.factored import decompose
from loraforge.measure.updates.slices import Change, change_norm, dense
from loraforge.types import LowRank

KS = (1, 10, 20)
EPSILONS = (0.3, 0.5, 0.6, 0.7, 0.9)
NEAR = 0.01
_SMALL = 256  # below, a whole decomposition costs less than its leading vectors by Lanczos steps
_LARGE = 2048  # above, the left vectors come from W0 W0^T: LAPACK's SVD takes minutes there
_ZERO = 1e-10  # singular values of an update below this share of the largest are rounding


@dataclass(frozen=True, slots=True)
class BaseVectors:
    """Singular vectors of a weight.

    Attributes:
        U: (m, q) all left ones, q = min(m, n), float64.
        S: (q,) singular values, descending.
        V: (n, k) leading right ones.
    """

    U: Tensor
    S: Tensor
    V: Tensor


def base_vectors(weight: Tensor, k: int) -> BaseVectors:
    """All left and the k leading right singular vectors of a weight (m, n)."""
    W = weight.to(torch.float64)
    m, n = W.shape
    k = min(k, m, n)
    if min(m, n) <= _LARGE:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return BaseVectors(U, S, Vh[:k].mT.contiguous())
    values, vectors = torch.linalg.eigh(W @ W.mT)
    U, S = vectors.flip(1)[:, : min(m, n)], values.flip(0)[: min(m, n)].clamp_min(0.0).sqrt()
    return BaseVectors(U, S, W.mT @ U[:, :k] / S[:k].clamp_min(1e-300))


def leading_vectors(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading singular triples of a matrix (m, n), to rounding: U (m, k), S (k,), V (n, k).

    Large matrices by Lanczos steps (ARPACK) from a fixed start, so that the same matrix gives the same vectors.
    """
    k = min(k, *matrix.shape)
    if min(matrix.shape) <= _SMALL or 4 * k > min(matrix.shape) or not bool(matrix.any()):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :k], S[:k], Vh[:k].mT
    start = np.random.default_rng(0).standard_normal(min(matrix.shape))
    left, values, right = svds(matrix.numpy(), k=k, v0=start, solver="arpack")
    order = np.argsort(-values)
    return tuple(torch.from_numpy(part.copy()) for part in (left[:, order], values[order], right[order].T))  # type: ignore[return-value]


def intruder_dimensions(
    weight: Tensor,
    change: Change,
    *,
    ks: Sequence[int] = KS,
    epsilons: Sequence[float] = EPSILONS,
    vectors: BaseVectors | None = None,
) -> dict[str, Any]:
    """Counts leading directions of W0 + dW that W0 has not.

    Args:
        weight: W0 (m, n).
        change: dW.
        ks: How many leading directions are looked at.
        epsilons: Thresholds of m_j.
        vectors: `base_vectors` of the weight, where they are known.

    Returns:
        n_intruder {"k10": {"0.5": count}}, cos_top [m_j for j up to the largest k], cos_top_subspace likewise. A k
        beyond min(m, n) counts as that.
    """
    found = vectors or base_vectors(weight, 1)
    U1, _, _ = leading_vectors(weight.to(torch.float64) + dense(change), max(ks))
    cosines = (found.U.mT @ U1).abs()
    best, at = cosines.max(dim=0)
    near = (found.S[:, None] - found.S[at][None, :]).abs() <= NEAR * found.S[at][None, :]
    subspace = (cosines.square() * near).sum(0).sqrt()
    # Rounding may take a cosine a hair above 1.
    tops, wholes = best.clamp_max(1.0).tolist(), subspace.clamp_max(1.0).tolist()
    counts = {f"k{k}": {f"{eps:g}": sum(value < eps for value in tops[:k]) for eps in epsilons} for k in ks}
    return {"n_intruder": counts, "cos_top": tops, "cos_top_subspace": wholes}


def alignment(change: Change, vectors: BaseVectors, k: int) -> dict[str, float | None]:
    """How much of an update lies in the top k directions of its weight on both sides.

    Returns:
        alignment (None for a zero update) and alignment_random, its root mean square over random subspaces.
    """
    U, V = vectors.U[:, :k], vectors.V[:, :k]
    m, n = change.shape
    width = min(k, m, n)
    size = change_norm(change)
    if isinstance(change, LowRank):
        inside = (U.mT @ change.B.to(torch.float64)) @ (change.A.to(torch.float64) @ V) * change.scaling
    else:
        inside = U.mT @ change.to(torch.float64) @ V
    value = float(torch.linalg.matrix_norm(inside)) / size if size else None
    return {"alignment": value, "alignment_random": width / math.sqrt(m * n)}


def amplification(weight: Tensor, change: Change, k: int) -> float | None:
    """||dW||_F / ||U_r^T W0 V_r||_F with the directions of dW: all of a pair of factors, the top k of a matrix.

    Returns:
        The factor; None for a zero update, or where W0 is zero in those directions.
    """
    if isinstance(change, LowRank):
        parts = decompose(change, "qr")
        U, S, V = parts.Q_l @ parts.U, parts.S, parts.Q_a @ parts.Vh.mT
        size = float(torch.linalg.vector_norm(S))
    else:
        U, S, V = leading_vectors(change.to(torch.float64), k)
        size = change_norm(change)
    if size == 0.0:
        return None
    held = S > _ZERO * S[0]
    inside = float(torch.linalg.matrix_norm(U[:, held].mT @ weight.to(torch.float64) @ V[:, held]))
    return size / inside if inside > 0.0 else None
