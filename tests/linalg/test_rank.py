from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraforge.errors import UsageError
from loraforge.linalg.rank import RankRule, choose, energy_rank, error_rank, nuclear_rank, numerical_rank
from tests.oracles import factored as oracle

S = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("rule", "k"),
    [
        (RankRule(), 4),
        (RankRule(rank=2), 2),
        (RankRule(rank=9), 4),
        (RankRule(rank=1, min_rank=3), 3),
        (RankRule(rank=4, max_rank=2), 2),
        (RankRule(max_rank=3), 3),
        (RankRule(min_rank=9), 4),
        (RankRule(energy=1.0), 4),
        (RankRule(energy=16 / 30), 1),
        (RankRule(energy=0.54), 2),
        (RankRule(energy=25 / 30), 2),
        (RankRule(energy=0.84), 3),
        (RankRule(energy=1e-9), 1),
        (RankRule(energy=0.99, min_rank=1, max_rank=2), 2),
        (RankRule(nuclear=1.0), 4),
        (RankRule(nuclear=0.4), 1),
        (RankRule(nuclear=0.41), 2),
        (RankRule(nuclear=0.9), 3),
        (RankRule(nuclear=1.0, max_rank=2), 2),
        (RankRule(ratio=4.0), 3),
        (RankRule(ratio=4.001), 4),
        (RankRule(ratio=1.5), 2),
        (RankRule(ratio=1.0001, min_rank=2), 2),
        (RankRule(fro_error=0.0), 4),
        (RankRule(fro_error=0.183), 3),
        (RankRule(fro_error=0.18), 4),
        (RankRule(fro_error=0.41), 2),
        (RankRule(fro_error=0.999), 1),
    ],
)
def test_rules_on_a_known_spectrum(rule: RankRule, k: int) -> None:
    assert choose(S, rule, 100, 100) == k


def test_rank_never_exceeds_the_matrix() -> None:
    assert choose(torch.ones(8), RankRule(), 3, 100) == 3
    assert choose(torch.ones(8), RankRule(rank=5), 100, 2) == 2


def test_zero_spectrum_gets_the_least_rank() -> None:
    zeros = torch.zeros(4)
    assert choose(zeros, RankRule(), 10, 10) == 1
    assert choose(zeros, RankRule(energy=0.5, min_rank=6), 10, 10) == 6
    assert choose(zeros, RankRule(min_rank=6), 10, 3) == 3
    assert choose(torch.zeros(0), RankRule(rank=2), 10, 10) == 1
    assert energy_rank(torch.zeros(0), 0.5) == numerical_rank(torch.zeros(0)) == 0


def test_numerical_rank_is_that_of_the_dtype() -> None:
    tiny = [1.0, 1e-5, 1e-8, 1e-12, 1e-17]
    assert numerical_rank(torch.tensor(tiny, dtype=torch.float32)) == 2
    assert numerical_rank(torch.tensor(tiny, dtype=torch.float64)) == 4


def test_a_tolerance_below_the_square_root_of_eps_is_met() -> None:
    steep = torch.tensor([1.0, 1e-4, 1e-9, 1e-11], dtype=torch.float64)
    assert error_rank(steep, 1e-10) == 3 and error_rank(steep, 2e-9) == 2
    # A share cannot tell these apart: 1 - 1e-18 is 1.
    assert energy_rank(steep, 1.0 - 1e-18) == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.floats(0.01, 0.99))
def test_nuclear_and_error_rules_keep_their_word_and_no_more(values: list[float], share: float) -> None:
    ordered = np.array(sorted(values, reverse=True))
    S = torch.from_numpy(ordered)
    k = nuclear_rank(S, share)
    slack = 1e-12 * ordered.sum()
    assert ordered[:k].sum() >= share * ordered.sum() - slack
    assert ordered[: k - 1].sum() < share * ordered.sum() + slack
    k = error_rank(S, share)
    size = np.linalg.norm(ordered)
    assert np.linalg.norm(ordered[k:]) <= share * size * (1 + 1e-12)
    assert k == 0 or np.linalg.norm(ordered[k - 1 :]) > share * size * (1 - 1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.floats(0.01, 1.0))
def test_energy_rank_equals_the_oracle(values: list[float], energy: float) -> None:
    ordered = np.array(sorted(values, reverse=True))
    k = energy_rank(torch.from_numpy(ordered), energy)
    squares = ordered**2
    slack = 1e-12 * squares.sum()
    assert squares[:k].sum() >= energy * squares.sum() - slack
    assert k == 1 or squares[: k - 1].sum() < energy * squares.sum() + slack
    assert abs(k - oracle.energy_rank(np.diag(ordered), energy)) <= (
        1 if abs(squares[:k].sum() / squares.sum() - energy) < 1e-9 else 0
    )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": True}, "rank"),
        ({"rank": 2.0}, "rank"),
        ({"min_rank": 0}, "min_rank"),
        ({"max_rank": -1}, "max_rank"),
        ({"energy": 0.0}, "energy"),
        ({"energy": 1.5}, "energy"),
        ({"energy": float("nan")}, "energy"),
        ({"energy": "0.5"}, "energy"),
        ({"nuclear": 0.0}, "nuclear"),
        ({"nuclear": 1.01}, "nuclear"),
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": float("inf")}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"fro_error": 1.0}, "fro_error"),
        ({"fro_error": -0.1}, "fro_error"),
        ({"rank": 2, "energy": 0.5}, "rank, energy"),
        ({"nuclear": 0.5, "energy": 0.5}, "energy, nuclear"),
        ({"rank": 2, "ratio": 3.0, "fro_error": 0.1}, "rank, ratio, fro_error"),
        ({"min_rank": 5, "max_rank": 4}, "min_rank, max_rank"),
    ],
)
def test_wrong_rules_are_refused_by_name(fields: dict, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        RankRule(**fields)
    assert caught.value.where == named and caught.value.exit_code == 2


def test_lossless() -> None:
    assert RankRule().is_lossless and RankRule(min_rank=4).is_lossless
    cutting = (
        RankRule(rank=1), RankRule(energy=1.0), RankRule(max_rank=9), RankRule(nuclear=1.0), RankRule(ratio=1e9),
        RankRule(fro_error=0.0),
    )  # fmt: skip
    assert not any(rule.is_lossless for rule in cutting)
