"""Methods that only re-weight the deltas: all they need of them are inner products.

<D_i, D_j> of factored updates costs r x r products, so the geometry of N deltas of any size is an (N, N) Gram matrix,
of one module or summed over all modules of the adapters. Everything here is float64 arithmetic on that matrix; a delta
of zero is a zero row and column.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from loraforge.linalg.factored import inner, weighted_sum
from loraforge.types import LayerInputs, Update

# Inner products of a whole merge: (adapter, adapter) -> sum over its modules.
GramTable = Mapping[tuple[str, str], float]
# Below this sine two directions count as opposite, and no great circle between them is distinguished.
OPPOSITE = 1e-4


def labels(layer: LayerInputs) -> list[str]:
    """One word an adapter that is the same in every module: its key, or its place where it has none."""
    return list(layer.keys) if len(layer.keys) == len(layer.factors) else [str(i) for i in range(len(layer.factors))]


def gram(layer: LayerInputs) -> Tensor:
    """(N, N) float64 inner products of the deltas of a module, without the weights; 0 where an adapter lacks it."""
    count = len(layer.factors)
    G = torch.zeros(count, count, dtype=torch.float64)
    for i, a in enumerate(layer.factors):
        for j, b in enumerate(layer.factors[: i + 1]):
            if a is not None and b is not None:
                G[i, j] = G[j, i] = inner(a, b)
    return G


def sum_grams(layers: Iterable[LayerInputs]) -> GramTable:
    """Inner products over all modules, by the adapters' labels."""
    table: dict[tuple[str, str], float] = {}
    for layer in layers:
        names, G = labels(layer), gram(layer).tolist()
        for i, a in enumerate(names):
            for j, b in enumerate(names):
                table[a, b] = table.get((a, b), 0.0) + G[i][j]
    return table


def counted(layer: LayerInputs) -> list[int]:
    """Places of the adapters that a mean over the module runs over."""
    return [i for i, f in enumerate(layer.factors) if f is not None or not layer.only_present]


def gram_of(layer: LayerInputs) -> Tensor:
    """The Gram matrix of the counted adapters: of all modules where a survey summed them, else the module's own."""
    places = counted(layer)
    if layer.context is None:
        return gram(layer)[places][:, places]
    names = [labels(layer)[i] for i in places]
    return torch.tensor([[layer.context[a, b] for b in names] for a in names], dtype=torch.float64)


def combine(layer: LayerInputs, coefficients: Sequence[float]) -> Update:
    """The deltas of the counted adapters with one coefficient each, summed exactly."""
    factors = [layer.factors[i] for i in counted(layer)]
    return weighted_sum([(c, f) for c, f in zip(coefficients, factors, strict=True) if f is not None])


def cosines(G: Tensor) -> Tensor:
    """(N, N) cosines of a Gram matrix, clamped to [-1, 1]; 0 with a delta of zero."""
    sizes = G.diagonal().clamp_min(0.0).sqrt()
    scale = torch.where(sizes > 0, 1.0 / sizes, 0.0)
    return (G * scale[:, None] * scale).clamp(-1.0, 1.0)


def slerp(G: Tensor, t: float) -> list[float]:
    """Coefficients of two deltas on the arc between them.

    sin((1 - t) theta) / sin theta and sin(t theta) / sin theta (Shoemake 1985), theta the angle between the deltas;
    their limit 1 - t and t for one direction, and the same where one is zero or they are opposite.

    Args:
        G: (2, 2) Gram matrix.
        t: Share of the way from the first to the second, in [0, 1].
    """
    cosine = float(cosines(G)[0, 1])
    theta = math.acos(cosine)
    sine = math.sin(theta)
    if bool((G.diagonal() <= 0).any()) or sine == 0.0 or (cosine < 0 and sine < OPPOSITE):
        return [1.0 - t, t]
    return [math.sin((1.0 - t) * theta) / sine, math.sin(t * theta) / sine]


def karcher(G: Tensor, weights: Sequence[float], max_iter: int, tol: float) -> list[float]:
    """Coefficients of the deltas in their weighted Karcher mean.

    The direction is the point m of the unit sphere with sum_i w_i log_m(u_i) = 0, u_i the deltas' directions, found by
    m <- exp_m(sum_i w_i log_m(u_i)) from their normalised mean; the norm is sum_i w_i ||D_i|| / sum_i w_i. Deltas of
    zero have no direction, yet count in the norm. Where the directions cancel there is no mean direction: the weighted
    mean of the deltas then.

    Args:
        G: (N, N) Gram matrix.
        weights: w_i >= 0, not all 0.
        max_iter: Largest number of steps.
        tol: Length of a step that ends the iteration.
    """
    sizes = G.diagonal().clamp_min(0.0).sqrt()
    w = torch.tensor(weights, dtype=torch.float64)
    w = w / w.sum()
    size = float(w @ sizes)
    share = w * (sizes > 0)
    if size == 0.0:
        return w.tolist()
    share = share / share.sum()
    C = cosines(G)
    m = _unit(share, C)
    if m is None:
        return w.tolist()
    for _ in range(max_iter):
        along = (C @ m).clamp(-1.0, 1.0)
        angle = along.acos()
        # theta / sin theta -> 1 at 0; at pi the logarithm has no direction, and such a delta pulls no way.
        sine = angle.sin()
        pull = share * torch.where(sine > OPPOSITE, angle / sine, torch.where(along > 0, 1.0, 0.0))
        step = pull - float(pull @ along) * m
        length = math.sqrt(max(float(step @ C @ step), 0.0))
        if length <= tol:
            break
        m = math.cos(length) * m + math.sin(length) / length * step
        m = m / math.sqrt(float(m @ C @ m))
    return (m * torch.where(sizes > 0, 1.0 / sizes, 0.0) * size).tolist()


def _unit(coefficients: Tensor, C: Tensor) -> Tensor | None:
    """The combination of unit vectors scaled to length 1; None where it vanishes."""
    length = math.sqrt(max(float(coefficients @ C @ coefficients), 0.0))
    return None if length < OPPOSITE else coefficients / length


def model_stock(G: Tensor) -> float:
    """The share t = N c / (1 + (N - 1) c) of the deltas' mean that Model Stock keeps, c their mean pairwise cosine.

    Args:
        G: (N, N) Gram matrix. N counts deltas of zero; c is the mean over pairs of others, and t = 1 without a pair.

    Returns:
        t in [0, 1]: deltas that point away from each other (c < 0) leave nothing.
    """
    count = G.shape[0]
    moving = G.diagonal() > 0
    pairs = (moving[:, None] & moving).triu(diagonal=1)
    if not bool(pairs.any()):
        return 1.0
    c = max(float(cosines(G)[pairs].mean()), 0.0)
    return count * c / (1.0 + (count - 1) * c)
