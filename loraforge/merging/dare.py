"""DARE merge: drop entries at random, rescale the rest, sum.

    result = sum_i w_i M_i * D_i / density,     M_i ~ Bernoulli(density) entry by entry

with D_i = s_i B_i A_i: each term's expectation is w_i D_i. Draws belong to (seed, module, adapter, entry), so they do
not depend on the order of adapters, on other adapters, blocks, threads or the device (loraforge.linalg.draws).

Source: Yu et al., ICML 2024, arXiv 2311.03099; density = 1 - its drop rate. Its merge by sign election: dare-ties.
Cost: m n R and N m n draws each time the rows are asked for.
"""

from __future__ import annotations

from loraforge.linalg.draws import drop_and_rescale
from loraforge.linalg.elements import deltas_of, summed
from loraforge.merging.elements_params import DareParams
from loraforge.types import LayerInputs, RowStream


def merge_layer(layer: LayerInputs, params: DareParams) -> RowStream:
    """The merged rows of one module.

    Args:
        layer: Factors (or task vectors), weights and keys of the draws.
        params: density and seed.

    Returns:
        (m, n) rows; rank_bound is the sum of the ranks.

    Raises:
        LoraforgeError: Shapes differ or a factor holds NaN or Inf.
    """
    return summed(deltas_of(layer), drop_and_rescale(layer, params.density, params.seed))
