"""TSV-M: the leading singular vectors of every task, whitened so that the tasks do not interfere.

    D_i ~ U_i diag(s_i) V_i^T at k_i directions;   U* = [U_1 .. U_N], V* = [V_1 .. V_N], s* = (s_1, .., s_N)
    W = polar(U*) diag(s*) polar(V*)^T

with w_i folded into D_i. k_i is all r_i for adapters (sum r_i = R directions are there for the taking), min(m, n) / N
for full checkpoints, as published; never more than D_i has, because further vectors are LAPACK's choice. Adapters that
span the same directions share them (see `linalg.polar`).

Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR 2025, arXiv 2412.00081. Cost:
2 (m + n) R^2 + (N + 2) R^3 a module; checkpoints N + 2 SVDs of m x n.
"""

from __future__ import annotations

import torch

from loraforge.linalg.core import core_of
from loraforge.linalg.flatten import support
from loraforge.linalg.polar import polar
from loraforge.merging.spectral_params import TsvParams
from loraforge.types import LayerInputs, Update


def merge_layer(layer: LayerInputs, params: TsvParams) -> Update:
    """The whitened task singular vectors of one module: a LowRank of rank sum k_i, Dense of full checkpoints.

    Args:
        layer: Factors (or task vectors) and weights of the module.
        params: k.
    """
    core = core_of(layer)
    blocks = core.present
    # Identity bases: full checkpoints, whose task vectors have full rank and share min(m, n) directions.
    most = params.k or (max(1, min(blocks[0].shape) // len(blocks)) if core.left is None else min(blocks[0].shape))
    left, values, right = [], [], []
    for C in blocks:
        U, S, Vh = torch.linalg.svd(C, full_matrices=False)
        k = min(most, support(S, core.cut_dtype))
        left.append(U[:, :k])
        values.append(S[:k])
        right.append(Vh[:k].T)
    U_star, V_star = polar(torch.cat(left, dim=1), core.cut_dtype), polar(torch.cat(right, dim=1), core.cut_dtype)
    return core.lift_triplets(U_star, torch.cat(values), V_star)
