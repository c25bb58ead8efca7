from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from loraforge.errors import LoraforgeError
from loraforge.measure.heads.layout import HeadKey
from loraforge.measure.importance.estimates import GateGradients, fisher, michel, taylor


@pytest.fixture
def drawn():
    """Gradients of 50 rows by 6 heads of 2 attentions."""
    s = np.random.default_rng(0).normal([0.0, 1.0, -2.0, 0.1, 5.0, 0.0], 1.0, (50, 6))
    heads = tuple(HeadKey("enc", "self", layer, head) for layer in range(2) for head in range(3))
    return GateGradients(heads, s, np.zeros(50), "sample", 50)


def test_taylor(drawn):
    from scipy import stats

    found = taylor(drawn)
    np.testing.assert_allclose(found.value, -drawn.s.mean(0))
    np.testing.assert_allclose(found.se, stats.sem(drawn.s))
    lo, hi = stats.norm.interval(0.95, -drawn.s.mean(0), stats.sem(drawn.s))
    np.testing.assert_allclose([found.ci_lo, found.ci_hi], [lo, hi])
    assert found.significant.tolist() == ((lo > 0) | (hi < 0)).tolist()
    assert found.significant[[1, 2, 4]].all()


def test_one_row_has_no_interval(drawn):
    alone = taylor(replace(drawn, s=drawn.s[:1]))
    assert np.isnan(alone.se).all() and not alone.significant.any()


def test_michel(drawn):
    found = michel(drawn)
    np.testing.assert_allclose(found.value, np.abs(drawn.s).mean(0))
    assert (found.value >= np.abs(taylor(drawn).value)).all()
    normal = michel(drawn, normalise=True)
    for own in (slice(0, 3), slice(3, 6)):
        assert np.linalg.norm(normal.value[own]) == pytest.approx(1)
        ratio = normal.value[own] / found.value[own]
        np.testing.assert_allclose(normal.se[own], found.se[own] * ratio)
        np.testing.assert_allclose(ratio, ratio[0])
    with pytest.raises(LoraforgeError, match="row by row"):
        michel(replace(drawn, mode="batch"))


def test_fisher(drawn):
    found = fisher(drawn, eps=1e-6, relative=False)
    np.testing.assert_allclose(found.f, drawn.s.mean(0) ** 2 + drawn.s.var(0))
    np.testing.assert_allclose(found.p, found.g**2 / (found.f + 1e-6))
    assert (found.p > 0).all() and (found.p <= 1).all()
    np.testing.assert_allclose(found.m, found.g)
    assert np.isnan(fisher(replace(drawn, mode="batch")).m).all()


def test_a_relative_eps_does_not_see_the_scale(drawn):
    small = replace(drawn, s=1e-5 * drawn.s)
    np.testing.assert_allclose(fisher(small).p, fisher(drawn).p)
    assert fisher(small, relative=False).p.max() < 0.01
    nothing = fisher(replace(drawn, s=0 * drawn.s))
    assert np.isnan(nothing.p).all() and nothing.eps == 0
