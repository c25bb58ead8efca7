"""RobustMerge: prune the factors, make up for it row by row, balance the adapters, sum.

    D = lambda sum_i w_i s_i B~_i diag(S_i) A~_i,   S_ij = (||A_ij||_1 / ||A~_ij||_1) / sum_l (||A_lj||_1 / ||A~_lj||_1)

B~, A~ are the factors with their largest `density` share of entries kept (equal magnitudes at the threshold stay), A_ij
row j of A_i. The sum over l runs over the adapters whose rank reaches j, so ranks may differ; a row that is pruned away
whole has no part in it. Deltas of zero are left out. The result has rank R and stays in factors.

Source: Zeng et al., NeurIPS 2025, arXiv 2502.17159 (CoPA-Merging), algorithm 1. Cost: a threshold a factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.linalg.factored import stack, weighted_sum
from loraforge.merging.unit_params import RobustMergeParams
from loraforge.types import LayerInputs, LowRank, Update


def merge_layer(layer: LayerInputs, params: RobustMergeParams) -> Update:
    """Merges one module.

    Args:
        layer: Factors and weights of the module.
        params: Density and factor.

    Returns:
        B (m, R), A (R, n).

    Raises:
        LoraforgeError: Full checkpoints, which have no factors; shapes differ.
    """
    low = [(w, f) for w, f in layer.present if isinstance(f, LowRank)]
    if len(low) < len(layer.present):
        raise LoraforgeError("robust-merge works on factors, not on full checkpoints", where=layer.module)
    moving = [(w, f) for w, f in low if w != 0.0 and bool(f.B.any()) and bool(f.A.any())]
    if not moving:
        return weighted_sum(layer.present)
    pruned = [LowRank(_prune(f.B, params.density), _prune(f.A, params.density), f.scaling) for _, f in moving]
    shares = [_made_up(f.A, p.A) for (_, f), p in zip(moving, pruned, strict=True)]
    total = torch.zeros(max(p.rank for p in pruned), dtype=torch.float64, device=pruned[0].A.device)
    for share in shares:
        total[: share.numel()] += share
    parts = []
    for (w, _), p, share in zip(moving, pruned, shares, strict=True):
        balance = torch.where(share > 0, share / total[: share.numel()], 0.0)
        wide = torch.promote_types(p.A.dtype, torch.float32)
        parts.append((w * params.scale, LowRank(p.B, p.A.to(wide) * balance.to(wide)[:, None], p.scaling)))
    return stack(parts)


def _prune(factor: Tensor, density: float) -> Tensor:
    """The factor with its floor(density * entries) largest entries kept, and all that equal the last of them."""
    keep = int(density * factor.numel())
    if keep == 0:
        return torch.zeros_like(factor)
    # Half-precision entries are exact in float32, which kthvalue knows.
    sizes = factor.abs().flatten().to(torch.promote_types(factor.dtype, torch.float32))
    threshold = sizes.kthvalue(sizes.numel() - keep + 1).values
    return torch.where(factor.abs() >= threshold, factor, 0)


def _made_up(A: Tensor, kept: Tensor) -> Tensor:
    """(r,) float64: what each row of A lost, as the ratio of its l1 norms; 0 for a row that is gone."""
    before, after = A.to(torch.float64).abs().sum(dim=1), kept.to(torch.float64).abs().sum(dim=1)
    return torch.where(after > 0, before / after, 0.0)
