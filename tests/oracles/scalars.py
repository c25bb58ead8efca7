"""Merges that only choose one coefficient an adapter, computed on the flattened deltas themselves (numpy float64).

`modules[name][i]` (m, n) is s_i B_i A_i of adapter i, None where it lacks the module. scope "module" treats each matrix
as a vector of its own, "global" the concatenation of all of an adapter's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Modules = Mapping[str, Sequence["Array | None"]]
Rule = Callable[[list[Array]], Array]


def over(modules: Modules, scope: str, rule: Rule) -> dict[str, Array]:
    """Applies a rule from N vectors to one vector by module, or to the whole adapters laid out as vectors."""
    groups = [[name] for name in modules] if scope == "module" else [list(modules)]
    out: dict[str, Array] = {}
    for names in groups:
        shapes = [next(d.shape for d in modules[name] if d is not None) for name in names]
        count = len(modules[names[0]])
        vectors = []
        for i in range(count):
            pieces = [modules[name][i] for name in names]
            filled = [np.zeros(s) if p is None else p for s, p in zip(shapes, pieces, strict=True)]
            vectors.append(np.concatenate([p.ravel() for p in filled]))
        merged = rule(vectors)
        ends = np.cumsum([s[0] * s[1] for s in shapes])[:-1]
        for name, shape, piece in zip(names, shapes, np.split(merged, ends), strict=True):
            out[name] = piece.reshape(shape)
    return out


def angle(a: Array, b: Array) -> float:
    """Between two vectors, in [0, pi], accurate for small angles too."""
    x, y = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return float(2.0 * np.arctan2(np.linalg.norm(x - y), np.linalg.norm(x + y)))


def slerp(vectors: Sequence[Array], t: float = 0.5) -> Array:
    """sin((1 - t) omega) / sin(omega) v_1 + sin(t omega) / sin(omega) v_2 (Shoemake 1985), one vector: itself.

    Where omega is 0 or one vector is zero there is no arc and the line is taken: (1 - t) v_1 + t v_2.
    """
    if len(vectors) == 1:
        return vectors[0]
    a, b = vectors
    if not (np.any(a) and np.any(b)):
        return (1.0 - t) * a + t * b
    omega = angle(a, b)
    if np.sin(omega) < 1e-6:
        return (1.0 - t) * a + t * b
    return (np.sin((1.0 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega)


def karcher_direction(units: Sequence[Array], shares: Sequence[float], steps: int = 500) -> Array:
    """The unit vector mu with sum_i a_i log_mu(u_i) = 0, by steps exp_mu(sum_i a_i log_mu(u_i)) until they rest."""
    mu = np.sum([a * u for a, u in zip(shares, units, strict=True)], axis=0)
    mu = mu / np.linalg.norm(mu)
    for _ in range(steps):
        step = np.zeros_like(mu)
        for a, u in zip(shares, units, strict=True):
            theta = angle(mu, u)
            tangent = u - (u @ mu) * mu
            size = np.linalg.norm(tangent)
            if size > 0.0:
                step += a * theta * tangent / size
        length = np.linalg.norm(step)
        if length < 1e-15:
            break
        mu = np.cos(length) * mu + np.sin(length) * step / length
        mu = mu / np.linalg.norm(mu)
    return mu


def karcher(vectors: Sequence[Array], weights: Sequence[float] | None = None) -> Array:
    """Direction: Karcher mean on the sphere, shares a_i = w_i / sum w over the nonzero. Length: the mean of all norms.

    A zero vector has no direction but counts in the mean of the lengths. (mergekit's `karcher`, iterated to rest.)
    """
    w = np.ones(len(vectors)) if weights is None else np.asarray(weights, dtype=np.float64)
    norms = np.array([np.linalg.norm(v) for v in vectors])
    if not norms.any():
        return np.zeros_like(vectors[0])
    nonzero = [i for i, norm in enumerate(norms) if norm > 0.0]
    shares = [w[i] / sum(w[j] for j in nonzero) for i in nonzero]
    return float(w @ norms / w.sum()) * karcher_direction([vectors[i] / norms[i] for i in nonzero], shares)


def model_stock(vectors: Sequence[Array]) -> Array:
    """t mean_i v_i with t = N c / (1 + (N - 1) c), c = the mean cosine of all pairs (Jang et al., arXiv 2403.19522).

    Pairs with a zero vector have no cosine and are left out of c; without any pair t = 1, so that one vector alone is
    itself. Of c < 0 the derivation has no meaning (t < 0 would be the mean's opposite): t = 0, the base.
    """
    N = len(vectors)
    mean = np.sum(vectors, axis=0) / N
    pairs = [(a, b) for a, b in itertools.combinations(vectors, 2) if np.any(a) and np.any(b)]
    if not pairs:
        return mean
    cosines = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs]
    c = max(float(np.mean(cosines)), 0.0)
    return N * c / (1.0 + (N - 1) * c) * mean
