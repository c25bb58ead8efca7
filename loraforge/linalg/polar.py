"""The orthogonal polar factor: the nearest set of orthonormal columns to a set of directions."""

from __future__ import annotations

import torch
from torch import Tensor

from loraforge.linalg.flatten import support


def polar(X: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """P Q^T of X = P S Q^T without its numerically null directions.

    Of all matrices with orthonormal columns it is the nearest to X in Frobenius norm, and it depends on no order of
    the columns: polar(X T) = polar(X) T for any orthogonal T. Columns that depend on each other share what they span (a
    partial isometry), where the full factor would be completed with directions that LAPACK chooses at will.

    Args:
        X: (p, k) directions side by side, float64.
        dtype: Dtype of the inputs, which decides what is rounding.

    Returns:
        (p, k), singular values 1 and 0.
    """
    P, S, Qh = torch.linalg.svd(X, full_matrices=False)
    rank = support(S, dtype)
    factor: Tensor = P[:, :rank] @ Qh[:rank]
    return factor
