"""Triangle of a set of columns from their Gram matrix: Cholesky with pivoting and a cut-off.

With G = X^T X, d_j = |x_j| and G scaled to a diagonal of ones, pivoted Cholesky stops at the first pivot that is at
most the cut-off: what is left of every column then is shorter than sqrt(cut) of it. From the p pivots

    X = Q T to sqrt(cut) of each column,   T (p, R),   Q = X Z with orthonormal columns,   Z (R, p).

Equal columns and zeros are left out exactly. Orthogonality of Q is lost as eps64 cond^2 of the pivot columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.kernels import backend
from loraforge.kernels.checks import require, require_number

# A column that is left with the rounding of float32 adds nothing; sums of 1e5 terms in float64 stay under it, too.
CUT = torch.finfo(torch.float32).eps ** 2
WIDEST = 1024


class GramFactor(NamedTuple):
    """Triangles of a batch of Gram matrices.

    Attributes:
        triangle: T (b, R, R) float64; rows from `rank` on are 0.
        solve: Z (b, R, R) float64; columns from `rank` on are 0.
        rank: p (b,) int64.
        condition: (b,) float64, Frobenius condition number over p of the pivot columns scaled to norm 1; 1 for rank 0,
            NaN (as all else) where the diagonal is not finite.
    """

    triangle: Tensor
    solve: Tensor
    rank: Tensor
    condition: Tensor


def gram_factor_reference(G: Tensor, cut: float = CUT) -> GramFactor:
    """`gram_factor` in PyTorch: all matrices a step at a time."""
    b, R = G.shape[:2]
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    norm = diagonal.clamp_min(0.0).sqrt()
    inverse = torch.where(norm > 0.0, 1.0 / norm, 0.0)
    left = torch.where(norm > 0.0, 1.0, 0.0).to(G.dtype)
    scaled = G * inverse[:, :, None] * inverse[:, None, :]
    F, each = torch.zeros_like(G), torch.arange(b, device=G.device)
    pivots = torch.zeros(b, R, dtype=torch.int64, device=G.device)
    rank = torch.zeros(b, dtype=torch.int64, device=G.device)
    for step in range(R):
        most, pivot = left.max(dim=-1)
        live = most > cut
        pivots[:, step] = pivot
        row = scaled[each, pivot] - (F[each, :step, pivot][:, None] @ F[:, :step])[:, 0]
        row = torch.where(left < 0.0, 0.0, row / most.sqrt()[:, None])
        row[each, pivot] = most.sqrt()
        F[:, step] = torch.where(live[:, None], row, 0.0)
        left = torch.where(left < 0.0, left, (left - row.square()).clamp_min(0.0))
        left[each, pivot] = -1.0
        left = torch.where(live[:, None], left, -1.0)
        rank += live
    taken = torch.arange(R, device=G.device) < rank[:, None]
    square = taken[:, :, None] & taken[:, None, :]
    eye = torch.eye(R, dtype=G.dtype, device=G.device)
    upper = torch.where(square, F.gather(2, pivots[:, None, :].expand(b, R, R)).triu(), eye)
    X = torch.where(square, torch.linalg.solve_triangular(upper, eye, upper=True), 0.0)
    solve = torch.zeros_like(G)
    # Steps that were not taken name some column or other: they add zeros to it.
    solve.scatter_add_(1, pivots[:, :, None].expand(b, R, R), X)
    condition = X.square().sum((1, 2)).div(rank.clamp_min(1)).sqrt()
    bad = ~torch.isfinite(diagonal).all(-1)
    triangle, solve = F * norm[:, None, :], solve * inverse[:, :, None]
    return GramFactor(
        torch.where(bad[:, None, None], torch.nan, triangle),
        torch.where(bad[:, None, None], torch.nan, solve),
        torch.where(bad, 0, rank),
        torch.where(bad, torch.nan, torch.where(rank == 0, 1.0, condition)),
    )


@torch.no_grad()
def gram_factor(G: Tensor, cut: float = CUT) -> GramFactor:
    """Pivoted Cholesky with cut-off of every Gram matrix of a stack, without a word from the device.

    Args:
        G: (b, R, R) float64, symmetric and positive semidefinite to rounding.
        cut: Share of a column's squared norm that counts as nothing, 0 to 1.

    Returns:
        See `GramFactor`.

    Raises:
        LoraforgeError: A shape, dtype or number does not fit.
    """
    require("gram_factor", "G", G, ("b", "R", "R"), (torch.float64,))
    if G.shape[1] != G.shape[2]:
        raise LoraforgeError(
            "gram_factor: a Gram matrix is square", where="G", got=tuple(G.shape), expected="(b, R, R)"
        )
    require_number("gram_factor", "cut", cut, 0.0, 1.0, "0 to 1")
    if G.shape[1] > WIDEST:
        backend.count("gram_factor", "reference")
    elif backend.takes_native("gram_factor", G):
        return GramFactor(*torch.ops.loraforge.gram_factor(G, cut))
    return gram_factor_reference(G, cut)


@backend.fake("gram_factor")
def _gram_factor_fake(G: Tensor, cut: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b = G.shape[0]
    return torch.empty_like(G), torch.empty_like(G), G.new_empty(b, dtype=torch.int64), G.new_empty(b)
