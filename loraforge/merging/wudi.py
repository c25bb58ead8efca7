"""WUDI in closed form: the delta that does to each task's own inputs what the task's delta does.

The rows of a task's delta stand for its inputs, so W minimises sum_i || (W - D_i) D_i^T ||^2 / || D_i ||^2:

    W = (sum_i D_i G_i) (sum_i G_i + ridge I)^+,   G_i = D_i^T D_i / ||D_i||_F^2

RegMean with G_i in place of the Gram matrices of inputs. Where the rows of the A_i are independent this interpolates: W
x = D_i x for every x in the row space of A_i. The published method takes 300 Adam steps towards the same minimum.

Everything happens in the core (G_i -> C_i^T C_i / ||C_i||^2), and through K = [C_i / ||C_i||] = U diag(s) V^T, for
which sum_i G_i = K^T K, so that no condition number is squared: W = sum_i (C_i C_i^T / ||C_i||) U_i diag(s / (s^2 +
ridge)) V^T with U_i the rows of U that belong to task i. Without ridge, values of s under rounding are left out.

Cheng et al., Whoever Started the Interference Should End It, ICML 2025, arXiv 2503.08099. Cost: 2 (m + n) R^2 + N R^3 a
module; checkpoints one SVD of (N m) x n.
"""

from __future__ import annotations

import torch

from loraforge.linalg.core import core_of
from loraforge.linalg.flatten import support
from loraforge.merging.spectral_params import WudiParams
from loraforge.types import LayerInputs, Update


def merge_layer(layer: LayerInputs, params: WudiParams) -> Update:
    """The minimiser for one module: a LowRank of rank at most R, Dense of full checkpoints.

    Args:
        layer: Factors (or task vectors) and weights of the module.
        params: ridge.
    """
    core = core_of(layer)
    sizes = [torch.linalg.matrix_norm(C) for C in core.present]
    units = [C / size for C, size in zip(core.present, sizes, strict=True) if size > 0]
    if not units:
        return core.lift(core.total())
    U, S, Vh = torch.linalg.svd(torch.cat(units), full_matrices=False)
    if params.ridge:
        inverse = S / (S.square() + params.ridge)
    else:
        inverse = torch.where(torch.arange(S.numel(), device=S.device) < support(S, core.cut_dtype), 1.0 / S, 0.0)
    rows = torch.split(U, [C.shape[0] for C in units])
    # C_i C_i^T / ||C_i|| = ||C_i|| times the same of the unit block.
    scales = [size for size in sizes if size > 0]
    total = torch.stack([s * (E @ (E.T @ u)) for s, E, u in zip(scales, units, rows, strict=True)]).sum(dim=0)
    return core.lift(total * inverse @ Vh)
