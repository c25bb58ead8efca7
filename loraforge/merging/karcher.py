"""Karcher mean: the deltas' mean on the sphere, for any number of adapters.

    D = (sum_i w_i ||D_i|| / sum_i w_i) m,   m on the unit sphere with sum_i w_i log_m(D_i / ||D_i||) = 0,

log_m the tangent vector at m that leads to a point on the shortest way; w_i = 1/N unless given, and only their ratios
count. For two adapters of equal norm it is SLERP at t = w_2 / (w_1 + w_2). The result is a combination of the deltas,
so it is exact on the factors.

Source: Karcher, Comm. Pure Appl. Math. 30 (1977); as a merge: mergekit. Cost: inner products, N^2 (m + n) r^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from loraforge.errors import UsageError
from loraforge.linalg import scalars
from loraforge.merging.scalar_params import KarcherParams
from loraforge.types import LayerInputs, Update


def survey(layers: Callable[[], Iterable[LayerInputs]], params: KarcherParams) -> scalars.GramTable | None:
    """Inner products over all modules where the mean is that of whole adapters."""
    return scalars.sum_grams(layers()) if params.scope == "global" else None


def merge_layer(layer: LayerInputs, params: KarcherParams) -> Update:
    """The Karcher mean of one module.

    Args:
        layer: Factors and weights of the module.
        params: Scope and when the iteration ends.

    Returns:
        B (m, R), A (R, n); dense of checkpoints.

    Raises:
        UsageError: A weight below 0, or all are 0: the sphere has no such mean.
        LoraforgeError: Nothing to merge, or shapes differ.
    """
    weights = [layer.weights[i] for i in scalars.counted(layer)]
    if min(weights) < 0 or sum(weights) == 0:
        raise UsageError("karcher takes no such weights", got=list(layer.weights), expected="0 or more, not all 0")
    return scalars.combine(layer, scalars.karcher(scalars.gram_of(layer), weights, params.max_iter, params.tol))
