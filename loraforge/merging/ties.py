"""TIES merge: trim, elect a sign, average what agrees.

    x_i = w_i D_i where |D_i| >= t_i, else 0,     g = sign(sum_i x_i),     result = mean of {x_i : sign(x_i) = g}

entry by entry, with D_i = s_i B_i A_i and t_i the magnitude that floor(density * n) entries of D_i reach: of all
modules together (scope=global) or of each (scope=module), equal ones at the threshold all kept. Trimming looks at D_i
without its weight, the election at w_i D_i with the weight's sign. Where the sum is exactly 0 nobody is elected and the
result is 0.

Source: Yadav et al., NeurIPS 2023, arXiv 2306.01708. Trimming is over the whole adapter there; PEFT's form trims
tensor by tensor, the factors instead of the delta, and elects before the weights.
Cost: m n R a pass over the deltas; two passes for the thresholds, then one each time the rows are asked for.
"""

from __future__ import annotations

from loraforge.linalg.elements import deltas_of, elected, trim
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
    return elected(deltas, trim(thresholds))
