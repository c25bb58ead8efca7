"""A matrix as low rank plus sparse under a budget of parameters (OATS), weighted by input statistics.

With Z = T diag(sqrt(d)) of a delta T (m, n) and its input statistic d, repeated:

    L = best rank-k approximation of Z - S,   S = the kept entries of Z - L

an alternating projection on the two sets: with the largest entries kept, the residual ||Z - L - S||_F never grows. The
result is (L + S) diag(1 / sqrt(d)).

Zhang and Papyan, OATS: Outlier-Aware Pruning through Sparse and Low Rank Decomposition, ICLR 2025, arXiv 2409.13652.
Cost: iters + 1 decompositions of (m, n), by the smaller Gram matrix where both are above 256.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.linalg.metric import left_subspace

FLOOR = 1e-6  # least input statistic, relative to its mean: an input that never fires must not magnify rounding


@dataclass(frozen=True, slots=True)
class Budget:
    """What the two parts of a matrix may hold.

    Attributes:
        k: Rank of the low-rank part.
        zeroed: Share of the entries that is no part of the sparse one (as published; with "smallest" the share kept).
    """

    k: int
    zeroed: float

    def cut(self, entries: int) -> int:
        """How many of `entries` are on the zeroed side: int(entries * share)."""
        return int(entries * self.zeroed)


@dataclass(frozen=True, slots=True)
class Split:
    """How a matrix is split.

    Attributes:
        budget: Rank and share of zeros.
        iters: Rounds.
        level: "row" or "element".
        keep: "largest" or "smallest" entries are the sparse part.
        final_svd: One more low-rank step after the last round.
    """

    budget: Budget
    iters: int = 10
    level: Literal["row", "element"] = "row"
    keep: Literal["largest", "smallest"] = "largest"
    final_svd: bool = True


@dataclass(slots=True, eq=False)
class Parts:
    """The two parts of a matrix, Z ~ low + sparse.

    Attributes:
        low: (m, n), of rank k.
        sparse: (m, n), with zeros.
        residuals: ||Z - low - sparse||_F after each round, before the final low-rank step.
    """

    low: Tensor
    sparse: Tensor
    residuals: list[float] = field(default_factory=list)


def make_budget(m: int, n: int, sparsity: float, rank_ratio: float, rank: int | None = None) -> Budget:
    """Rank and sparse share that hold (1 - sparsity) m n parameters together.

    Args:
        m: Rows.
        n: Columns.
        sparsity: Compression rate, share of the parameters that is saved.
        rank_ratio: Share of the others that the low-rank part gets.
        rank: The adapter's own rank, to take k from (floor of rank_ratio times it) instead of from m and n.
    """
    dense = 1.0 - sparsity
    if rank is not None:
        k = max(1, int(rank_ratio * rank))
    else:
        k = max(1, min(int(rank_ratio * dense * m * n / (m + n)), min(m, n) - 1))
    return Budget(k, 1.0 - (1.0 - rank_ratio) * dense)


def input_scale(d: Tensor | None, n: int, where: str) -> Tensor | None:
    """sqrt(d / mean(d)) with d floored at 1e-6 of its mean, float64 (n,); None for no statistic (or one of zeros).

    Raises:
        LoraforgeError: The statistic is of another length, or negative, or not finite.
    """
    if d is None:
        return None
    if d.shape != (n,):
        raise LoraforgeError(
            "An input statistic does not fit its module", where=where, got=tuple(d.shape), expected=f"({n},)"
        )
    d = d.to(torch.float64)
    if not bool(torch.isfinite(d).all()) or bool((d < 0).any()):
        raise LoraforgeError("An input statistic is negative, NaN or Inf", where=where, expected="sums of squares")
    mean = d.mean()
    return (d / mean).clamp_min(FLOOR).sqrt() if float(mean) > 0.0 else None


def keep_entries(X: Tensor, cut: int, keep: Literal["largest", "smallest"]) -> Tensor:
    """X with zeros for all but its kept entries, by row.

    Args:
        X: (rows, entries).
        cut: With "largest" the number of smallest |x| that become 0; with "smallest" the number of them that stay.
        keep: Which side stays. Equal magnitudes go in the order of their index, the first counting as the smaller.
    """
    entries = X.shape[1]
    if cut <= 0 or cut >= entries:
        whole = (cut <= 0) == (keep == "largest")
        return X.clone() if whole else torch.zeros_like(X)
    size = X.abs()
    threshold = size.kthvalue(cut, dim=1, keepdim=True).values
    low, tied = size < threshold, size == threshold
    # Of those at the threshold the first ones fill the count, as a stable sort would have it.
    low |= tied & (tied.cumsum(dim=1) <= cut - low.sum(dim=1, keepdim=True))
    return torch.where(low == (keep == "smallest"), X, 0.0)


def split(Z: Tensor, how: Split) -> Parts:
    """Low-rank and sparse part of Z (m, n), float64."""
    parts = Parts(torch.zeros_like(Z), torch.zeros_like(Z))
    for _ in range(how.iters):
        parts.low = _best(Z - parts.sparse, how.budget.k)
        rest = Z - parts.low
        rows = rest if how.level == "row" else rest.reshape(1, -1)
        parts.sparse = keep_entries(rows, how.budget.cut(rows.shape[1]), how.keep).reshape(Z.shape)
        parts.residuals.append(float(torch.linalg.vector_norm(rest - parts.sparse)))
    if how.final_svd:
        parts.low = _best(Z - parts.sparse, how.budget.k)
    return parts


def process(T: Tensor, scale: Tensor | None, how: Split) -> Tensor:
    """(L + S) diag(1 / scale) of a delta T (m, n) float64, split after its columns were multiplied by `scale` (n,)."""
    parts = split(T if scale is None else T * scale, how)
    whole = parts.low + parts.sparse
    return whole if scale is None else whole / scale


def _best(M: Tensor, k: int) -> Tensor:
    """The best rank-k approximation of M in Frobenius norm, (m, n)."""
    if k >= min(M.shape):
        return M
    U, _ = left_subspace(M, None)
    return U[:, :k] @ (U[:, :k].T @ M)
