"""Solves with symmetric positive (semi-)definite matrices: Cholesky first, then a jitter ladder, then eigenvectors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError

_JITTERS = tuple(10.0**e for e in range(-14, -2))
_PANEL = 256  # columns of a step of the CPU factorisation


@dataclass(frozen=True, slots=True)
class SolveInfo:
    """How a system was solved.

    Attributes:
        solver: "cholesky", "cholesky+jitter" or "eigh".
        jitter: What was added to the diagonal, relative to the mean diagonal entry; 0 without a ladder.
        condition: Lower bound of the condition number, (max diag L / min diag L)^2 of the Cholesky factor.
    """

    solver: str
    jitter: float
    condition: float


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A Cholesky factor L (d, d), lower, of T + jitter, or of the pseudo-inverse's range."""

    L: Tensor
    info: SolveInfo

    def solve_right(self, T: Tensor) -> Tensor:
        """(p, d): T @ (L L^T)^{-1}."""
        return self.other_half_right(self.half_solve_right(T))

    def half_solve_right(self, T: Tensor) -> Tensor:
        """(p, d): T @ L^{-T}, which is the solution of T @ (L L^T)^{-1} times L: its rows in the metric of L L^T."""
        return torch.linalg.solve_triangular(self.L.mT, T, upper=True, left=False)

    def other_half_right(self, M: Tensor) -> Tensor:
        """(p, d): M @ L^{-1}."""
        return torch.linalg.solve_triangular(self.L, M, upper=False, left=False)


def factor_spd(matrix: Tensor, where: str) -> Factor:
    """Factorises a symmetric (d, d) matrix that should be positive definite.

    Cholesky; on failure a diagonal shift that grows tenfold from 1e-14 to 1e-3 of the mean diagonal; then the
    eigenvectors with the negative part clamped to that last shift. Every step taken is in the returned `info`.

    Raises:
        LoraforgeError: A NaN or Inf in the matrix; names `where`.
    """
    L, code = _cholesky(matrix)
    d = L.diagonal()
    # All that has to be known, in one wait for the device. A NaN or Inf anywhere shows in the sum.
    facts = torch.stack([matrix.sum(), matrix.diagonal().mean(), code.to(matrix.dtype), d.max(), d.min()])
    total, scale, failed, largest, least = facts.tolist()
    if not math.isfinite(total):
        raise LoraforgeError(
            "the Gram matrix of a module has NaN or Inf",
            where=where,
            hint="check the calibration data and the base model's forward; try --set base_dtype=float32",
        )
    if scale <= 0.0:
        # No feature ever fired: the regulariser is zero too, so any solution fits; the identity gives zero.
        eye = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        return Factor(eye, SolveInfo("eigh", 0.0, 1.0))
    if not failed:
        return Factor(L, SolveInfo("cholesky", 0.0, (largest / least) ** 2))
    del L, d
    for jitter in _JITTERS:
        shifted = matrix.clone()
        shifted.diagonal().add_(jitter * scale)
        L, code = _cholesky(shifted)
        failed, largest, least = torch.stack([code.to(L.dtype), L.diagonal().max(), L.diagonal().min()]).tolist()
        if not failed:
            return Factor(L, SolveInfo("cholesky+jitter", jitter, (largest / least) ** 2))
    values, vectors = torch.linalg.eigh(matrix)
    clamped = values.clamp_min(_JITTERS[-1] * scale)
    # V diag(clamped) V^T = (V diag(sqrt)) (...)^T; its QR gives a lower factor with the same product.
    upper = torch.linalg.qr((vectors * clamped.sqrt()).mT, mode="r").R
    L = upper.mT * torch.sign(upper.diagonal())
    return Factor(L, SolveInfo("eigh", _JITTERS[-1], float(clamped.max() / clamped.min())))


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The lower Cholesky factor, and LAPACK's code: 0 where it is one.

    On the CPU in panels of matrix products and triangular solves: LAPACK's own takes 1.4 times as long on one core.
    """
    d = matrix.shape[0]
    if matrix.device.type != "cpu" or d <= _PANEL:
        return torch.linalg.cholesky_ex(matrix)
    L = torch.zeros_like(matrix, memory_format=torch.contiguous_format)
    for at in range(0, d, _PANEL):
        end = min(at + _PANEL, d)
        done = L[at:end, :at]
        corner, code = torch.linalg.cholesky_ex(torch.addmm(matrix[at:end, at:end], done, done.mT, alpha=-1))
        if int(code) != 0:
            break
        L[at:end, at:end] = corner
        below = torch.addmm(matrix[end:, at:end], L[end:, :at], done.mT, alpha=-1)
        L[end:, at:end] = torch.linalg.solve_triangular(corner.mT, below, upper=True, left=False)
    return L, code
