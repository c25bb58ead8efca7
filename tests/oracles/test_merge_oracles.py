"""The dense oracles on examples small enough to be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.oracles import document, elementwise, ranks, scalars, spectral
from tests.oracles.factored import best_rank_k

E = np.eye(3)
CLOSE = {"rtol": 0.0, "atol": 1e-14}  # a few operations on numbers of order 1


def diag(*values: float) -> np.ndarray:
    return np.diag(np.array(values, dtype=np.float64))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# ---------------------------------------------------------------- spectral


def test_total_takes_a_missing_delta_as_zero() -> None:
    np.testing.assert_array_equal(spectral.total([E, None, 2 * E], [1.0, 5.0, -1.0]), -E)


def test_flattened() -> None:
    """diag(4, 1, 0): mean 2.5 over the support of 2, 5/3 over all 3; rms sqrt(8.5), geo 2; power 1/2: s -> c (2, 1)."""
    W = diag(4, 1, 0)
    np.testing.assert_allclose(spectral.flattened(W), diag(2.5, 2.5, 0), **CLOSE)
    np.testing.assert_allclose(spectral.flattened(W, mean_over="full"), diag(5 / 3, 5 / 3, 0), **CLOSE)
    np.testing.assert_allclose(spectral.flattened(W, alpha=2.0, rank=1), diag(8, 0, 0), **CLOSE)
    np.testing.assert_allclose(spectral.flattened(W, kind="rms"), math.sqrt(8.5) * diag(1, 1, 0), **CLOSE)
    np.testing.assert_allclose(spectral.flattened(W, kind="geo"), diag(2, 2, 0), **CLOSE)
    np.testing.assert_allclose(spectral.flattened(W, power=0.5), diag(10 / 3, 5 / 3, 0), **CLOSE)
    np.testing.assert_allclose(spectral.flattened(W, power=0.0), W, **CLOSE)


def test_polar_drops_directions_without_a_singular_value() -> None:
    np.testing.assert_allclose(spectral.polar(diag(3, 0.5, 0)), diag(1, 1, 0), **CLOSE)
    np.testing.assert_allclose(spectral.polar(np.array([[3.0, 3.0]])), np.full((1, 2), math.sqrt(0.5)), **CLOSE)


def test_iso_cts() -> None:
    """Two tasks on diagonals of 5: q = 5, int(5 * .5) = 2, round(3/2) = 2 each, one dimension is common.

    D_1 = diag(9, 3, 2, 0, 0), D_2 = diag(1, 0, 0, 5, 4): common e1 with 10; without it the tasks have (3, 2) and
    (5, 4): nothing overlaps, so polar changes nothing.
    """
    D = [diag(9, 3, 2, 0, 0), diag(1, 0, 0, 5, 4)]
    merged = spectral.iso_cts(D, [1.0, 1.0], 0.5)
    np.testing.assert_allclose(merged, diag(10, 3, 2, 5, 4), **CLOSE)
    np.testing.assert_allclose(spectral.flattened(merged), 4.8 * np.eye(5), **CLOSE)
    # All common: the sum itself.
    np.testing.assert_allclose(spectral.iso_cts(D, [1.0, 1.0], 1.0), D[0] + D[1], **CLOSE)
    # A task of one direction cannot take 2: the surplus goes back to the common ones, which are then two.
    few = [diag(9, 3, 2, 0, 0), diag(0, 0, 0, 5, 4) * np.array([1, 1, 1, 1, 0])]
    np.testing.assert_allclose(spectral.iso_cts(few, [1.0, 1.0], 0.0), diag(9, 3, 2, 5, 0), **CLOSE)


def test_tsv() -> None:
    """Orthogonal tasks are only added; two equal ones share their direction: polar([u u]) = [u u] / sqrt(2)."""
    np.testing.assert_allclose(spectral.tsv([diag(3, 0), diag(0, 2)], [1.0, -1.0]), diag(3, -2), **CLOSE)
    np.testing.assert_allclose(spectral.tsv([diag(3, 0), diag(3, 0)], [1.0, 1.0]), diag(3, 0), **CLOSE)
    np.testing.assert_allclose(spectral.tsv([diag(3, 1), diag(0, 0)], [1.0, 1.0], k=1), diag(3, 0), **CLOSE)
    # Whitening: u_1 = e1, u_2 at 60 degrees. polar of [[1, .5], [0, h]] is known through X (X^T X)^(-1/2).
    u, v = np.array([1.0, 0.0]), np.array([0.5, math.sqrt(0.75)])
    X = np.stack([u, v], axis=1)
    values, vectors = np.linalg.eigh(X.T @ X)  # 1/2 and 3/2
    np.testing.assert_allclose(values, [0.5, 1.5], **CLOSE)
    P = X @ (vectors / np.sqrt(values)) @ vectors.T
    found = spectral.tsv([2 * np.outer(u, u), 3 * np.outer(v, v)], [1.0, 1.0])
    np.testing.assert_allclose(found, P @ diag(2, 3) @ P.T, rtol=0, atol=1e-14)


def test_wudi() -> None:
    """Rows that do not overlap are reproduced; on a shared one the tasks are averaged by their share g of its norm.

    D_1 = 3 e1^T, D_2 = 2 e2^T: both exact. D_1 = a, D_2 = b on one entry: G = 1 each, (a + b) / 2; a ridge of 2
    halves it.
    """
    found = spectral.wudi([diag(3, 0), diag(0, 2)], [1.0, -2.0])
    np.testing.assert_allclose(found, diag(3, -4), **CLOSE)
    one, two = np.array([[3.0, 0.0]]), np.array([[-1.0, 0.0]])
    np.testing.assert_allclose(spectral.wudi([one, two], [1.0, 1.0]), [[1.0, 0.0]], **CLOSE)
    np.testing.assert_allclose(spectral.wudi([one, two], [1.0, 1.0], ridge=2.0), [[0.5, 0.0]], **CLOSE)


def test_wudi_minimises_the_interference() -> None:
    D = [random(5, 4, seed=i) for i in range(3)]

    def loss(W: np.ndarray) -> float:
        return sum(np.linalg.norm((W - d) @ d.T) ** 2 / np.linalg.norm(d) ** 2 for d in D)

    W = spectral.wudi(D, [1.0, 1.0, 1.0])
    for seed in range(5):
        step = 1e-3 * random(5, 4, seed=10 + seed)
        assert loss(W + step) > loss(W) < loss(W - step)


def test_svc() -> None:
    """Twice the same direction: s_i = 2 for both, gamma = 2 / 4; alone in one: s = 1. A floor bounds s below."""
    np.testing.assert_allclose(spectral.svc([diag(3, 0), diag(3, 2)], [1.0, 1.0], 0.1), diag(3, 2), **CLOSE)
    # 4 and -1 add to 3: s = 3/4 and -3; the latter is lifted to 0.25, gamma = 2 / (0.75 + 0.25) = 2.
    opposed = [np.array([[4.0]]), np.array([[-1.0]])]
    np.testing.assert_allclose(spectral.svc(opposed, [1.0, 1.0], 0.25), [[6.0]], **CLOSE)


def test_iasad_budget() -> None:
    """The published figures, and the clamp."""
    assert spectral.iasad_budget(768, 768, 0.1, 0.75) == 259
    assert spectral.iasad_budget(4096, 4096, 0.1, 0.75) == 1382
    assert spectral.iasad_budget(4096, 11008, 0.1, 0.75) == 2015
    assert spectral.iasad_budget(2, 2, 0.1, 0.75) == 1


def test_pruned() -> None:
    X = np.array([[1.0, -4.0, 2.0, 3.0], [8.0, 5.0, -6.0, 7.0]])
    np.testing.assert_array_equal(spectral.pruned(X, 0.5, "row", "largest"), [[0, -4, 0, 3], [8, 0, 0, 7]])
    np.testing.assert_array_equal(spectral.pruned(X, 0.5, "element", "largest"), [[0, 0, 0, 0], [8, 5, -6, 7]])
    np.testing.assert_array_equal(spectral.pruned(X, 0.5, "row", "smallest"), [[1, 0, 2, 0], [0, 5, -6, 0]])
    np.testing.assert_array_equal(spectral.pruned(X, 0.3, "row", "largest"), [[0, -4, 2, 3], [8, 0, -6, 7]])


def test_iasad_part() -> None:
    """With nothing pruned (rank_ratio 0 and no compression: z = 0) L + Sp is the matrix again.

    keep largest is a projection, so the residual falls with every round; keep smallest leaves more.
    """
    D = random(12, 10)
    whole = spectral.iasad_part(D, 3, sparsity=0.0, rank_ratio=0.0, final_svd=False)
    np.testing.assert_allclose(whole, D, rtol=0, atol=1e-13)
    residuals = [np.linalg.norm(D - spectral.iasad_part(D, 3, iters=i, final_svd=False)) for i in range(1, 8)]
    assert all(b < a for a, b in zip(residuals, residuals[1:], strict=False))
    assert np.linalg.norm(D - spectral.iasad_part(D, 3, keep="smallest")) > residuals[-1]


def test_iasad_scale() -> None:
    """d / mean d with a floor of 1e-6; a common factor of the statistic changes nothing."""
    np.testing.assert_allclose(spectral.input_scale(np.array([4.0, 2.0, 0.0]), 3), [2**0.5, 1.0, 1e-3], **CLOSE)
    D, stat = random(8, 6), np.arange(1.0, 7.0)
    one, two = (spectral.iasad_part(D, 2, c * stat) for c in (1.0, 50.0))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-13)
    assert np.linalg.norm(one - spectral.iasad_part(D, 2)) > 1e-2


def test_iasad_is_the_sum_where_the_rank_fits() -> None:
    D = [random(12, 2, seed=i) @ random(2, 10, seed=9 + i) for i in range(2)]
    assert spectral.iasad_budget(12, 10, 0.1, 1.0) == 4
    for center in ("none", "mean"):  # D_i minus the mean of two deltas of rank 2 has rank 4
        found = spectral.iso_iasad(D, [1.0, -0.5], [2, 2], center=center, rank_ratio=1.0, sparsity=0.1)
        np.testing.assert_allclose(found, D[0] - 0.5 * D[1], rtol=0, atol=1e-13)
    active = spectral.iso_iasad(D, [1.0, -0.5], [2, 2], rank_basis="lora")
    assert np.linalg.norm(active - (D[0] - 0.5 * D[1])) > 1e-2


# ---------------------------------------------------------------- element-wise


def row(*values: float) -> np.ndarray:
    return np.array([values], dtype=np.float64)


def test_threshold_keeps_all_equals() -> None:
    assert elementwise.threshold(row(1, -3, 2, 3), 0.5) == 3.0
    assert elementwise.threshold(row(1, -3, 2, 3), 0.25) == 3.0
    assert elementwise.threshold(row(1, -3, 2, 3), 0.2) == math.inf
    kept = elementwise.trimmed({"m": [row(1, -3, 2, 3)]}, 0.25, "module")["m"][0]
    np.testing.assert_array_equal(kept, row(0, -3, 0, 3))


def test_ties() -> None:
    """By hand: columns (4, 2), (-3, 1), (0, -5), (2, -2) -> sums 6, -2, -5, 0 -> means 3, -3, -5, nobody."""
    modules = {"m": [row(4, -3, 0, 2), row(2, 1, -5, -2)]}
    np.testing.assert_array_equal(elementwise.ties(modules, [1, 1], 1.0)["m"], row(3, -3, -5, 0))
    # Density 1/2: (4, -3) and (-5, 2 and -2, which tie) remain.
    np.testing.assert_array_equal(elementwise.ties(modules, [1, 1], 0.5)["m"], row(3, -3, -5, -2))
    # Weights come after the trim and before the election: sums 4 - 2, -3 - 1, 5, 2 + 2.
    np.testing.assert_array_equal(elementwise.ties(modules, [1, -1], 1.0)["m"], row(4, -2, 5, 2))


def test_global_threshold_counts_missing_modules() -> None:
    """Four entries in all; a density of 1/2 keeps two, also of the adapter that has one module only."""
    modules = {"a": [row(1, 2), row(5, 6)], "b": [row(3, 4), None]}
    found = elementwise.trimmed(modules, 0.5, "global")
    np.testing.assert_array_equal(found["a"][0], row(0, 0))
    np.testing.assert_array_equal(found["b"][0], row(3, 4))
    np.testing.assert_array_equal(found["a"][1], row(5, 6))
    np.testing.assert_array_equal(elementwise.trimmed(modules, 0.5, "module")["a"][0], row(0, 2))
    summed = elementwise.magnitude_prune(modules, [1, 2], 0.5)
    np.testing.assert_array_equal(summed["a"], row(10, 12))


def test_dare_and_dare_ties() -> None:
    D, masks = [row(4, -3, 1), row(2, 1, -5)], [row(1, 0, 1), row(1, 1, 1)]
    np.testing.assert_array_equal(elementwise.dare(D, [1, 1], masks, 0.5), row(12, 2, -8))
    np.testing.assert_array_equal(elementwise.dare_ties(D, [1, 1], masks, 0.5), row(6, 2, -10))
    np.testing.assert_array_equal(elementwise.dare([D[0], None], [2, 1], masks, 0.5), row(16, 0, 4))


def test_della() -> None:
    """Row (1, -3, 2): ranks 0, 2, 1 -> .4, .6, .5 at density .5, epsilon .1."""
    D = np.array([[1.0, -3.0, 2.0]])
    np.testing.assert_allclose(elementwise.della_probabilities(D, 0.5, 0.1), [[0.4, 0.6, 0.5]], **CLOSE)
    found = elementwise.della([D], [2.0], [row(1, 1, 0)], 0.5, 0.1)
    np.testing.assert_allclose(found, [[5.0, -10.0, 0.0]], **CLOSE)


def test_breadcrumbs() -> None:
    """Ten entries, gamma .1 drops the 10, density .6 the 10 - 6 - 1 = 3 smallest; gamma 0 drops none at the top."""
    D = np.arange(1.0, 11.0).reshape(2, 5)
    found = elementwise.breadcrumbs([D], [1.0], 0.6, 0.1)
    np.testing.assert_array_equal(found, [[0, 0, 0, 4, 5], [6, 7, 8, 9, 0]])
    np.testing.assert_array_equal(elementwise.breadcrumbs([D], [1.0], 1.0, 0.0), D)


def test_knots() -> None:
    """With one row U is 1: KnOTS is TIES. At density 1 one adapter comes back, and so does the mean of equal ones."""
    modules = {"m": [row(4, -3, 0, 2), row(2, 1, -5, -2)]}
    np.testing.assert_allclose(elementwise.knots_ties(modules, [1, 1], 0.5)["m"], row(3, -3, -5, -2), **CLOSE)
    D = random(5, 2) @ random(2, 6, seed=1)
    for deltas in ([D], [D, D, D]):
        found = elementwise.knots_ties({"m": deltas}, [1.0] * len(deltas), 1.0)["m"]
        np.testing.assert_allclose(found, D, rtol=0, atol=1e-13)
    U, blocks = elementwise.knots_blocks([D, 2 * D], [1.0, -1.0])
    assert U.shape == (5, 2)
    np.testing.assert_allclose(U @ blocks[1], -2 * D, rtol=0, atol=1e-13)


def test_core_blocks_reproduce_every_adapter() -> None:
    B, A = [random(7, 2), None, random(7, 3, seed=1)], [random(2, 6, seed=2), None, random(3, 6, seed=3)]
    left, blocks, right = elementwise.core_blocks(B, A, [2.0, 1.0, -0.5])
    assert [b.shape for b in blocks] == [(5, 5)] * 3
    np.testing.assert_allclose(left @ blocks[0] @ right.T, 2.0 * B[0] @ A[0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(left @ blocks[2] @ right.T, -0.5 * B[2] @ A[2], rtol=0, atol=1e-13)
    assert not blocks[1].any()
    found = elementwise.core_ties({"m": (B[:1], A[:1])}, [1.0], 1.0)["m"]
    np.testing.assert_allclose(found, B[0] @ A[0], rtol=0, atol=1e-13)


def test_subset_masks() -> None:
    terms = [random(3, 4), random(3, 4, seed=1)]
    masks = [(random(3, 4, seed=2 + i) > 0) * 1.0 for i in range(2)]
    found = sum(t * k for t, k in zip(terms, masks, strict=True))
    np.testing.assert_array_equal(elementwise.subset_masks(found, terms, 1e-12), masks)
    with pytest.raises(AssertionError, match="no sum of kept entries"):
        elementwise.subset_masks(found + 1e-6, terms, 1e-12)


# ---------------------------------------------------------------- one coefficient an adapter


def test_slerp() -> None:
    """At a right angle sin(45) / sin(90) of each; equal vectors and a zero one lie on no arc: the line."""
    half = math.sqrt(0.5)
    np.testing.assert_allclose(scalars.slerp([row(2, 0), row(0, 4)]), row(2 * half, 4 * half), **CLOSE)
    np.testing.assert_allclose(scalars.slerp([row(2, 0), row(2, 0)], 0.3), row(2, 0), **CLOSE)
    np.testing.assert_allclose(scalars.slerp([row(2, 0), row(0, 0)], 0.25), row(1.5, 0), **CLOSE)
    # 60 degrees, t = 1/3: sin 40 / sin 60 and sin 20 / sin 60; unit vectors stay unit vectors.
    v = scalars.slerp([np.array([1.0, 0.0]), np.array([0.5, math.sqrt(0.75)])], 1 / 3)
    np.testing.assert_allclose(v, [math.cos(math.pi / 9), math.sin(math.pi / 9)], **CLOSE)


def test_karcher() -> None:
    """Two vectors: the middle of the arc, mean length. Three on the axes: the diagonal. Shares 2:1: a third of it."""
    half = math.sqrt(0.5)
    np.testing.assert_allclose(scalars.karcher([np.array([2.0, 0]), np.array([0, 4.0])]), [3 * half] * 2, **CLOSE)
    np.testing.assert_allclose(scalars.karcher(list(E)), [math.sqrt(1 / 3)] * 3, **CLOSE)
    found = scalars.karcher([np.array([1.0, 0]), np.array([0, 1.0])], [2.0, 1.0])
    np.testing.assert_allclose(found, [math.cos(math.pi / 6), math.sin(math.pi / 6)], **CLOSE)
    # A zero delta has no direction, but its length 0 counts.
    np.testing.assert_allclose(scalars.karcher([np.array([2.0, 0]), np.zeros(2)]), [1.0, 0], **CLOSE)


def test_model_stock() -> None:
    """Equal vectors: c = 1, t = 1, the mean. Orthogonal ones: c = 0, nothing. c = 1/2, N = 2: t = 2/3."""
    v = np.array([2.0, 0.0])
    np.testing.assert_allclose(scalars.model_stock([v, v, v]), v, **CLOSE)
    np.testing.assert_allclose(scalars.model_stock([v, np.array([0.0, 1.0])]), [0, 0], **CLOSE)
    np.testing.assert_allclose(scalars.model_stock([v, np.array([-1.0, 0.1])]), [0, 0], **CLOSE)
    other = np.array([1.0, math.sqrt(3.0)])
    np.testing.assert_allclose(scalars.model_stock([v, other]), 2 / 3 * (v + other) / 2, **CLOSE)


def test_scope() -> None:
    """Globally the two adapters are at 90 degrees; by module they are parallel in one and missing in the other."""
    modules = {"a": [row(1, 0), row(1, 0)], "b": [row(0, 3), None]}
    by_module = scalars.over(modules, "module", scalars.slerp)
    np.testing.assert_allclose(by_module["a"], row(1, 0), **CLOSE)
    np.testing.assert_allclose(by_module["b"], row(0, 1.5), **CLOSE)
    whole = scalars.over(modules, "global", scalars.slerp)
    omega = math.acos(1 / math.sqrt(10))
    factor = math.sin(omega / 2) / math.sin(omega)
    np.testing.assert_allclose(whole["a"], row(2 * factor, 0), **CLOSE)
    np.testing.assert_allclose(whole["b"], row(0, 3 * factor), **CLOSE)


# ---------------------------------------------------------------- ranks


def test_rank_rules() -> None:
    """S = 4, 2, 1, 1: squares 16, 4, 1, 1 of 22; sums 4, 6, 7, 8."""
    S = np.array([4.0, 2.0, 1.0, 1.0])
    assert [ranks.wanted(S, "energy", e) for e in (16 / 22, 0.73, 20 / 22, 0.92, 1.0)] == [1, 2, 2, 3, 4]
    assert [ranks.wanted(S, "nuclear", e) for e in (0.5, 0.51, 0.75, 0.76, 1.0)] == [1, 2, 2, 3, 4]
    assert [ranks.wanted(S, "fro_error", e) for e in (0.53, 0.5, 0.31, 0.3, 0.0)] == [1, 2, 2, 3, 4]
    assert [ranks.wanted(S, "ratio", t) for t in (1.5, 2.0, 3.0, 4.0, 5.0)] == [1, 1, 2, 2, 4]
    assert ranks.chosen(S, "energy", 0.9, min_rank=3) == 3
    assert ranks.chosen(S, "energy", 1.0, max_rank=2) == 2
    assert ranks.chosen(np.array([1.0, 1e-16]), None, 0.0, min_rank=2) == 1


def test_budget() -> None:
    """Values per parameter: a (2 + 2): 9/4, 1/4; b (1 + 1): 4/2, 1/2. 4 + 2 = 6 parameters hold a1 b1."""
    spectra = {"a": (np.array([3.0, 1.0]), 2, 2), "b": (np.array([2.0, 1.0]), 1, 1)}
    assert ranks.budgeted(spectra, 6) == {"a": 1, "b": 1}
    assert ranks.budgeted(spectra, 8) == {"a": 1, "b": 2}
    assert ranks.budgeted(spectra, 12) == {"a": 2, "b": 2}


# ---------------------------------------------------------------- factors


def test_document_mix() -> None:
    """N_1 = 2, N_2 = 8 (alpha 8, r 1): norms differ by more than 2, w = 1/2; g = sqrt(8 / 2) = 2: 1 + 8 = 9."""
    one = [np.ones((1, 1))] * 2
    assert document.document_mix(one, one, [2.0, 8.0]) == pytest.approx(9.0)
    # 2 and 3: w = 2/5, g = sqrt(3/2).
    assert document.document_mix(one, one, [2.0, 3.0]) == pytest.approx(0.8 + 1.8 * math.sqrt(1.5))


def test_document_ranks() -> None:
    """r = 8 twice, .99: 7 and never more, whatever the spectrum; r = 32: 31."""
    assert document.document_width(8, 8, 64, 64, 0.99, 4, 32) == 7
    assert document.document_width(32, 32, 64, 64, 0.99, 4, 32) == 31
    assert document.document_width(16, 4, 6, 64, 0.99, 4, 32) == 6
    assert document.document_rank(np.array([5.0, 3.0, 1.0, 1.0]), 0.79, 1, 32) == 2
    assert document.document_rank(np.array([5.0, 3.0, 1.0, 1.0]), 0.8, 1, 32) == 3  # its epsilon misses an exact share
    assert document.document_rank(np.array([5.0, 3.0, 1.0, 1.0]), 0.85, 1, 32) == 3
    assert document.document_rank(np.array([5.0, 3.0, 1.0, 1.0]), 0.1, 3, 32) == 3


def test_document_rsvd_is_exact_where_the_sketch_holds_all() -> None:
    """Ranks 1 and 1: a sketch of 4 holds the rank-2 sum whatever the seed (float32 inside)."""
    B, A = [random(9, 1), random(9, 1, seed=1)], [random(1, 8, seed=2), random(1, 8, seed=3)]
    want = document.document_mix(B, A, [1.0, 1.0])
    found, q, k = document.document_rsvd(B, A, [1.0, 1.0], seed=3, energy=1.0)
    assert (q, k) == (4, 4)
    assert np.linalg.norm(found - want) < 1e-5 * np.linalg.norm(want)


def test_geometric_mean() -> None:
    """Factors (4, -1) and (1, -9) of B, (2) and (8) of A, scales 1 and 4: (2, 3) times 4 times 2."""
    B, A = [np.array([[4.0], [-1.0]]), np.array([[1.0], [-9.0]])], [np.array([[2.0]]), np.array([[8.0]])]
    np.testing.assert_allclose(document.geometric_mean(B, A, [1.0, 4.0]), [[16.0], [24.0]], **CLOSE)
    np.testing.assert_allclose(document.geometric_factor([row(1, 2), row(-1, 4), row(1, 1)]), row(-1, 2), atol=1e-15)


def test_robust_merge() -> None:
    """Rank 1, n = 4, density 1/2: A = (4, 1, 1, 2) keeps (4, ., ., 2), S = 8/6; (0, 0, 3, 3) keeps itself, S = 1."""
    B = [np.array([[2.0], [1.0]]), np.array([[1.0], [5.0]])]
    A = [row(4, 1, 1, 2), row(0, 0, 3, 3)]
    found = document.robust_merge(B, A, [1.0, 2.0], [1.0, -1.0], density=0.5, strength=1.0)
    S = np.array([4 / 3, 1.0]) / (4 / 3 + 1.0)
    np.testing.assert_allclose(found, [S[0] * 2 * row(4, 0, 0, 2)[0], -2 * S[1] * 5 * row(0, 0, 3, 3)[0]], **CLOSE)


def test_lego() -> None:
    """Two units in one cluster: mean (b 2, a (1, 3)); its largest entry 3 is the mean of 2 and 4."""
    units = [(np.array([1.0]), np.array([1.0, 2.0])), (np.array([3.0]), np.array([1.0, 4.0]))]
    np.testing.assert_allclose(document.lego(units, [0, 0], 1), [[2.0, 6.0]], **CLOSE)
    np.testing.assert_allclose(document.lego(units, [0, 1], 1), math.sqrt(0.5) * row(4, 14), **CLOSE)
    opposed = [(np.array([2.0]), np.array([2.0])), (np.array([4.0]), np.array([0.0]))]
    np.testing.assert_allclose(document.lego(opposed, [0, 0], 1), [[3.0]], **CLOSE)


def test_balanced_units() -> None:
    B, A = random(4, 2), random(2, 5, seed=1)
    units = document.balanced_units(8.0 * B, A / 8.0)
    np.testing.assert_allclose(sum(np.outer(b, a) for b, a in units), B @ A, rtol=0, atol=1e-13)
    for b, a in units:
        assert np.linalg.norm(b) == pytest.approx(np.linalg.norm(a))


def test_truncated_is_the_known_optimum() -> None:
    W = random(6, 5)
    np.testing.assert_allclose(spectral.truncated(W, 2), best_rank_k(W, 2)[0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(document.rsvd(W, 0.9, 1, 2), best_rank_k(W, 2)[0], rtol=0, atol=1e-13)
