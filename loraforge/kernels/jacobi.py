"""SVD of a stack of small matrices by one-sided Jacobi: the form that a GPU can run a matrix a block.

    C P = Q R (QR with column pivoting);   R^T J = W with orthogonal columns;   C = (Q J) diag|W| (P W / |W|)^T

Everything is computed in float64 and rounded at the end.

Source: Drmac and Veselic, SIAM J. Matrix Anal. Appl. 29 (2008).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraforge.kernels import backend
from loraforge.kernels.checks import FLOAT32_64, require, require_number

# Rows and columns up to which a block of the device takes a matrix; LAPACK's forms are faster above.
LARGEST = 160
# Sixty-four columns take about eight, a hundred and sixty eleven: what takes three times as many does not converge.
SWEEPS = 40
NOT_CONVERGED = -1
NOT_FINITE = -2


def jacobi_svd_reference(C: Tensor, sweeps: int = SWEEPS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`jacobi_svd` in PyTorch, by the library's own decomposition: `info` is 1 where it is finite."""
    finite = torch.isfinite(C).flatten(1).all(1)
    U, S, Vh = torch.linalg.svd(torch.where(finite[:, None, None], C, 0.0), full_matrices=False)
    nan = torch.nan
    U, Vh = (torch.where(finite[:, None, None], part, nan) for part in (U, Vh))
    info = torch.where(finite, 1, NOT_FINITE).to(torch.int32)
    return U, torch.where(finite[:, None], S, nan), Vh, info


@torch.no_grad()
def jacobi_svd(C: Tensor, sweeps: int = SWEEPS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Thin SVD of every matrix of a stack, without a word from the device: what went wrong stands in `info`.

    Singular values that are 0 to rounding of the scale are exactly 0, and their vectors complete orthonormal sets.

    Args:
        C: (b, R, R'), float32 or float64.
        sweeps: Sweeps over all pairs of columns after which a matrix is given up, 1 or more.

    Returns:
        U (b, R, k), S (b, k) descending, Vh (b, k, R') with k = min(R, R') and info (b,) int32: the sweeps it took, -1
        where they were not enough, -2 where the matrix is not finite (its results are NaN).

    Raises:
        LoraforgeError: A shape, dtype or number does not fit.
    """
    require("jacobi_svd", "C", C, ("b", "R", "R'"), FLOAT32_64)
    require_number("jacobi_svd", "sweeps", sweeps, 1, 1000, "1 to 1000")
    if backend.takes_native("jacobi_svd", C):
        return torch.ops.loraforge.jacobi_svd(C, sweeps)
    return jacobi_svd_reference(C, sweeps)


@backend.fake("jacobi_svd")
def _jacobi_svd_fake(C: Tensor, sweeps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, m, n = C.shape
    k = min(m, n)
    return C.new_empty(b, m, k), C.new_empty(b, k), C.new_empty(b, k, n), C.new_empty(b, dtype=torch.int32)
