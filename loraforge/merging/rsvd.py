"""rSVD merge: the weighted mean of the deltas, cut by a randomized SVD that runs on the factors.

    delta ~ rSVD_k(sum_i w_i s_i B_i A_i), w_i = 1/N unless given; B' = U sqrt(S), A' = sqrt(S) V^T.

k is the smallest rank that keeps 99 % of sum S^2 over the full spectrum, between 4 and 32, unless told otherwise. The
sketch has 8 columns more than the largest rank and two power steps, and is seeded by (seed, module). With few adapters
the stacked rank R is so small that the exact decomposition is cheaper: `exact=auto` takes it there.

`document_compat` gives the result of the document's published code, for two adapters (notation: n_i = ||W_i||_F):
w = 1/2 if the smaller norm is below half of the larger, else n_1 / (n_1 + n_2); W = w W_1 + (1 - w) sqrt(alpha_2 /
alpha_1) W_2, so alpha counts twice and the order of the adapters matters; no oversampling; a share of sum S over the
computed values only. A module that one adapter lacks is that of the other, unweighted.

Source: the rSVD document, section "rSVD Merge"; Halko, Martinsson, Tropp, SIAM Review 53 (2011).
Cost: 4 (m + n) R (k + p) (1 + q), or (m + n) R^2 + R^3 in the exact form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError, UsageError
from loraforge.linalg.factored import Truncated, inner, norm, stack
from loraforge.linalg.randomized import Approximation, Sketch, gaussian, project, randomized_svd, range_basis
from loraforge.linalg.rank import RankRule
from loraforge.merging.document_params import RsvdParams
from loraforge.types import LayerInputs, LowRank

_EPS = 1e-12  # the document's epsilon


def merge_layer(layer: LayerInputs, params: RsvdParams) -> LowRank:
    """Merges one module and cuts it by the method's rank rule.

    Args:
        layer: Factors and weights of the module.
        params: Rank rule, sketch, and whether to follow the document's code.

    Returns:
        An Approximation of rank k: B (m, k), A (k, n), with its account of what was cut.

    Raises:
        LoraforgeError: Nothing to sum, NaN or Inf, or more than two adapters with document_compat.
    """
    low = [(w, f) for w, f in layer.present if isinstance(f, LowRank)]
    if len(low) < len(layer.present):
        raise LoraforgeError("rsvd merges adapters, not full checkpoints", where=layer.module, hint="use svd")
    if params.document_compat:
        return _as_the_document(layer, [f for _, f in low], params)
    least, most = params.bounds
    rule = RankRule(**params.goal, min_rank=least, max_rank=most)
    sketch = Sketch(params.oversampling, params.power_iterations, params.seed, params.exact)
    return randomized_svd(stack(low), rule, sketch, layer.module)


def _as_the_document(layer: LayerInputs, pairs: list[LowRank], params: RsvdParams) -> LowRank:
    """The document's code on one module, in float64 and through the factors."""
    if len(layer.factors) > 2:
        raise LoraforgeError(
            "document_compat merges two adapters", where=layer.module, got=f"{len(layer.factors)} adapters"
        )
    if len(set(layer.weights)) > 1:
        raise UsageError("document_compat computes the weights itself", got=f"weights {list(layer.weights)}")
    if len(pairs) == 1:
        return pairs[0].to(torch.promote_types(pairs[0].B.dtype, torch.float32)).folded()
    one, two = pairs
    dtype = torch.promote_types(torch.promote_types(one.B.dtype, two.B.dtype), torch.float32)
    sizes = [norm(pair) + _EPS for pair in pairs]
    w = 0.5 if min(sizes) / max(sizes) < 0.5 else sizes[0] / sum(sizes)
    alphas = [pair.scaling * pair.rank for pair in pairs]
    g = (alphas[1] / alphas[0]) ** 0.5 if alphas[0] > 0 and alphas[1] > 0 else 1.0
    total = stack([(w, one), ((1.0 - w) * g, two)]).to(torch.float64)
    U, S, Vh = _sketch(total, one.rank, two.rank, layer, params)
    least, most = params.bounds
    shares = S.cumsum(0) / (S.sum() + _EPS)
    k = int((shares < params.energy).sum()) + 1
    k = min(max(least, k), most or k, S.numel())
    half = (S[:k] + _EPS).sqrt()
    factors = LowRank((U[:, :k] * half).to(dtype), (half[:, None] * Vh[:k]).to(dtype).contiguous())
    size, kept = inner(total, total), float(S[:k].square().sum())
    share = min(kept / size, 1.0) if size > 0.0 else 1.0
    account = Truncated(factors, S, share, max(size - kept, 0.0) ** 0.5, k)
    return Approximation(factors.B, factors.A, 1.0, account, False)


def _sketch(total: LowRank, r1: int, r2: int, layer: LayerInputs, params: RsvdParams) -> tuple[Tensor, Tensor, Tensor]:
    """The truncated SVD as the document calls it: q columns in all, two power steps, on the wide side's transpose."""
    least, most = params.bounds
    base = int((min(r1, r2) * max(r1, r2)) ** 0.5)
    m, n = total.shape
    q = min(max(least, int(base * params.energy)), m, n, most or base)
    B, A = (total.B, total.A) if m >= n else (total.A.T, total.B.T)
    omega = gaussian(min(m, n), q, params.seed, layer.module).to(B.device)
    U, S, Vh = project(B, A, range_basis(B, A, omega, 2))
    return (U, S, Vh) if m >= n else (Vh.T, S, U.T)
