"""Iso-CTS: an isotropic sum whose weakest directions give way to what is special to each task.

With q directions in all, N tasks and f = common_fraction:

    k0 = int(q f), spec = round((q - k0) / N) N, t = spec / N, k = q - spec
    W = sum_i w_i D_i: its first k triplets (U_c, s_c, V_c) are the common subspace
    E_i = D_i - U_c U_c^T D_i (the left side only): its first t triplets (U_i, s_i, V_i)
    U* = [U_1 .. U_N, U_c], V* likewise, s* likewise;   W_cts = polar(U*) diag(s*) polar(V*)^T

which is then flattened to alpha * mean(s*) after the rank rule, as in Iso-C. q is min(m, n) for full checkpoints; for
adapters it is the rank of their deltas side by side (or one above the other, if less), at most R, since all of W and
E_i lies there and every further direction would be a null vector. A task of rank below t takes as many as it has and
the common subspace the others; where E_i has less than t directions (a task inside the common subspace) nothing is put
in their place. N counts the adapters that have a delta in the module.

Marczak et al., ICML 2025, arXiv 2502.04959. Cost: 2 (m + n) R^2 + N R^3 a module; checkpoints N + 1 SVDs of m x n.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraforge.linalg.core import core_of
from loraforge.linalg.flatten import NULL, support
from loraforge.linalg.polar import polar
from loraforge.merging.spectral_params import IsoCtsParams
from loraforge.types import LayerInputs, Update

Triplets = tuple[Tensor, Tensor, Tensor]


def merge_layer(layer: LayerInputs, params: IsoCtsParams) -> Update:
    """The whitened common and task-specific subspaces of one module, before they are flattened.

    Args:
        layer: Factors (or task vectors) and weights of the module.
        params: common_fraction; the rest is read after the rank rule.

    Returns:
        polar(U*) diag(s*) polar(V*)^T: a LowRank of rank at most q, Dense of full checkpoints.
    """
    core = core_of(layer)
    blocks = core.present
    null = NULL[core.cut_dtype]
    q = min(blocks[0].shape) if core.left is None else _rank_of_both(blocks, core.cut_dtype)
    _, each = split_dimensions(q, len(blocks), params.common_fraction)
    spectra = [torch.linalg.svdvals(C) for C in blocks]
    own = [min(each, support(values, core.cut_dtype)) for values in spectra]
    U, S, V = _first(core.total(), q - sum(own), null * max(float(values[0]) for values in spectra))
    parts = [
        _first(C - U @ (U.T @ C), count, null * float(values[0]))
        for C, count, values in zip(blocks, own, spectra, strict=True)
        if count
    ]
    stacked = [torch.cat(sides, dim=-1) for sides in zip(*parts, (U, S, V), strict=True)]
    return core.lift_triplets(polar(stacked[0], core.cut_dtype), stacked[1], polar(stacked[2], core.cut_dtype))


def split_dimensions(q: int, tasks: int, fraction: float) -> tuple[int, int]:
    """How q directions are shared out: (k of the common subspace, t of each task), k + N t = q.

    The task-specific share is rounded to a multiple of N (halves to even), and never above q.
    """
    wanted = round((q - int(q * fraction)) / tasks)
    each = min(wanted, q // tasks)
    return q - each * tasks, each


def _rank_of_both(blocks: Sequence[Tensor], dtype: torch.dtype) -> int:
    """Numerical rank of the blocks side by side or one above the other, whichever is less; at least 1."""
    left, right = (support(torch.linalg.svdvals(torch.cat(list(blocks), dim=side)), dtype) for side in (1, 0))
    return max(1, min(left, right))


def _first(M: Tensor, count: int, null: float) -> Triplets:
    """The first `count` singular triplets (U (p, c), S (c,), V (q, c)) of M above `null`."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    c = min(count, int((S > null).sum()))
    return U[:, :c], S[:c], Vh[:c].T
