"""Sums of a module for features mixed after the fact: X~ <- (1 - rho) X~ + rho X.

    G <- (1 - rho)^2 G + rho (1 - rho) (C + C^T) + rho^2 P;   C <- (1 - rho) C + rho P

G = X~^T X~, C = X^T X~ and P = X^T X are kept apart a fold, so any rho costs sums of (d, d) matrices and no product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraforge.types import FoldStats


def mixed_gram(folds: Sequence[FoldStats], rho: float | None) -> Tensor:
    """(d, d) Gram of (1 - rho) X~ + rho X over some folds, in memory of its own; as collected where rho is fixed."""
    total = torch.zeros_like(folds[0].gram)
    for fold in folds:
        if rho is None or rho == 0.0:
            total += fold.gram
            continue
        assert fold.cross is not None and fold.prior is not None
        keep = 1.0 - rho
        total.add_(fold.gram, alpha=keep**2).add_(fold.prior, alpha=rho**2)
        total.add_(fold.cross, alpha=keep * rho).add_(fold.cross.mT, alpha=keep * rho)
    return total


def mixed_lag(folds: Sequence[FoldStats], rho: float | None) -> Tensor:
    """(d, d) what the base weight is multiplied by: cross-Gram less Gram of the mixed features, over some folds."""
    total = torch.zeros_like(folds[0].gram)
    rho = rho or 0.0
    keep = 1.0 - rho
    for fold in folds:
        assert fold.cross is not None
        total.add_(fold.cross, alpha=keep).sub_(fold.gram, alpha=keep**2)
        if rho:
            assert fold.prior is not None
            total.add_(fold.prior, alpha=rho * keep)
            total.sub_(fold.cross, alpha=keep * rho).sub_(fold.cross.mT, alpha=keep * rho)
    return total


def mixed_target(folds: Sequence[FoldStats], rho: float | None) -> Tensor:
    """(p, d) target for the mixed features, over some folds."""
    features = torch.stack([f.features for f in folds]).sum(0)
    if rho:
        priors = [f.features_prior for f in folds if f.features_prior is not None]
        features = (1.0 - rho) * features + rho * torch.stack(priors).sum(0)
    return folds[0].outputs @ features


@dataclass(frozen=True, slots=True, eq=False)
class BaseProducts:
    """W0 (p, d) times the sums of one fold."""

    gram: Tensor
    cross: Tensor
    crossed: Tensor | None
    prior: Tensor | None

    @classmethod
    def of(cls, weight: Tensor | None, fold: FoldStats) -> BaseProducts | None:
        """None without a base weight, or where the cross-Gram was not asked for."""
        if weight is None or fold.cross is None:
            return None
        crossed = None if fold.prior is None else weight @ fold.cross.mT
        return cls(
            weight @ fold.gram, weight @ fold.cross, crossed, None if fold.prior is None else weight @ fold.prior
        )

    def lag(self, rho: float) -> Tensor:
        """(p, d) W0 (C - G) of the mixed features."""
        if rho == 0.0:
            return self.cross - self.gram
        assert self.crossed is not None and self.prior is not None
        keep = 1.0 - rho
        return keep * (self.cross - keep * self.gram - rho * (self.cross + self.crossed) + rho * self.prior)
