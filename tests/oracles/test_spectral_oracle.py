"""The spectral oracles on examples small enough to be worked out by hand."""

from __future__ import annotations

import math

import numpy as np

from tests.oracles import document, iasad, spectral
from tests.oracles.factored import best_rank_k
from tests.oracles.hand import CLOSE, E, diag, random


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
    assert iasad.iasad_budget(768, 768, 0.1, 0.75) == 259
    assert iasad.iasad_budget(4096, 4096, 0.1, 0.75) == 1382
    assert iasad.iasad_budget(4096, 11008, 0.1, 0.75) == 2015
    assert iasad.iasad_budget(2, 2, 0.1, 0.75) == 1


def test_pruned() -> None:
    X = np.array([[1.0, -4.0, 2.0, 3.0], [8.0, 5.0, -6.0, 7.0]])
    np.testing.assert_array_equal(iasad.pruned(X, 0.5, "row", "largest"), [[0, -4, 0, 3], [8, 0, 0, 7]])
    np.testing.assert_array_equal(iasad.pruned(X, 0.5, "element", "largest"), [[0, 0, 0, 0], [8, 5, -6, 7]])
    np.testing.assert_array_equal(iasad.pruned(X, 0.5, "row", "smallest"), [[1, 0, 2, 0], [0, 5, -6, 0]])
    np.testing.assert_array_equal(iasad.pruned(X, 0.3, "row", "largest"), [[0, -4, 2, 3], [8, 0, -6, 7]])


def test_iasad_part() -> None:
    """With nothing pruned (rank_ratio 0 and no compression: z = 0) L + Sp is the matrix again.

    keep largest is a projection, so the residual falls with every round; keep smallest leaves more.
    """
    D = random(12, 10)
    whole = iasad.iasad_part(D, 3, sparsity=0.0, rank_ratio=0.0, final_svd=False)
    np.testing.assert_allclose(whole, D, rtol=0, atol=1e-13)
    residuals = [np.linalg.norm(D - iasad.iasad_part(D, 3, iters=i, final_svd=False)) for i in range(1, 8)]
    assert all(b < a for a, b in zip(residuals, residuals[1:], strict=False))
    assert np.linalg.norm(D - iasad.iasad_part(D, 3, keep="smallest")) > residuals[-1]


def test_iasad_scale() -> None:
    """d / mean d with a floor of 1e-6; a common factor of the statistic changes nothing."""
    np.testing.assert_allclose(iasad.input_scale(np.array([4.0, 2.0, 0.0]), 3), [2**0.5, 1.0, 1e-3], **CLOSE)
    D, stat = random(8, 6), np.arange(1.0, 7.0)
    one, two = (iasad.iasad_part(D, 2, c * stat) for c in (1.0, 50.0))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-13)
    assert np.linalg.norm(one - iasad.iasad_part(D, 2)) > 1e-2


def test_iasad_is_the_sum_where_the_rank_fits() -> None:
    D = [random(12, 2, seed=i) @ random(2, 10, seed=9 + i) for i in range(2)]
    assert iasad.iasad_budget(12, 10, 0.1, 1.0) == 4
    for center in ("none", "mean"):  # D_i minus the mean of two deltas of rank 2 has rank 4
        found = iasad.iso_iasad(D, [1.0, -0.5], [2, 2], center=center, rank_ratio=1.0, sparsity=0.1)
        np.testing.assert_allclose(found, D[0] - 0.5 * D[1], rtol=0, atol=1e-13)
    active = iasad.iso_iasad(D, [1.0, -0.5], [2, 2], rank_basis="lora")
    assert np.linalg.norm(active - (D[0] - 0.5 * D[1])) > 1e-2


def test_truncated_is_the_known_optimum() -> None:
    W = random(6, 5)
    np.testing.assert_allclose(spectral.truncated(W, 2), best_rank_k(W, 2)[0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(document.rsvd(W, 0.9, 1, 2), best_rank_k(W, 2)[0], rtol=0, atol=1e-13)
