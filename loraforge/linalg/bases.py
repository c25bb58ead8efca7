"""Orthogonal bases of stacked factors, from which cores are made, for batches of modules of one shape.

Two ways to the bases, both in float64: Householder QR ("qr", the reference, fine for any input) and the Cholesky
factor of the Gram matrix ("gram", four times less work, squares the condition number). "auto" takes the Gram form
where the measured condition of the scaled factors keeps it within tolerance and QR for every other module.

On a GPU the Cholesky is pivoted and cut off (`kernels.gram_cholesky`), so equal adapters and zeros keep the Gram form,
and a second pass over the basis of the first (CholeskyQR2; Yamamoto et al., ETNA 44, 2015) comes before QR. On the CPU
LAPACK's plain Cholesky is the faster one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.kernels.gram_cholesky import gram_factor
from loraforge.types import LowRank

Backend = Literal["qr", "gram", "auto"]
# Orthogonality lost by the Gram form is about eps64 * cond^2; these bounds stay two orders under the accuracy that is
# promised for each compute dtype (2e-6 and 1e-10).
GRAM_LOSS = {torch.float32: 1e-8, torch.float64: 1e-12}
# Largest eps64 * cond^2 after which a second pass still finds a basis: the first is then orthogonal to a few percent.
SECOND_PASS = 0.05
_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """Bases Q = matrix @ solve (or matrix itself) of a batch of column sets, and their triangles.

    Attributes:
        matrix: (b, rows, p).
        triangle: (b, p, R); columns = Q @ triangle.
        solve: (b, p, p), or None where matrix is Q.
    """

    matrix: Tensor
    triangle: Tensor
    solve: Tensor | None

    def times(self, X: Tensor) -> Tensor:
        """Q @ X for X (b, p, k), without forming Q: (b, rows, k)."""
        return self.matrix @ (X if self.solve is None else self.solve @ X)

    def rows(self, X: Tensor) -> Tensor:
        """(Q @ X)^T, (b, k, rows), laid out by rows."""
        return (X if self.solve is None else self.solve @ X).mT @ self.matrix.mT

    def basis(self) -> Tensor:
        """Q itself, (b, rows, p)."""
        return self.matrix if self.solve is None else self.matrix @ self.solve


def sides(updates: Sequence[LowRank], backend: Backend = "auto") -> tuple[Side, Side]:
    """Bases of both factors of updates of one shape and rank, in float64; scalings go to the left.

    Args:
        updates: b updates, all (m, n) of rank r, with finite factors of one dtype on one device.
        backend: "qr", "gram" or "auto".

    Returns:
        Left side of scaling * B (b, m, r) and right side of A^T (b, n, r).

    Raises:
        LoraforgeError: The factors hold NaN or Inf.
    """
    first = updates[0]
    loss = GRAM_LOSS.get(first.B.dtype, GRAM_LOSS[torch.float32])
    B = first.B.new_empty((len(updates), *first.B.shape), dtype=torch.float64)
    A = first.A.new_empty((len(updates), *first.A.shape), dtype=torch.float64)
    for index, update in enumerate(updates):
        B[index] = update.B
        A[index] = update.A
        if update.scaling != 1.0:
            B[index] *= update.scaling
    left, right = side(B, backend, loss), side(A.mT, backend, loss)
    # NaN and Inf anywhere in a factor reach its triangle, which is small.
    if not (bool(torch.isfinite(left.triangle).all()) and bool(torch.isfinite(right.triangle).all())):
        raise LoraforgeError("Factors hold NaN or Inf", got=f"B {tuple(first.B.shape)}, A {tuple(first.A.shape)}")
    return left, right


def side(columns: Tensor, backend: Backend, loss: float) -> Side:
    """Bases of `columns` (b, rows, R) by the asked backend; all but "qr" fall back to it, by module, where inexact.

    Args:
        columns: float64.
        backend: "qr", "gram" or "auto".
        loss: Largest eps64 * cond^2 that the Gram form may have.
    """
    rows, R = columns.shape[-2:]
    if backend == "qr" or R > rows or R == 0:
        Q, triangle = torch.linalg.qr(columns)
        return Side(Q, triangle, None)
    if columns.device.type == "cuda":
        return pivoted_side(columns, loss)
    G = columns.mT @ columns
    # Scaling columns to norm 1 takes weights and unequal adapters out of the condition number.
    d = G.diagonal(dim1=-2, dim2=-1).sqrt()
    factor = torch.linalg.cholesky_ex(G / (d[:, :, None] * d[:, None, :]), upper=True).L
    eye = torch.eye(R, dtype=G.dtype, device=G.device)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=True)
    # The scaled factor has norm sqrt(R), so this is the Frobenius condition number over R. A matrix that is not
    # positive definite, or a zero column, ends as NaN or as something huge: both fail the comparison.
    condition = torch.linalg.matrix_norm(inverse) / R**0.5
    exact = condition.square() * _EPS <= loss
    if bool(exact.all()):
        return Side(columns, factor * d[:, None, :], inverse / d[:, :, None])
    return _with_fallback(columns, factor * d[:, None, :], inverse / d[:, :, None], exact.tolist())


def gram_sides(updates: Sequence[LowRank]) -> tuple[Side, Side, Tensor]:
    """`sides` by pivoted Cholesky alone, without a word from the device.

    Args:
        updates: As for `sides`.

    Returns:
        Both sides, and (b,) bool: whether the Gram form is within tolerance for a module. Where it is not (NaN and Inf
        are not), its part of the sides is of no use.
    """
    first, count = updates[0], len(updates)
    B, A = widened([update.B for update in updates]), widened([update.A for update in updates])
    # Both Grams in one launch; they are R x R on either side.
    found = gram_factor(torch.cat([B.mT @ B, A @ A.mT]))
    exact = found.condition.square() * _EPS <= GRAM_LOSS.get(first.B.dtype, GRAM_LOSS[torch.float32])
    if first.B.dtype == torch.float64:
        # A column that is left with 1e-7 of itself is rounding in float32 factors and digits in float64 ones.
        nonzero = torch.cat([B.square().sum(1) > 0.0, A.square().sum(2) > 0.0])
        exact &= found.rank == nonzero.sum(-1)
    upper, solve = found.triangle, found.solve
    left, right = Side(B, upper[:count], solve[:count]), Side(A.mT, upper[count:], solve[count:])
    if any(update.scaling != 1.0 for update in updates):
        scaling = torch.tensor([update.scaling for update in updates], dtype=torch.float64).to(B.device)
        left = Side(B, left.triangle * scaling[:, None, None], left.solve)
    return left, right, exact[:count] & exact[count:]


@torch.no_grad()
def widened(parts: Sequence[Tensor]) -> Tensor:
    """A stack of float64 copies, by as few launches as the number of tensors allows."""
    out = parts[0].new_empty((len(parts), *parts[0].shape), dtype=torch.float64)
    torch._foreach_copy_(list(out.unbind()), list(parts))
    return out


def pivoted_side(columns: Tensor, loss: float) -> Side:
    """Bases by pivoted Cholesky, by a second pass where the condition asks for it, and by QR last.

    Args:
        columns: (b, rows, R) float64, R <= rows.
        loss: Largest eps64 * cond^2 of one pass; a second one is taken while eps64 * cond stays within it.
    """
    found = gram_factor(columns.mT @ columns)
    lost = found.condition.square() * _EPS
    kept = found.rank == (columns.square().sum(1) > 0.0).sum(-1)
    # float32 factors have the looser bound, and what they lose to the cut-off is their own rounding.
    whole = kept if loss < GRAM_LOSS[torch.float32] else torch.ones_like(kept)
    once = whole & (lost <= loss)
    twice = whole & (lost <= SECOND_PASS) & (found.condition * _EPS <= loss)
    first, second = torch.stack([once, twice]).tolist()  # the one wait for the device
    if all(first):
        return Side(columns, found.triangle, found.solve)
    matrix, triangle, solve = columns.clone(), found.triangle, found.solve
    eye = torch.eye(columns.shape[-1], dtype=columns.dtype, device=columns.device)
    again = [index for index, good in enumerate(first) if not good and second[index]]
    if again:
        Q, part, good = _second_pass(columns[again], found.triangle[again], found.solve[again])
        matrix[again], triangle[again], solve[again] = Q, part, eye
        again = [index for index, fine in zip(again, good.tolist(), strict=True) if fine]
    for index, fine in enumerate(first):
        if not fine and index not in again:
            matrix[index], triangle[index] = torch.linalg.qr(columns[index])
            solve[index] = eye
    return Side(matrix, triangle, solve)


def _second_pass(columns: Tensor, triangle: Tensor, solve: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bases whose first pass lost too much made orthogonal; with their triangles and whether that worked."""
    Q = columns @ solve
    found = gram_factor(Q.mT @ Q)
    kept = found.rank == (Q.square().sum(1) > 0.0).sum(-1)
    return Q @ found.solve, found.triangle @ triangle, kept & (found.condition < 2.0)


def _with_fallback(columns: Tensor, triangle: Tensor, solve: Tensor, exact: Sequence[bool]) -> Side:
    """The Gram form where `exact`, Householder QR for the other modules of the batch."""
    if not any(exact):
        Q, triangle = torch.linalg.qr(columns)
        return Side(Q, triangle, None)
    matrix = columns.clone()
    for index, good in enumerate(exact):
        if not good:
            matrix[index], triangle[index] = torch.linalg.qr(columns[index])
            solve[index] = torch.eye(columns.shape[-1], dtype=columns.dtype, device=columns.device)
    return Side(matrix, triangle, solve)


def column_signs(columns: Tensor) -> Tensor:
    """A sign for each column of (..., rows, k) that makes its largest entry by size positive (+1 for ties, zeros)."""
    if columns.numel() == 0:
        return columns.new_ones(columns.shape[:-2] + columns.shape[-1:])
    low, high = columns.aminmax(dim=-2)
    return torch.where(high >= -low, 1.0, -1.0).to(columns.dtype)
