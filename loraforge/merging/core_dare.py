"""DARE in core space: drop entries of the adapters' small blocks at random, rescale the rest, sum.

    w_i D_i = Q_l C_i Q_a^T,     result = Q_l (sum_i M_i * C_i / density) Q_a^T,     M_i ~ Bernoulli(density)

The bases are those of `core-ties`; draws belong to (seed, module, adapter, entry of the block) as in `dare`. The rank
of the result is at most R and nothing has to be compressed again. At density 1 it is the exact sum.

Source: Panariello et al., arXiv 2509.17786; DARE as in `dare`.
Cost: 2 (m + n) R^2 + O(R^3) + N R^2.
"""

from __future__ import annotations

import torch

from loraforge.linalg.core_blocks import core_blocks
from loraforge.linalg.draws import drop_and_rescale
from loraforge.linalg.elements import summed
from loraforge.merging.elements_params import DareParams
from loraforge.types import LayerInputs, Update


def merge_layer(layer: LayerInputs, params: DareParams) -> Update:
    """The merged factors of one module.

    Args:
        layer: Factors, weights and keys of the draws.
        params: density and seed.

    Returns:
        B (m, k), A (k, n), k <= R.

    Raises:
        LoraforgeError: Shapes differ or a factor holds NaN or Inf.
    """
    core, blocks = core_blocks(layer)
    return core.lift(summed(blocks, drop_and_rescale(layer, params.density, params.seed)).delta(torch.float64))
