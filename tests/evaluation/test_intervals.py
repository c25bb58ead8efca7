"""Intervals against closed forms, scipy, and their own coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from loraforge.evaluation import metrics
from loraforge.evaluation.intervals import bootstrap, paired_bootstrap, percentile_interval, resample, wilson


@pytest.mark.parametrize(("correct", "n"), [(0, 7), (7, 7), (3, 10), (45, 50), (512, 1024)])
def test_wilson_equals_scipy(correct, n):
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    assert wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_covers_what_it_promises_on_average():
    n, shares = 40, np.linspace(0.05, 0.95, 19)
    bounds = [wilson(k, n) for k in range(n + 1)]
    coverage = [sum(binom.pmf(k, n, p) for k, (low, high) in enumerate(bounds) if low <= p <= high) for p in shares]
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.01)


def test_bootstrap_of_a_mean_has_the_width_of_the_normal_interval():
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap(values.tolist(), draws=4000)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_pairing_narrows_the_interval():
    draw = np.random.default_rng(1)
    hard = draw.normal(size=200)
    one, other = hard + 0.1, hard + draw.normal(size=200) * 0.1
    difference, (low, high) = paired_bootstrap(one.tolist(), other.tolist())
    assert difference == pytest.approx(float((one - other).mean()))
    assert 0 < low < difference < high < 0.15


def test_the_same_seed_draws_the_same_rows_whatever_the_blocks(monkeypatch):
    values = np.arange(50.0)
    whole = resample(lambda index: values[index].mean(axis=1), 50, seed=3, draws=64)
    monkeypatch.setattr("loraforge.evaluation.intervals._BLOCK", 50 * 7)
    assert np.array_equal(whole, resample(lambda index: values[index].mean(axis=1), 50, seed=3, draws=64))
    assert not np.array_equal(whole, resample(lambda index: values[index].mean(axis=1), 50, seed=4, draws=64))


@pytest.mark.parametrize("name", ["accuracy", "f1_macro", "mcc", "spearman", "pearson"])
def test_the_resampled_statistic_is_the_metric_of_the_drawn_rows(name):
    """The vectorised statistic against the metric itself, draw by draw."""
    draw = np.random.default_rng(2)
    truth = [0, 1, 2, *draw.integers(0, 3, 37).tolist()]
    guess = [value if draw.random() < 0.7 else int(draw.integers(0, 3)) for value in truth]
    metric = metrics.METRICS[name]
    index = draw.integers(0, 40, (8, 40))
    found = metric.on(truth, guess).statistic(index)
    expected = [metric([truth[i] for i in row], [guess[i] for i in row]) for row in index]
    assert found == pytest.approx(expected, abs=1e-12)


def test_undefined_draws_are_left_out_and_too_many_leave_no_interval():
    values = np.array([np.nan, 1.0, 2.0, 3.0])
    assert percentile_interval(values) == pytest.approx((1.05, 2.95))
    assert percentile_interval(np.array([np.nan, np.nan, np.nan, 1.0])) is None
    assert bootstrap([]) is None


def test_paired_scores_need_the_same_rows():
    with pytest.raises(ValueError, match="the same rows: 2 and 3"):
        paired_bootstrap([1, 0], [1, 0, 1])
