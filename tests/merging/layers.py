"""Layers for tests of the methods that sum."""

from __future__ import annotations

import numpy as np
import torch

from loraforge.types import LayerInputs, LowRank
from tests.oracles import factored as oracle


def layer(ranks=(4, 2, 7), weights=(1.0, -0.5, 0.25), dtype=torch.float64, m=23, n=17, gap=None) -> LayerInputs:
    """One adapter a rank, with scalings alpha / r of their own; `gap` makes that adapter lack the module."""
    generator = torch.Generator().manual_seed(5)
    factors: list[LowRank | None] = []
    for i, r in enumerate(ranks):
        B = torch.randn(m, r, generator=generator, dtype=torch.float64).to(dtype)
        A = torch.randn(r, n, generator=generator, dtype=torch.float64).to(dtype)
        factors.append(None if i == gap else LowRank(B, A, (i + 1) * 8 / r))
    return LayerInputs("m", factors, weights)


def exact(inputs: LayerInputs) -> np.ndarray:
    return oracle.dense_sum([(w, f.scaling, f.B.double().numpy(), f.A.double().numpy()) for w, f in inputs.present])


def product(lr: LowRank) -> np.ndarray:
    return lr.delta(torch.float64).numpy()
