"""TIES in core space: trim, elect and average the adapters' small blocks between shared bases.

    w_i D_i = Q_l C_i Q_a^T,     result = Q_l ties(C_1, .., C_N) Q_a^T

Q_l (m x p) and Q_a (n x q) are the left singular vectors of the stacked w_i s_i B_i and the right ones of the stacked
A_i, signs fixed (loraforge.linalg.core). The rule is that of `ties` on blocks of p q entries, with p, q <= R, so the
rank of the result is at most R and nothing has to be compressed again. What an entry means depends on the bases, hence
on how an adapter splits its delta into factors: the convention of the paper. An adapter that adds nothing (a delta or
weight of zero) has no say in the bases. One adapter at density 1 comes back.

Source: Panariello et al., arXiv 2509.17786; TIES as in `ties`.
Cost: 2 (m + n) R^2 + O(R^3) + N R^2.
"""

from __future__ import annotations

import torch

from loraforge.linalg.core_blocks import core_blocks
from loraforge.linalg.elements import elected, trim
from loraforge.linalg.thresholds import Layers, thresholds_over, trimmed_in
from loraforge.merging.elements_params import TrimParams
from loraforge.types import LayerInputs, Update


def survey(layers: Layers, params: TrimParams) -> list[float] | None:
    """The threshold of each adapter's blocks over all modules; None where each module has its own."""
    if params.scope != "global":
        return None
    return thresholds_over(layers, params.density, lambda layer: core_blocks(layer)[1])


def merge_layer(layer: LayerInputs, params: TrimParams) -> Update:
    """The merged factors of one module.

    Args:
        layer: Factors and weights; `context` has the survey's thresholds. Without a survey the module stands for the
            whole adapter.
        params: density and scope.

    Returns:
        B (m, k), A (k, n), k = min(p, q) <= R.

    Raises:
        LoraforgeError: Shapes differ or a factor holds NaN or Inf.
    """
    core, blocks = core_blocks(layer)
    thresholds = trimmed_in(blocks, params.density) if layer.context is None else layer.context
    return core.lift(elected(blocks, trim(thresholds)).delta(torch.float64))
