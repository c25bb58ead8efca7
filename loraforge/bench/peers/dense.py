"""Merges in the full space with plain PyTorch, module by module, as papers and scripts have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraforge.types import LowRank

_EPS = 1e-12  # the rSVD document's epsilon


def weighted(pairs: Sequence[LowRank], weights: Sequence[float]) -> Tensor:
    """sum_i w_i D_i, (m, n)."""
    total = weights[0] * pairs[0].delta()
    for w, pair in zip(weights[1:], pairs[1:], strict=True):
        total += w * pair.delta()
    return total


def best_rank(total: Tensor, rank: int) -> LowRank:
    """The best rank-k approximation by the SVD of the matrix."""
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    root = S[:rank].sqrt()
    return LowRank(U[:, :rank] * root, root[:, None] * Vh[:rank])


def svd(pairs: Sequence[LowRank], weights: Sequence[float], rank: int) -> LowRank:
    """The weighted sum, cut to a rank."""
    return best_rank(weighted(pairs, weights), rank)


def iso_c(pairs: Sequence[LowRank], weights: Sequence[float]) -> Tensor:
    """All singular values of the sum made equal, on its support of sum r_i directions (as published: on all)."""
    U, S, Vh = torch.linalg.svd(weighted(pairs, weights), full_matrices=False)
    p = min(sum(pair.rank for pair in pairs), len(S))
    return (U[:, :p] @ Vh[:p]) * (S[:p].sum() / p)


def ties(pairs: Sequence[LowRank], weights: Sequence[float], density: float) -> Tensor:
    """Trim every delta, elect a sign by the weighted sum, average what agrees."""
    trimmed = []
    for w, pair in zip(weights, pairs, strict=True):
        delta = pair.delta()
        kept = int(density * delta.numel())
        cut = delta.abs().flatten().kthvalue(delta.numel() - kept + 1).values
        trimmed.append(w * torch.where(delta.abs() >= cut, delta, 0.0))
    stack = torch.stack(trimmed)
    agree = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
    return (stack * agree).sum(0) / agree.sum(0).clamp_min(1)


def dare(pairs: Sequence[LowRank], weights: Sequence[float], density: float) -> Tensor:
    """Drop entries at random, rescale the rest, sum."""
    total = torch.zeros(pairs[0].shape, device=pairs[0].B.device)
    for w, pair in zip(weights, pairs, strict=True):
        delta = pair.delta()
        total += (w / density) * delta * torch.bernoulli(torch.full_like(delta, density))
    return total


def document_rsvd(pairs: Sequence[LowRank], rank: int) -> LowRank:
    """The rSVD document's merge of two adapters: weights from the norms, `svd_lowrank` of the dense sum, q = rank."""
    one, two = (pair.delta() for pair in pairs)
    n1, n2 = (float(part.norm()) + _EPS for part in (one, two))
    w = 0.5 if min(n1, n2) / max(n1, n2) < 0.5 else n1 / (n1 + n2)
    with torch.random.fork_rng(devices=[one.device] if one.is_cuda else []):
        torch.manual_seed(0)  # its draws come from the global generator
        U, S, V = torch.svd_lowrank(w * one + (1.0 - w) * two, q=rank, niter=2)
    root = (S + _EPS).sqrt()
    return LowRank(U * root, root[:, None] * V.T)
