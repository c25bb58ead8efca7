"""Iso-C: the sum of the deltas with all its singular values equal.

    W = sum_i w_i D_i = U diag(s) V^T,   W_iso = alpha * mean(s) * U V^T

with w_i = 1 unless given. This file makes the sum; the rank rule cuts it and `loraforge.linalg.flatten` flattens what
is kept, on the support of the sum only. The published rule takes all min(m, n) directions: on adapters, of rank R far
below, those beyond R are LAPACK's choice, and inputs that differ by 1e-13 give results that differ by their size.

Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, ICML 2025, arXiv
2502.04959. Cost: (m + n) R^2 + R^3 a module, R = sum r_i; of full checkpoints one SVD of m x n.
"""

from __future__ import annotations

from loraforge.linalg.factored import weighted_sum
from loraforge.merging.spectral_params import IsoParams
from loraforge.types import LayerInputs, Update


def merge_layer(layer: LayerInputs, params: IsoParams) -> Update:
    """The sum of one module, to be flattened after the rank rule: B (m, R), A (R, n); dense of checkpoints.

    Args:
        layer: Factors (or task vectors) and weights of the module.
        params: How the result is flattened; read after the rank rule, not here.

    Returns:
        The exact weighted sum.
    """
    return weighted_sum(layer.present)
