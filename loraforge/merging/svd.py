"""SVD merge: the best rank-k approximation of the weighted sum of the deltas.

delta = U_k S_k V_k^T of sum_i w_i s_i B_i A_i, w_i = 1 unless given, k the largest r_i of the module unless a rank
rule is given. By Eckart and Young no update of rank k is nearer in Frobenius norm. The decomposition runs on the
R x R core of the stacked factors (loraforge.linalg.factored), never on the m x n sum. This file makes the sum; the rank
rule, the same for every method, cuts it.

Cost: (m + n) R^2 + R^3 a module, R = sum r_i.
"""

from __future__ import annotations

from loraforge.linalg.factored import weighted_sum
from loraforge.merging.methods import NoParams
from loraforge.types import LayerInputs, Update


def merge_layer(layer: LayerInputs, params: NoParams) -> Update:
    """Weighted sum of one module, to be cut to rank k: B (m, R), A (R, n); dense of checkpoints.

    Args:
        layer: Factors and weights of the module.
        params: Nothing to set.

    Returns:
        The exact sum, before the rank rule.
    """
    return weighted_sum(layer.present)
