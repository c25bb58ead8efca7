"""Statistics over heads, against scipy, plain loops and hand-sized examples."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import hypergeom, kendalltau, spearmanr

from loraforge.measure.analysis.statistics import (
    bootstrap_rho,
    bootstrap_rho_difference,
    correlation,
    find_cases,
    kendall,
    spearman,
    top_k,
    top_overlap,
    why_none,
    within_layer_rho,
)
from tests.measure.golden import I_PRE, UREL

NAN, INF = float("nan"), float("inf")
MODULES = ("statistics", "null", "joined", "runs", "aggregate", "seeds", "compare", "summary", "suggest", "modules")


@pytest.mark.parametrize("levels", [3, 12, 10_000], ids=["many ties", "some ties", "no ties"])
def test_spearman_is_scipys(levels: int) -> None:
    random = np.random.default_rng(levels)
    x, y = random.integers(levels, size=(2, 80)).astype(float)
    y += 0.5 * x
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-14)
    assert kendall(x, y) == pytest.approx(kendalltau(x, y).statistic, abs=1e-14)


def test_heads_without_a_value_are_left_out() -> None:
    x = [1.0, NAN, 3.0, 2.0, 7.0, INF, 5.0]
    y = [2.0, 5.0, NAN, 1.0, 9.0, 1.0, 4.0]
    kept = [0, 3, 4, 6]
    expected = spearmanr([x[i] for i in kept], [y[i] for i in kept]).statistic
    assert spearman(x, y) == pytest.approx(expected, abs=1e-14)
    assert correlation(x, y, [0] * 7, draws=10)["n"] == 4


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "the first value is the same for all 3 heads"),
        ([1.0, 2.0, 3.0], [4.0, 4.0, 4.0], "the second value is the same for all 3 heads"),
        ([1.0, NAN], [NAN, 2.0], "0 heads have both values"),
        ([], [], "0 heads have both values"),
    ],
    ids=["first", "second", "apart", "none"],
)
def test_where_there_is_no_correlation_there_is_a_reason(x: list[float], y: list[float], reason: str) -> None:
    found = correlation(x, y, [0] * len(x), draws=10)
    assert found["rho"] is found["p_perm"] is found["ci"] is found["kendall"] is None
    assert found["within_layer"] == {"rho": None, "p_perm": None, "layers": 0}
    assert found["reason"] == reason
    assert why_none([1.0, 2.0], [1.0, 2.0]) is None


def test_rho_within_layers_is_the_mean_of_the_layers() -> None:
    x = [1.0, 2.0, 3.0, 11.0, 12.0, 13.0, 5.0, 5.0, 5.0]
    y = [1.0, 2.0, 3.0, 13.0, 12.0, 11.0, 1.0, 2.0, 3.0]
    layers = ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    # Layer c is constant in x and has no rho.
    assert within_layer_rho(x, y, layers) == (pytest.approx(0.0), 2)
    assert within_layer_rho(x, y, range(9)) == (None, 0)


def test_top_k_takes_finite_values_and_the_earlier_of_equal_ones() -> None:
    values = [NAN, 3.0, 5.0, INF, 3.0, 5.0, 1.0, -INF]
    assert top_k(values, 3) == [2, 5, 1]
    assert top_k(values, 20) == [2, 5, 1, 4, 6]


def test_overlap_by_plain_loops() -> None:
    found = top_overlap(I_PRE, UREL, 4)
    order = sorted(range(12), key=lambda i: (-I_PRE[i], i))[:4]
    other = sorted(range(12), key=lambda i: (-UREL[i], i))[:4]
    hits = sum(i in other for i in order)
    assert found["overlap"] == hits / 4 and found["hits"] == hits and found["expected"] == 4 / 12
    assert found["p"] == pytest.approx(sum(hypergeom.pmf(j, 12, 4, 4) for j in range(hits, 5)))
    assert top_overlap(I_PRE, UREL, 50)["k"] == 12 and top_overlap(I_PRE, UREL, 50)["overlap"] == 1
    nothing = top_overlap([NAN], [1.0], 5)
    assert nothing["overlap"] is nothing["p"] is nothing["expected"] is nothing["range95"] is None


def test_thresholds_of_cases_belong_to_the_sets() -> None:
    x, y = np.arange(11.0), np.arange(11.0)[::-1].copy()
    found = find_cases(x, y, hi=90, lo=30)
    # Of 0..10 the percentiles are 9 and 3 themselves.
    assert found.thresholds == {"x_hi": 9.0, "x_lo": 3.0, "y_hi": 9.0, "y_lo": 3.0}
    assert found.static == [9, 10] and found.plastic == [0, 1]
    assert found.chance["static"].expected == pytest.approx(2 * 4 / 11)
    assert found.chance["static"].ratio == pytest.approx(2 / (2 * 4 / 11))
    sure = np.array([True] * 10 + [False])
    strict = find_cases(x, y, hi=90, lo=30, above_zero=sure)
    assert strict.static == [9] and strict.plastic == [0, 1]
    assert strict.chance["static"].expected == pytest.approx(1 * 4 / 11)
    empty = find_cases([NAN, 1.0], [1.0, NAN])
    assert empty.static == [] and empty.chance["static"] is None and empty.thresholds["x_hi"] is None


def test_the_bootstrap_covers_the_rho_of_the_population() -> None:
    random = np.random.default_rng(8)
    # Spearman's rho of a bivariate normal: 6 / pi * asin(r / 2).
    true, covered = 6 / np.pi * np.arcsin(0.5 / 2), 0
    for i in range(60):
        x = random.normal(size=100)
        y = 0.5 * x + np.sqrt(0.75) * random.normal(size=100)
        low, high = bootstrap_rho(x, y, draws=300, seed=i)
        covered += low <= true <= high
    # 95 % of 60 is 57; percentile intervals fall somewhat short of their level.
    assert covered >= 51
    assert bootstrap_rho([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) is None


def test_the_difference_of_two_methods_is_resampled_in_pairs() -> None:
    random = np.random.default_rng(9)
    x, noise = random.normal(size=(2, 60))
    same, sizes = bootstrap_rho_difference((x, noise), (x, noise))
    assert same == [0.0, 0.0] and sizes == [0.0, 0.0]
    apart, sizes = bootstrap_rho_difference((x, x), (x, -x))
    assert apart == [pytest.approx(2.0), pytest.approx(2.0)] and sizes == pytest.approx([0.0, 0.0])
    # Heads that one method lacks are left out of both.
    holes = np.where(np.arange(60) < 5, NAN, noise)
    assert bootstrap_rho_difference((x, noise), (x, holes)) == bootstrap_rho_difference(
        (x[5:], noise[5:]), (x[5:], noise[5:])
    )


def test_statistics_load_no_torch() -> None:
    imports = "; ".join(f"import loraforge.measure.analysis.{name}" for name in MODULES)
    code = f"import sys; {imports}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
