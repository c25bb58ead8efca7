"""Low-rank approximation in the metric of a module's outputs."""

from __future__ import annotations

import torch
from torch import Tensor

# Above this many rows the left singular vectors come from the Gram matrix of the rows: as good a subspace (float64),
# only singular values below 1e-8 of the largest lose digits, and the cost falls from that of an SVD to one product.
_SVD_ROWS = 256


def left_subspace(state: Tensor, L: Tensor | None) -> tuple[Tensor, Tensor]:
    """Left singular vectors and values of `state` in the metric L L^T.

    Args:
        state: (p, d).
        L: (d, d) factor of the metric; None for the identity (Frobenius).

    Returns:
        U (p, q) orthonormal, q = min(p, d), and the singular values (q,) of state @ L in falling order. The best rank-k
        approximation S' of the state, least || (S - S') L ||_F, is U_k (U_k^T S).
    """
    M = state if L is None else state @ L
    if M.shape[0] <= _SVD_ROWS:
        U, S, _ = torch.linalg.svd(M, full_matrices=False)
    elif M.shape[0] <= M.shape[1]:
        values, vectors = torch.linalg.eigh(M @ M.mT)
        U, S = vectors.flip(1), values.flip(0).clamp_min(0.0).sqrt()
    else:
        values, vectors = torch.linalg.eigh(M.mT @ M)
        # The columns of M V are orthogonal and in falling order: QR keeps their directions, also of the smallest.
        U, S = torch.linalg.qr(M @ vectors.flip(1)).Q, values.flip(0).clamp_min(0.0).sqrt()
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    return U * torch.where(largest < 0, -1.0, 1.0), S
