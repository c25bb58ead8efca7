"""The element-wise oracles on examples small enough to be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.oracles import elementwise
from tests.oracles.hand import CLOSE, random, row


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
