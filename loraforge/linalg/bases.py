"""Orthogonal bases of stacked factors, from which cores are made.

Two ways to the bases, both in float64: Householder QR ("qr", the reference, fine for any input) and the Cholesky
factor of the Gram matrix ("gram", four times less work, squares the condition number). "auto" takes the Gram form
where the measured condition of the scaled factors keeps it within tolerance and QR for every other side of every
other module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.types import LowRank

Backend = Literal["qr", "gram", "auto"]
# Orthogonality lost by the Gram form is about eps64 * cond^2; these bounds stay two orders under the accuracy that is
# promised for each compute dtype (2e-6 and 1e-10).
GRAM_LOSS = {torch.float32: 1e-8, torch.float64: 1e-12}


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One side's orthonormal basis Q = matrix @ solve (or matrix itself) and its triangle: columns = Q @ triangle."""

    matrix: Tensor
    triangle: Tensor
    solve: Tensor | None

    def times(self, X: Tensor) -> Tensor:
        """Q @ X for X (p, k), without forming Q."""
        return self.matrix @ (X if self.solve is None else self.solve @ X)

    def basis(self) -> Tensor:
        """Q itself, (rows, p)."""
        return self.matrix if self.solve is None else self.matrix @ self.solve


def gram_side(columns: Tensor, loss: float) -> Side | None:
    """Basis of `columns` (rows, R) through the Cholesky factor of its Gram matrix.

    Args:
        columns: (rows, R) float64.
        loss: Largest eps64 * cond^2 that is allowed.

    Returns:
        The side, or None where the columns are too near to dependent (or more than the rows).
    """
    rows, R = columns.shape
    if R > rows:
        return None
    G = columns.T @ columns
    # Scaling columns to norm 1 takes weights and unequal adapters out of the condition number.
    d = G.diagonal().sqrt()
    if R == 0 or float(d.min()) == 0.0 or not bool(torch.isfinite(d).all()):
        return None
    factor, info = torch.linalg.cholesky_ex(G / torch.outer(d, d), upper=True)
    if int(info) != 0:
        return None
    inverse = torch.linalg.solve_triangular(factor, torch.eye(R, dtype=G.dtype, device=G.device), upper=True)
    condition = float(torch.linalg.matrix_norm(factor)) * float(torch.linalg.matrix_norm(inverse)) / R
    if not condition**2 * torch.finfo(torch.float64).eps <= loss:
        return None
    return Side(columns, factor * d, inverse / d[:, None])


def side(columns: Tensor, backend: Backend, loss: float) -> Side:
    """Basis of `columns` (rows, R) by the asked backend; all but "qr" fall back to it where inexact."""
    if backend != "qr":
        found = gram_side(columns, loss)
        if found is not None:
            return found
    Q, T = torch.linalg.qr(columns)
    return Side(Q, T, None)


def sides(lr: LowRank, backend: Backend = "auto") -> tuple[Side, Side]:
    """Bases of both factors in float64; scaling goes to the left.

    Args:
        lr: The update. Factors must be finite.
        backend: "qr", "gram" or "auto".

    Returns:
        Left side of scaling * B (m, r) and right side of A^T (n, r).

    Raises:
        LoraforgeError: The factors hold NaN or Inf.
    """
    loss = GRAM_LOSS.get(lr.B.dtype, GRAM_LOSS[torch.float32])
    B, A = lr.B.to(torch.float64), lr.A.to(torch.float64)
    if not (math.isfinite(float(B.sum())) and math.isfinite(float(A.sum()))):
        raise LoraforgeError("Factors hold NaN or Inf", got=f"B {tuple(lr.B.shape)}, A {tuple(lr.A.shape)}")
    left = B if lr.scaling == 1.0 else B * lr.scaling
    return side(left, backend, loss), side(A.T, backend, loss)


def column_signs(columns: Tensor) -> Tensor:
    """A sign for each column of (rows, k) that makes its entry of largest size positive (+1 for a zero column)."""
    if columns.shape[0] == 0 or columns.shape[1] == 0:
        return columns.new_ones(columns.shape[1])
    top = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(top < 0, -1.0, 1.0).to(columns.dtype)
