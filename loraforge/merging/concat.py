"""Concatenation: the factors of all adapters side by side.

B = [w_1 s_1 B_1 | w_2 s_2 B_2 | ...], A = [A_1; A_2; ...], so B A = sum_i w_i s_i B_i A_i exactly, with w_i = 1
unless given. The rank is R = sum r_i and no direction is re-ranked, orthogonalised or dropped.

The form of PEFT's `cat`. Cost: one copy of the factors.
"""

from __future__ import annotations

from loraforge.linalg.factored import weighted_sum
from loraforge.merging.methods import NoParams
from loraforge.types import LayerInputs, Update


def merge_layer(layer: LayerInputs, params: NoParams) -> Update:
    """Factors of one module side by side: B (m, R), A (R, n), scaling 1.

    Args:
        layer: Factors and weights of the module.
        params: Nothing to set.

    Returns:
        The exact sum; rows of A are the adapters' own, in the user's order.
    """
    return weighted_sum(layer.present)
