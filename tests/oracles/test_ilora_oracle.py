"""The oracle of continual training on numbers that were worked out by hand or are given by the definitions."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from tests.oracles import ilora

P = [np.array([[[1.0, -2.0], [3.0, 0.0]]]), np.array([[[0.0, 0.0], [1.0, 1.0]]])]
S = [np.array([[[0.0, 1.0], [3.5, -1.0]]]), np.array([[[2.0, 0.0], [0.0, 3.0]]])]
FIRST_TOKEN = np.array([[1, 0]])
ONES = [1.0] * 5


def test_ema_towards_a_constant() -> None:
    new = [float(e) for e in ilora.ema_trajectory(0.0, ONES, 0.25)]
    assert new == pytest.approx([0.25, 0.4375, 0.578125, 0.683594, 0.762695], abs=5e-7)
    old = [float(e) for e in ilora.ema_trajectory(0.0, ONES, 0.25, "decay")]
    assert old == pytest.approx([0.75, 0.9375, 0.984375, 0.996094, 0.999023], abs=5e-7)


@pytest.mark.parametrize(("alpha", "steps"), [(0.25, 2.409), (0.75, 0.500), (0.001, 692.8)])
def test_half_life(alpha: float, steps: float) -> None:
    """(1 - a)^h = 1/2, and the trajectory crosses one half between the whole steps around h."""
    assert math.log(0.5) / math.log(1.0 - alpha) == pytest.approx(steps, rel=1e-3)
    path = ilora.ema_trajectory(0.0, [1.0] * (int(steps) + 1), alpha)
    assert path[-1] >= 0.5
    assert len(path) == 1 or path[-2] < 0.5


def test_closed_form_equals_the_steps() -> None:
    generator = np.random.default_rng(0)
    values = list(generator.standard_normal((7, 3, 2)))
    start = generator.standard_normal((3, 2))
    for alpha in (0.0, 0.02, 0.25, 1.0):
        stepped = ilora.ema_trajectory(start, values, alpha)[-1]
        np.testing.assert_allclose(ilora.ema_closed_form(start, values, alpha), stepped, rtol=0.0, atol=1e-14)


def test_the_conventions_mirror_each_other() -> None:
    values = [1.0, -2.0, 0.5]
    new = ilora.ema_trajectory(3.0, values, 0.2)
    np.testing.assert_allclose(new, ilora.ema_trajectory(3.0, values, 0.8, "decay"), rtol=0.0, atol=1e-14)


def test_warm_up() -> None:
    """Decay .999: a running mean of the start and all values so far; decay <= 1/2: without effect."""
    values = [1.0, 2.0, 6.0, 3.0]
    path = ilora.ema_trajectory(0.0, values, 0.999, "decay", warmup=True)
    assert [float(e) for e in path] == pytest.approx([0.5, 1.0, 2.25, 2.4], abs=1e-14)
    warm = ilora.ema_trajectory(0.0, values, 0.5, "decay", warmup=True)
    np.testing.assert_array_equal(warm, ilora.ema_trajectory(0.0, values, 0.5, "decay"))
    assert ilora.new_weight(0.25, 1, warmup=True) == 0.5
    assert ilora.new_weight(0.25, 9, warmup=True) == 0.25


def test_reservoir_is_uniform() -> None:
    """K / n = .25 for every item; the largest of 60 standardised deviations stays below 4."""
    n, capacity, trials = 60, 15, 4000
    found = ilora.inclusion_frequencies(n, capacity, trials)
    share = capacity / n
    assert found.sum() == pytest.approx(capacity)
    assert np.abs(found - share).max() < 4.0 * math.sqrt(share * (1.0 - share) / trials)
    np.testing.assert_array_equal(ilora.inclusion_frequencies(5, 9, 3), np.ones(5))


def test_merged_reservoirs_are_uniform() -> None:
    """Two ranks saw 40 and 20 items with 10 slots each; 15 of the 60 are kept, every one as often."""
    trials, counts, generator = 4000, np.zeros(60), random.Random(1)
    for _ in range(trials):
        parts = [ilora.Reservoir(15, generator) for _ in range(2)]
        for item in range(60):
            parts[item % 3 == 0].offer(item)
        merged = ilora.merge_reservoirs(parts, 15, generator)
        assert merged.seen == 60 and len(set(merged.items)) == 15
        counts[merged.items] += 1.0
    assert np.abs(counts / trials - 0.25).max() < 4.0 * math.sqrt(0.25 * 0.75 / trials)


@pytest.mark.parametrize(
    ("rule", "threshold", "whole", "masked"),
    [
        ("elementwise", 0.1, 2.15625, 3.25),
        ("none", 0.1, 2.53125, 3.5),
        ("margin", 1.0, 2.53125, 3.5),
        ("margin", 0.0, 2.15625, 3.25),
        ("deadband", 1.0, 2.125, 3.25),
        ("deadband", 0.0, 2.15625, 3.25),
    ],
)
def test_consistency_by_hand(rule: str, threshold: float, whole: float, masked: float) -> None:
    assert ilora.consistency_loss(P, S, None, rule, threshold)[0] == whole
    assert ilora.consistency_loss(P, S, FIRST_TOKEN, rule, threshold)[0] == masked


def test_consistency_is_one_sided() -> None:
    """where(P > S, P, S) and a squared error are mean(relu(S - P)^2); its gradient never lowers P's descent step."""
    generator = np.random.default_rng(3)
    p, s = generator.standard_normal((2, 4, 5, 6))
    loss, (gradient,) = ilora.consistency_loss([p], [s])
    assert loss == pytest.approx(float((np.maximum(s - p, 0.0) ** 2).mean()), abs=1e-14)
    assert (gradient <= 0.0).all() and (gradient[p > s] == 0.0).all() and (gradient[p < s] < 0.0).all()


def test_token_rule() -> None:
    """Kept tokens cost nothing, the others plain squares: 14/8 with the second token of four entries kept."""
    loss, gradients = ilora.consistency_loss(P, S, None, "token", keep_tokens=np.array([[False, True]]))
    assert loss == 14.0 / 8.0
    assert all((g[:, 1] == 0.0).all() for g in gradients)
    with pytest.raises(ValueError, match="keep_tokens"):
        ilora.consistency_loss(P, S, None, "token")


@pytest.mark.parametrize("rule", ["elementwise", "margin", "deadband", "token", "none"])
def test_gradients_by_differences(rule: str) -> None:
    generator = np.random.default_rng(5)
    plastic = [generator.standard_normal((2, 3, width)) for width in (4, 2)]
    stable = [generator.standard_normal(p.shape) for p in plastic]
    mask, keep = np.array([[1, 1, 0], [1, 0, 1]]), generator.random((2, 3)) < 0.5
    _, gradients = ilora.consistency_loss(plastic, stable, mask, rule, 0.3, keep)
    step = 1e-6
    for layer, at in ((0, (0, 1, 2)), (1, (1, 2, 0)), (0, (0, 2, 1)), (1, (0, 0, 1))):
        sides = []
        for sign in (1.0, -1.0):
            moved = [p.copy() for p in plastic]
            moved[layer][at] += sign * step
            sides.append(ilora.consistency_loss(moved, stable, mask, rule, 0.3, keep)[0])
        assert (sides[0] - sides[1]) / (2.0 * step) == pytest.approx(gradients[layer][at], abs=1e-8)


def test_nothing_counted_costs_nothing() -> None:
    loss, gradients = ilora.consistency_loss(P, S, np.zeros((1, 2)))
    assert loss == 0.0 and all((g == 0.0).all() for g in gradients)


def test_total_loss() -> None:
    assert ilora.total_loss(2.0, 1.0, 0.5, 3.0) == 3.0
    assert ilora.total_loss(2.0, None, 0.5, 3.0) == 2.0


def test_metrics_of_a_sequence() -> None:
    matrix = [[0.80, 0.30, 0.20], [0.60, 0.70, 0.25], [0.50, 0.65, 0.90]]
    found = ilora.cl_metrics(matrix, [0.25, 0.28, 0.22], [0.82, 0.75, 0.9])
    expected = {
        "acc": 0.683333, "avg": 0.711111, "bwt": -0.175, "fwt": 0.025, "forgetting": 0.175, "learning": 0.80,
        "intransigence": 0.07 / 3.0,
    }  # fmt: skip
    assert found == pytest.approx(expected, abs=5e-7)


def test_forgetting_is_not_minus_bwt() -> None:
    found = ilora.cl_metrics([[0.5, 0.1, 0.1], [0.8, 0.6, 0.1], [0.7, 0.6, 0.6]])
    assert found["bwt"] == pytest.approx(0.10) and found["forgetting"] == pytest.approx(0.05)
    assert found["fwt"] is None and found["intransigence"] is None


def test_one_task_and_missing_scores() -> None:
    alone = ilora.cl_metrics([[0.7]], [0.5])
    assert alone["acc"] == 0.7
    assert alone["bwt"] is None and alone["fwt"] is None and alone["forgetting"] is None
    assert ilora.cl_metrics([[0.7, None], [0.6, 0.5]], [0.1, 0.2])["fwt"] is None
    with pytest.raises(ValueError, match="task 0 after task 1"):
        ilora.cl_metrics([[0.7, 0.1], [None, 0.5]])
