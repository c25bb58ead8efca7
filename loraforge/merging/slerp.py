"""SLERP: the point on the arc between two deltas.

    D = sin((1 - t) theta) / sin theta D_1 + sin(t theta) / sin theta D_2,   cos theta = <D_1, D_2> / (||D_1|| ||D_2||)

t = 1/2 unless given. The result is a combination of the deltas, so it is exact on the factors. theta is that of each
module, or with scope=global that of the adapters as a whole. Deltas of one direction, of opposite ones, or of zero are
interpolated linearly, the limit of the formula where it has one.

Source: Shoemake, SIGGRAPH 1985; as a merge: mergekit. Cost: inner products, (m + n) r^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from loraforge.errors import LoraforgeError
from loraforge.linalg import scalars
from loraforge.merging.scalar_params import SlerpParams
from loraforge.types import LayerInputs, Update


def survey(layers: Callable[[], Iterable[LayerInputs]], params: SlerpParams) -> scalars.GramTable | None:
    """Inner products over all modules where the angle is that of whole adapters."""
    return scalars.sum_grams(layers()) if params.scope == "global" else None


def merge_layer(layer: LayerInputs, params: SlerpParams) -> Update:
    """Interpolates one module of two adapters; one alone is returned as it is.

    Args:
        layer: Factors of the module; weights are not used.
        params: t and scope.

    Returns:
        B (m, R), A (R, n); dense of checkpoints.

    Raises:
        LoraforgeError: More than two adapters, or shapes differ.
    """
    if len(layer.factors) > 2:
        raise LoraforgeError(
            "slerp merges two adapters", where=layer.module, got=f"{len(layer.factors)} adapters", hint="use karcher"
        )
    return scalars.combine(layer, scalars.slerp(scalars.gram_of(layer), params.t) if layer.count == 2 else [1.0])
