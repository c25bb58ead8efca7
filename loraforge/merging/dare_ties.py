"""DARE with TIES' election: drop entries at random, rescale, elect a sign, average what agrees.

    x_i = w_i M_i * D_i / density,     g = sign(sum_i x_i),     result = mean of {x_i : sign(x_i) = g}

entry by entry, with D_i = s_i B_i A_i and M_i the masks of `dare`: draws belong to (seed, module, adapter, entry).
Where the sum is exactly 0 the result is 0.

Source: Yu et al., ICML 2024, arXiv 2311.03099; Yadav et al., NeurIPS 2023, arXiv 2306.01708.
Cost: m n R and N m n draws each time the rows are asked for.
"""

from __future__ import annotations

from loraforge.linalg.draws import drop_and_rescale
from loraforge.linalg.elements import deltas_of, elected
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
    return elected(deltas_of(layer), drop_and_rescale(layer, params.density, params.seed))
