"""SVC: the sum of the deltas with every singular value divided by how often it was counted.

    W = sum_i w_i D_i = U diag(s) V^T;   a_r^i = u_r^T D_i,   c_r = u_r^T W = s_r v_r^T
    p_r^i = <c_r, a_r^i> / ||a_r^i||^2,   s_r <- s_r N / sum_i max(alpha, p_r^i)

p_r^i is how often direction r of the sum holds task i's own share in it: N where N tasks agree, 1 where one is alone.
A task without a share (a_r^i = 0) is not counted in that direction, neither in the sum nor in N.

When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging, 2026, arXiv 2602.05536. Cost: 2 (m + n) R^2 +
N R^3 a module; checkpoints one SVD of m x n and N products.
"""

from __future__ import annotations

import torch

from loraforge.linalg.core import core_of
from loraforge.linalg.flatten import NULL, support
from loraforge.merging.spectral_params import SvcParams
from loraforge.types import LayerInputs, Update


def merge_layer(layer: LayerInputs, params: SvcParams) -> Update:
    """The calibrated sum of one module: a LowRank of rank at most R, Dense of full checkpoints.

    Args:
        layer: Factors (or task vectors) and weights of the module.
        params: alpha.
    """
    core = core_of(layer)
    U, S, Vh = torch.linalg.svd(core.total(), full_matrices=False)
    p = support(S, core.cut_dtype)
    if p == 0:
        return core.lift(core.total())
    U, S, Vh = U[:, :p], S[:p], Vh[:p]
    counted, tasks = torch.zeros_like(S), torch.zeros_like(S)
    for C in core.present:
        shares = U.T @ C  # a_r^i, one a row
        squares = shares.square().sum(dim=1)
        there = squares.sqrt() > NULL[core.cut_dtype] * torch.linalg.matrix_norm(C)
        overlap = S * (Vh * shares).sum(dim=1) / squares
        counted += torch.where(there, overlap.clamp_min(params.alpha), 0.0)
        tasks += there
    return core.lift_triplets(U, S * tasks / counted, Vh.T)
