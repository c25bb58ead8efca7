from __future__ import annotations

import math

import numpy as np
import pytest

from loraforge.bench.fit import fit_power


def test_a_power_law_is_found_exactly() -> None:
    x = [2.0, 4.0, 8.0, 16.0]
    fit = fit_power(x, [3.0 * v**1.5 for v in x])
    assert fit is not None and fit.points == 4
    assert fit.exponent == pytest.approx(1.5, abs=1e-12) and fit.factor == pytest.approx(3.0, rel=1e-12)
    assert fit.stderr == pytest.approx(0.0, abs=1e-7)


def test_the_standard_error_is_that_of_least_squares() -> None:
    x, noise = np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([0.1, -0.05, 0.0, 0.08, -0.1])
    fit = fit_power(list(x), list(np.exp(0.5 + 2.0 * np.log(x) + noise)))
    A = np.stack([np.log(x), np.ones(5)], axis=1)
    y = 0.5 + 2.0 * np.log(x) + noise
    found, residual, *_ = np.linalg.lstsq(A, y, rcond=None)
    covariance = residual[0] / (5 - 2) * np.linalg.inv(A.T @ A)
    assert fit is not None and fit.exponent == pytest.approx(found[0], rel=1e-12)
    assert fit.stderr == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-9)


def test_what_cannot_be_fitted() -> None:
    two = fit_power([1.0, 2.0], [1.0, 8.0])
    assert two is not None and two.exponent == pytest.approx(3.0) and two.stderr is None
    assert fit_power([2.0, 2.0], [1.0, 3.0]) is None
    assert fit_power([1.0, 2.0, 4.0], [0.0, 0.0, 5.0]) is None
