"""Spectra of factored updates and the numbers read from them."""

from __future__ import annotations

import torch
from torch import Tensor

from loraforge.linalg.bases import sides
from loraforge.types import LowRank


def singular_values(lr: LowRank) -> Tensor:
    """All singular values of an update, from its r x r core.

    Args:
        lr: The update, (m, n).

    Returns:
        (min(r, m, n),) float64, descending; the other singular values of the delta are 0.
    """
    left, right = sides([lr], "qr")
    S: Tensor = torch.linalg.svdvals(left.triangle[0] @ right.triangle[0].T)
    return S


def effective_rank(S: Tensor) -> float:
    """Exponential of the entropy of S / sum S (Roy and Vetterli, 2007): between 1 and R, 0 for a zero spectrum."""
    p = S.to(torch.float64)
    total = float(p.sum())
    if total == 0.0:
        return 0.0
    return float(torch.special.entr(p / total).sum().exp())


def stable_rank(S: Tensor) -> float:
    """Ratio sum S^2 / S_1^2: between 1 and R, 0 for a zero spectrum."""
    squares = S.to(torch.float64).square()
    return float(squares.sum() / squares[0]) if squares.numel() and float(squares[0]) > 0.0 else 0.0
