"""What chance gives, against enumeration and seeded draws."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from scipy.stats import binom, spearmanr

from loraforge.measure.analysis.null import common_members, permutation_p, rho_band
from loraforge.measure.analysis.statistics import find_cases, spearman, top_overlap

N, K = 144, 20


def exact_rhos(n: int) -> list[float]:
    """|rho| of every order of n values without ties."""
    return [
        abs(1 - 6 * sum((i - p) ** 2 for i, p in enumerate(order)) / (n**3 - n)) for order in permutations(range(n))
    ]


@pytest.mark.parametrize("n", [3, 5, 7])
def test_the_band_of_few_heads_is_that_of_all_their_orders(n: int) -> None:
    rhos = exact_rhos(n)
    allowed = [b for b in sorted(set(rhos)) if sum(rho > b + 1e-9 for rho in rhos) <= 0.05 * len(rhos)]
    assert rho_band(n) == pytest.approx(allowed[0], abs=1e-12)


def test_the_band_of_many_heads_is_the_designs() -> None:
    assert rho_band(N) == pytest.approx(0.1637, abs=1e-4)
    assert rho_band(2) is None
    assert rho_band(30) == pytest.approx(rho_band(31), abs=0.02)


def test_about_one_in_twenty_independent_columns_leaves_the_band() -> None:
    random = np.random.default_rng(5)
    band = rho_band(N)
    outside = sum(abs(spearman(random.normal(size=N), random.normal(size=N))) > band for _ in range(400))
    low, high = binom.interval(0.999, 400, 0.05)
    assert low <= outside <= high


def test_p_values_of_independent_columns_are_uniform() -> None:
    random = np.random.default_rng(6)
    ps = [permutation_p(random.normal(size=20), random.normal(size=20), draws=400, seed=i) for i in range(400)]
    for level in (0.05, 0.25, 0.5):
        low, high = binom.interval(0.999, 400, level)
        assert low <= sum(p <= level for p in ps) <= high


def test_p_counts_the_orders_that_are_as_far_from_zero() -> None:
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0, 5.0], [2.0, 1.0, 4.0, 3.0, 6.0, 5.0]
    seen = abs(spearmanr(x, y).statistic)
    orders = list(permutations(range(6)))
    exact = sum(abs(spearmanr([x[i] for i in order], y).statistic) >= seen - 1e-9 for order in orders) / len(orders)
    # Five standard errors of a share from 20,000 draws.
    assert permutation_p(x, y, draws=20_000) == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 20_000))


def test_p_is_seeded_symmetric_in_sign_and_leaves_missing_values_out() -> None:
    random = np.random.default_rng(7)
    x, y = random.normal(size=30), random.normal(size=30)
    assert permutation_p(x, y, draws=500, seed=3) == permutation_p(-x, y, draws=500, seed=3)
    holes = np.r_[x, np.nan, 1.0]
    assert permutation_p(holes, np.r_[y, 1.0, np.inf], draws=500) == permutation_p(x, y, draws=500)
    assert permutation_p(np.ones(9), np.arange(9.0)) is None
    assert permutation_p([1.0], [2.0]) is None


def test_permuting_within_layers_sees_no_trend_of_depth() -> None:
    """Both columns grow with depth and are independent within a layer."""
    layers = np.repeat(np.arange(8), 6)
    random = np.random.default_rng(12)
    x, y = layers + 0.1 * random.normal(size=48), layers + 0.1 * random.normal(size=48)
    assert permutation_p(x, y, draws=999) == 0.001
    assert permutation_p(x, y, groups=list(layers), draws=999) > 0.05


def test_common_members_against_every_choice() -> None:
    n, first, second = 8, 3, 4
    counts = [len(set(chosen) & set(range(first))) for chosen in combinations(range(n), second)]
    for observed in range(4):
        found = common_members(observed, n, first, second)
        assert found.p == pytest.approx(sum(c >= observed for c in counts) / len(counts), rel=1e-12)
        assert found.expected == pytest.approx(sum(counts) / len(counts), rel=1e-12)
        low, high = found.range95
        assert sum(low <= c <= high for c in counts) >= 0.95 * len(counts)
    assert common_members(0, 0, 0, 0) is None
    assert common_members(0, 5, 5, 0).ratio is None


def test_the_designs_chance_levels_at_144_heads() -> None:
    random = np.random.default_rng(0)
    counts, overlaps = [], []
    for _ in range(400):
        x, y = random.normal(size=N), random.normal(size=N)
        found = find_cases(x, y)
        counts += [len(found.static), len(found.plastic)]
        overlaps.append(top_overlap(x, y, K)["overlap"])
    chance = found.chance["static"]
    assert chance.expected == pytest.approx(4.479, abs=1e-3) and chance.range95 == (2, 8)
    # Four standard errors of the mean of the draws.
    assert np.mean(counts) == pytest.approx(chance.expected, abs=4 * np.std(counts) / math.sqrt(len(counts)))
    within = sum(2 <= count <= 8 for count in counts)
    assert binom.interval(0.999, len(counts), 0.96)[0] <= within
    assert top_overlap(x, y, K)["expected"] == K / N
    assert np.mean(overlaps) == pytest.approx(K / N, abs=4 * np.std(overlaps) / math.sqrt(len(overlaps)))
