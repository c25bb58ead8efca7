"""Model breadcrumbs: drop the largest and the smallest magnitudes of each delta, sum the rest.

    result = sum_i w_i x_i,     x_i = D_i where low_i <= |D_i| <= high_i, else 0

entry by entry in each module, with D_i = s_i B_i A_i. Of its n entries the floor(gamma * n) largest are dropped (they
are outliers) and, of the rest, the floor(density * n) largest are kept: high_i and low_i are the largest and smallest
magnitude among these, and entries equal to them are kept too.

Source: Davari and Belilovsky, ECCV 2024, arXiv 2312.06795.
Cost: m n R a pass over the deltas; two passes for the limits, then one each time the rows are asked for.
"""

from __future__ import annotations

import math

from loraforge.linalg.elements import Deltas, EntryRules, between, deltas_of, summed
from loraforge.linalg.thresholds import kept_count, thresholds_in
from loraforge.merging.elements_params import BreadcrumbsParams
from loraforge.types import LayerInputs, RowStream


def merge_layer(layer: LayerInputs, params: BreadcrumbsParams) -> RowStream:
    """The merged rows of one module.

    Args:
        layer: Factors (or task vectors) and weights.
        params: density and gamma.

    Returns:
        (m, n) rows; rank_bound is the sum of the ranks.

    Raises:
        LoraforgeError: Shapes differ or a factor holds NaN or Inf.
    """
    deltas = deltas_of(layer)
    return summed(deltas, _between(deltas, params))


def _between(deltas: Deltas, params: BreadcrumbsParams) -> EntryRules:
    """Keeps the entries between each adapter's limits."""
    n = deltas.shape[0] * deltas.shape[1]
    dropped, kept = kept_count(params.gamma, n), kept_count(params.density, n)
    limits = thresholds_in(deltas, [dropped + 1, dropped + kept])
    return between([(low if kept else math.inf, high) for high, low in limits])
