"""Model Stock: the deltas' mean, shrunk towards the base by how little they agree.

    D = t sum_i w_i D_i,   t = N c / (1 + (N - 1) c),   c the mean cosine over pairs of deltas, w_i = 1/N unless given.

Orthogonal deltas leave nothing, equal ones all. c below 0 counts as 0, where the paper's t has no meaning. The result
is a multiple of the weighted average, so it is exact on the factors.

Source: Jang et al., ECCV 2024, arXiv 2403.19522, equation 7 for N models. Cost: inner products, N^2 (m + n) r^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from loraforge.linalg import scalars
from loraforge.merging.scalar_params import ModelStockParams
from loraforge.types import LayerInputs, Update


def survey(layers: Callable[[], Iterable[LayerInputs]], params: ModelStockParams) -> scalars.GramTable | None:
    """Inner products over all modules where the cosine is that of whole adapters."""
    return scalars.sum_grams(layers()) if params.scope == "global" else None


def merge_layer(layer: LayerInputs, params: ModelStockParams) -> Update:
    """The shrunk weighted average of one module.

    Args:
        layer: Factors and weights of the module.
        params: Scope of the cosines.

    Returns:
        B (m, R), A (R, n); dense of checkpoints.

    Raises:
        LoraforgeError: Nothing to merge, or shapes differ.
    """
    t = scalars.model_stock(scalars.gram_of(layer))
    return scalars.combine(layer, [t * layer.weights[i] for i in scalars.counted(layer)])
