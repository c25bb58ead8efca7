"""The oracles of coefficients, ranks and factors on examples small enough to be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.oracles import document, ranks, scalars
from tests.oracles.hand import CLOSE, E, random, row


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
