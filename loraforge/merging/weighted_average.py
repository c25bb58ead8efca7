"""Weighted average: the exact weighted mean of the deltas.

delta = sum_i w_i s_i B_i A_i with w_i = 1/N unless given; given weights are used as they are (two adapters with w and
1 - w make the usual interpolation). Averages run over all N adapters: one that lacks the module counts as a delta of
0.

Model soups for updates (Wortsman et al., ICML 2022, arXiv 2203.05482). Cost: one copy of the factors; rank at most R
= sum r_i.
"""

from __future__ import annotations

from loraforge.linalg.factored import weighted_sum
from loraforge.merging.methods import NoParams
from loraforge.types import LayerInputs, Update


def merge_layer(layer: LayerInputs, params: NoParams) -> Update:
    """Weighted mean of one module: B (m, R), A (R, n), scaling 1; of full checkpoints the dense (m, n) sum.

    Args:
        layer: Factors and weights of the module.
        params: Nothing to set.

    Returns:
        The exact mean, before any rank rule.
    """
    return weighted_sum(layer.present)
