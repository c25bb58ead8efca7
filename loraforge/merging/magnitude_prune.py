"""Magnitude pruning: the largest entries of each delta, summed.

    result = sum_i w_i x_i,     x_i = D_i where |D_i| >= t_i, else 0

entry by entry, with D_i = s_i B_i A_i and t_i the magnitude that floor(density * n) entries of D_i reach: of all
modules together (scope=global) or of each (scope=module), equal ones at the threshold all kept. The trim of TIES
without its election.

Source: PEFT `magnitude_prune`, here on the delta and not on the factors.
Cost: m n R a pass over the deltas; two passes for the thresholds, then one each time the rows are asked for.
"""

from __future__ import annotations

from loraforge.linalg.elements import deltas_of, summed, trim
from loraforge.linalg.thresholds import Layers, thresholds_over, trimmed_in
from loraforge.merging.elements_params import TrimParams
from loraforge.types import LayerInputs, RowStream


def survey(layers: Layers, params: TrimParams) -> list[float] | None:
    """The threshold of each adapter over all modules; None where each module has its own."""
    return thresholds_over(layers, params.density) if params.scope == "global" else None


def merge_layer(layer: LayerInputs, params: TrimParams) -> RowStream:
    """The merged rows of one module.

    Args:
        layer: Factors (or task vectors) and weights; `context` has the survey's thresholds. Without a survey the module
            stands for the whole adapter.
        params: density and scope.

    Returns:
        (m, n) rows; rank_bound is the sum of the ranks.

    Raises:
        LoraforgeError: Shapes differ or a factor holds NaN or Inf.
    """
    deltas = deltas_of(layer)
    thresholds = trimmed_in(deltas, params.density) if layer.context is None else layer.context
    return summed(deltas, trim(thresholds))
