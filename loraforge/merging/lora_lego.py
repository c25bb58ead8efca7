"""LoRA-LEGO: adapters as sets of rank-one units, clustered; each cluster gives one unit of the merged adapter.

A unit is u_j = (a_j | b_j), row j of A_i and column j of B_i, in R^(n + m). All units of all adapters are clustered by
k-means on (a_j / ||a_j|| | b_j / ||b_j||); with members C_c

    u_c = mean_{j in C_c} u_j * (mean_{j in C_c} ||u_j||_inf / ||mean_{j in C_c} u_j||_inf),
    D = sqrt(r / k) sum_c b_c a_c^T,   k clusters, r the largest rank.

A unit b a^T is also (c b)(a / c)^T for any c, so units are first balanced, ||a|| = ||b|| = sqrt(w s ||a|| ||b||), with
the largest entry of a positive; sign and scale of an adapter's factors then do not matter. k is the largest rank of the
module unless given. k-means starts from k-means++ centres, seeded by (seed, module) and drawn in an order of the units
that does not depend on the order of the adapters. Where there are no more than k units, each is its own cluster.

Source: Zhao et al., ICLR 2025, arXiv 2409.16167. Cost: R^2 (m + n) for the inner products, then R^2 k a step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.linalg.bases import column_signs
from loraforge.linalg.kmeans import cluster
from loraforge.linalg.randomized import gaussian
from loraforge.merging.unit_params import LoraLegoParams
from loraforge.types import LayerInputs, LowRank


def merge_layer(layer: LayerInputs, params: LoraLegoParams) -> LowRank:
    """Merges one module.

    Args:
        layer: Factors and weights of the module.
        params: Number of clusters, k-means, reweighting.

    Returns:
        B (m, k), A (k, n); of zeros where every delta is zero.

    Raises:
        LoraforgeError: Full checkpoints, which have no units; NaN or Inf.
    """
    pairs = [(w, f) for w, f in layer.present if isinstance(f, LowRank)]
    if len(pairs) < len(layer.present):
        raise LoraforgeError("lora-lego works on factors, not on full checkpoints", where=layer.module)
    wide = any(t.dtype == torch.float64 for _, f in pairs for t in (f.B, f.A))
    dtype = torch.float64 if wide else torch.float32
    found = [_units(w * f.scaling, f) for w, f in pairs]
    rank = max(len(a) for a, _ in found)
    if rank == 0:
        first = pairs[0][1]
        return LowRank(torch.zeros_like(first.B, dtype=dtype), torch.zeros_like(first.A, dtype=dtype))
    a, b = torch.cat([a for a, _ in found]), torch.cat([b for _, b in found])
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise LoraforgeError("Factors hold NaN or Inf", where=layer.module)
    order = _canonical_order(a, b)
    a, b = a[order], b[order]
    size = a.norm(dim=1, keepdim=True)
    features = torch.cat([a, b], dim=1) / size
    labels = cluster(features @ features.T, params.clusters or rank, params.iterations, params.seed, layer.module)
    k = int(labels.max()) + 1
    centres = [_centre(a[labels == c], b[labels == c], params.reweight_units) for c in range(k)]
    scale = math.sqrt(rank / k) if params.reweight_output else 1.0
    B = torch.stack([b for _, b in centres], dim=1) * scale
    return LowRank(B.to(dtype), torch.stack([a for a, _ in centres]).to(dtype))


def _units(weight: float, pair: LowRank) -> tuple[Tensor, Tensor]:
    """Balanced, sign-fixed units of an adapter that are not zero: rows a (r, n) and b (r, m), float64."""
    a, b = pair.A.to(torch.float64), pair.B.to(torch.float64).T * weight
    product = a.norm(dim=1) * b.norm(dim=1)
    keep = product != 0  # NaN is kept, and refused later
    a, b, size = a[keep], b[keep], product[keep].sqrt()[:, None]
    sign = column_signs(a.T)[:, None]
    return a / a.norm(dim=1, keepdim=True) * size * sign, b / b.norm(dim=1, keepdim=True) * size * sign


def _canonical_order(a: Tensor, b: Tensor) -> Tensor:
    """An order of the units that depends on the units alone: by one fixed projection of each."""
    units = torch.cat([a, b], dim=1)
    return (units @ gaussian(units.shape[1], 1, 0, "order").to(units.device)[:, 0]).argsort()


def _centre(a: Tensor, b: Tensor, reweight: bool) -> tuple[Tensor, Tensor]:
    """The unit of a cluster: mean (n,) and (m,), rescaled to its members' mean largest entry."""
    if len(a) == 1:
        return a[0], b[0]
    units = torch.cat([a, b], dim=1)
    mean = units.mean(dim=0)
    largest = float(mean.abs().max())
    if reweight and largest > 0.0:
        mean = mean * (float(units.abs().amax(dim=1).mean()) / largest)
    return mean[: a.shape[1]], mean[a.shape[1] :]
