"""Element-wise merges in dense numpy float64: whole matrices, sorted entries, masks as arguments.

`modules[name][i]` (m, n) is s_i B_i A_i of adapter i without the user's weight, None where it lacks the module: its
delta is zero there and its m n entries count. D_i = w_i deltas[i]. What is trimmed does not depend on w_i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tests.oracles.spectral import svd

Array = NDArray[np.float64]
Modules = Mapping[str, Sequence["Array | None"]]


def filled(deltas: Sequence[Array | None]) -> list[Array]:
    """The deltas with zeros where an adapter lacks the module."""
    shape = next(d.shape for d in deltas if d is not None)
    return [np.zeros(shape) if d is None else d for d in deltas]


def threshold(entries: Array, density: float) -> float:
    """The floor(density n)-th largest magnitude: what is at least as large is kept; inf if that is none."""
    kept = math.floor(density * entries.size)
    return float(np.sort(np.abs(entries).ravel())[::-1][kept - 1]) if kept else math.inf


def trimmed(modules: Modules, density: float, scope: str) -> dict[str, list[Array]]:
    """Each adapter's entries below its own threshold set to zero; equal magnitudes at the threshold all stay."""
    full = {name: filled(deltas) for name, deltas in modules.items()}
    out: dict[str, list[Array]] = {name: [] for name in full}
    for i in range(len(next(iter(full.values())))):
        everything = np.concatenate([deltas[i].ravel() for deltas in full.values()])
        for name, deltas in full.items():
            cut = threshold(everything if scope == "global" else deltas[i], density)
            out[name].append(np.where(np.abs(deltas[i]) >= cut, deltas[i], 0.0))
    return out


def elected_mean(D: Sequence[Array]) -> Array:
    """TIES: the sign of sum D_i; the mean over the D_i that have this sign there. A sum of exactly 0 elects nobody.

    Yadav et al., arXiv 2306.01708.
    """
    values = np.stack(D)
    elected = np.sign(values.sum(axis=0))
    agreeing = (np.sign(values) == elected) & (values != 0.0)
    return (values * agreeing).sum(axis=0) / np.maximum(agreeing.sum(axis=0), 1)


def weighed(deltas: Sequence[Array], weights: Sequence[float]) -> list[Array]:
    """D_i = w_i times each."""
    return [w * d for w, d in zip(weights, deltas, strict=True)]


def ties(modules: Modules, weights: Sequence[float], density: float = 0.2, scope: str = "global") -> dict[str, Array]:
    """Trim, elect a sign, disjoint mean."""
    return {name: elected_mean(weighed(d, weights)) for name, d in trimmed(modules, density, scope).items()}


def magnitude_prune(
    modules: Modules, weights: Sequence[float], density: float = 0.2, scope: str = "global"
) -> dict[str, Array]:
    """Trim, then the plain sum."""
    return {name: np.sum(weighed(d, weights), axis=0) for name, d in trimmed(modules, density, scope).items()}


def dropped(deltas: Sequence[Array | None], masks: Sequence[Array], density: float) -> list[Array]:
    """DARE: D_i mask_i / density (Yu et al., arXiv 2311.03099); masks of 0 and 1, density = 1 - the paper's p."""
    return [d * mask / density for d, mask in zip(filled(deltas), masks, strict=True)]


def dare(deltas: Sequence[Array | None], weights: Sequence[float], masks: Sequence[Array], density: float) -> Array:
    """Drop and rescale, then the sum."""
    return np.sum(weighed(dropped(deltas, masks, density), weights), axis=0)


def dare_ties(
    deltas: Sequence[Array | None], weights: Sequence[float], masks: Sequence[Array], density: float
) -> Array:
    """Drop and rescale, then TIES' election and disjoint mean without its trimming."""
    return elected_mean(weighed(dropped(deltas, masks, density), weights))


def della_probabilities(D: Array, density: float, epsilon: float) -> Array:
    """Keep probability of each entry: linear in the rank of |D| in its row, density - epsilon to density + epsilon.

    The smallest entry of a row gets density - epsilon, the largest density + epsilon; a row of one entry density.
    Deep et al., arXiv 2406.11617 (MAGPRUNE).
    """
    n = D.shape[1]
    out = np.full(D.shape, density)
    if n > 1:
        for i, row in enumerate(np.abs(D)):
            for rank, j in enumerate(np.argsort(row, kind="stable")):
                out[i, j] = density - epsilon + 2.0 * epsilon * rank / (n - 1)
    return out


def della(
    deltas: Sequence[Array | None], weights: Sequence[float], masks: Sequence[Array], density: float, epsilon: float
) -> Array:
    """sum_i D_i mask_i / p_i with the probabilities of the masks."""
    full = filled(deltas)
    kept = [d * k / della_probabilities(d, density, epsilon) for d, k in zip(full, masks, strict=True)]
    return np.sum(weighed(kept, weights), axis=0)


def breadcrumbs(
    deltas: Sequence[Array | None], weights: Sequence[float], density: float = 0.9, gamma: float = 0.01
) -> Array:
    """Drops the floor(gamma n) largest and the n - floor(density n) - floor(gamma n) smallest entries; sum of the rest.

    n counts the module's entries. Davari and Belilovsky, arXiv 2312.06795.
    """
    kept = []
    for d in filled(deltas):
        order = np.argsort(np.abs(d).ravel(), kind="stable")
        top = math.floor(gamma * d.size)
        bottom = max(0, d.size - math.floor(density * d.size) - top)
        chosen = order[bottom : d.size - top]
        flat = np.zeros(d.size)
        flat[chosen] = d.ravel()[chosen]
        kept.append(flat.reshape(d.shape))
    return np.sum(weighed(kept, weights), axis=0)


def knots_blocks(deltas: Sequence[Array | None], weights: Sequence[float]) -> tuple[Array, list[Array]]:
    """KnOTS: [D_1 .. D_N] = U Sigma [V_1 .. V_N]^T; U (m, p) and the blocks Sigma V_i^T (p, n). arXiv 2410.19735.

    The blocks are taken as U^T D_i, which is the same, and exactly zero for a delta of zero: rounding must not vote.
    """
    D = weighed(filled(deltas), weights)
    U = svd(np.concatenate(D, axis=1))[0]
    return U, [U.T @ d for d in D]


def knots_ties(
    modules: Modules, weights: Sequence[float], density: float = 0.2, scope: str = "global"
) -> dict[str, Array]:
    """TIES on the blocks, mapped back by U."""
    spaces = {name: knots_blocks(deltas, weights) for name, deltas in modules.items()}
    merged = ties({name: blocks for name, (_, blocks) in spaces.items()}, [1.0] * len(weights), density, scope)
    return {name: U @ merged[name] for name, (U, _) in spaces.items()}


def core_blocks(
    B: Sequence[Array | None], A: Sequence[Array | None], weights: Sequence[float]
) -> tuple[Array, list[Array], Array]:
    """Core space: left vectors of [w_i s_i B_i ..] (m, p), blocks C_i (p, q), right vectors of [A_1; ..]^T (n, q).

    B has the scaling folded in, the weight is not; D_i = Q_l C_i Q_a^T. Adapters of zero delta span nothing. The merge
    does not depend on the signs of the columns. Panariello et al., arXiv 2509.17786.
    """
    pairs = [(w * b, a) for w, b, a in zip(weights, B, A, strict=True) if b is not None and a is not None]
    present = [(b, a) for b, a in pairs if np.any(b @ a)]
    left = svd(np.concatenate([b for b, _ in present], axis=1))[0]
    right = svd(np.concatenate([a for _, a in present], axis=0))[2].T
    blocks = [
        np.zeros((left.shape[1], right.shape[1])) if b is None or a is None else left.T @ (w * b) @ (a @ right)
        for w, b, a in zip(weights, B, A, strict=True)
    ]
    return left, blocks, right


def core_ties(
    factors: Mapping[str, tuple[Sequence[Array | None], Sequence[Array | None]]],
    weights: Sequence[float],
    density: float = 0.2,
    scope: str = "global",
) -> dict[str, Array]:
    """TIES on the core blocks, mapped back by both bases. factors[module] = (B_1 .. B_N), (A_1 .. A_N)."""
    spaces = {name: core_blocks(B, A, weights) for name, (B, A) in factors.items()}
    merged = ties({name: blocks for name, (_, blocks, _) in spaces.items()}, [1.0] * len(weights), density, scope)
    return {name: left @ merged[name] @ right.T for name, (left, _, right) in spaces.items()}


def subset_masks(found: Array, terms: Sequence[Array], tolerance: float) -> list[Array]:
    """The masks k_i of 0 and 1 with found = sum_i k_i terms_i, entry by entry, by trying all 2^N sums.

    Raises:
        AssertionError: An entry is no such sum. With random terms wrong sums do not fit by chance.
    """
    choices = np.array(list(np.ndindex(*(2,) * len(terms))), dtype=np.float64)  # (2^N, N)
    away = np.abs(found - np.tensordot(choices, np.stack(terms), axes=1))  # (2^N, m, n)
    best = away.argmin(axis=0)
    worst = away.min(axis=0).max() / max(float(np.abs(t).max()) for t in terms)
    assert worst <= tolerance, f"an entry is no sum of kept entries: off by {worst:.2e} of the largest"
    return list(np.moveaxis(choices[best], -1, 0))
