from __future__ import annotations

import itertools

import pytest
import torch

from loraforge.errors import LoraforgeError, UsageError
from loraforge.linalg.budget import share_budget


def spectrum(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_hand_sized_example() -> None:
    """Worth an entry: a 9/2, 4/2; b 25/10, 16/10. a's first two, then b's."""
    spectra = {"a": spectrum(3.0, 2.0), "b": spectrum(5.0, 4.0)}
    assert share_budget(spectra, {"a": (8, 8), "b": (8, 8)}, 48) == {"a": 1, "b": 2}
    shapes = {"a": (2, 2), "b": (5, 5)}
    assert share_budget(spectra, shapes, 18) == {"a": 2, "b": 1}
    # b's second direction does not fit, and that is no reason to stop.
    assert share_budget({"b": spectrum(5.0, 4.0), "a": spectrum(3.0, 0.1)}, shapes, 19) == {"b": 1, "a": 2}


def test_no_other_choice_keeps_more_by_a_whole_direction() -> None:
    generator = torch.Generator().manual_seed(3)
    spectra = {k: torch.rand(4, generator=generator, dtype=torch.float64).sort(descending=True).values for k in "abc"}
    shapes = {"a": (6, 4), "b": (20, 9), "c": (5, 5)}

    def size(ranks: dict[str, int]) -> int:
        return sum(k * sum(shapes[name]) for name, k in ranks.items())

    def kept(ranks: dict[str, int]) -> float:
        return sum(float(spectra[name][:k].square().sum()) for name, k in ranks.items())

    every = [dict(zip("abc", ks, strict=True)) for ks in itertools.product(range(1, 5), repeat=3)]
    exact = 0
    for budget in range(49, 200, 7):
        found = share_budget(spectra, shapes, budget)
        assert size(found) <= budget
        best = max(kept(other) for other in every if size(other) <= budget)
        # The first direction that did not fit is at most the best one left over.
        left = [float(spectra[name][k]) ** 2 for name, k in found.items() if k < 4]
        assert best <= kept(found) + max(left, default=0.0) + 1e-12
        exact += best <= kept(found) + 1e-12
    assert exact > 10


def test_clamps_numerical_rank_and_zero_modules() -> None:
    spectra = {"flat": spectrum(1.0, 1.0, 1.0, 1.0), "low": spectrum(9.0, 1e-20), "zero": spectrum(0.0, 0.0)}
    shapes = {name: (4, 4) for name in spectra}
    assert share_budget(spectra, shapes, 10**6) == {"flat": 4, "low": 1, "zero": 1}
    assert share_budget(spectra, shapes, 10**6, max_rank=2) == {"flat": 2, "low": 1, "zero": 1}
    assert share_budget(spectra, shapes, 10**6, min_rank=3) == {"flat": 4, "low": 1, "zero": 3}
    assert share_budget(spectra, shapes, 24) == {"flat": 1, "low": 1, "zero": 1}


def test_equal_worth_goes_by_order() -> None:
    spectra = {"b": spectrum(1.0, 1.0), "a": spectrum(1.0, 1.0)}
    assert share_budget(spectra, {"a": (2, 2), "b": (2, 2)}, 12) == {"b": 2, "a": 1}


def test_a_budget_below_the_least_says_the_least() -> None:
    spectra = {"a": spectrum(1.0, 0.5), "b": spectrum(1.0)}
    with pytest.raises(LoraforgeError, match="at least 30 for rank 1 in 2 modules") as caught:
        share_budget(spectra, {"a": (10, 10), "b": (5, 5)}, 29)
    assert caught.value.exit_code == 3
    assert share_budget(spectra, {"a": (10, 10), "b": (5, 5)}, 30) == {"a": 1, "b": 1}


@pytest.mark.parametrize(("budget", "clamps"), [(0, {}), (True, {}), (9.5, {}), (90, {"min_rank": 3, "max_rank": 2})])
def test_wrong_arguments(budget: int, clamps: dict) -> None:
    with pytest.raises(UsageError):
        share_budget({"a": spectrum(1.0)}, {"a": (2, 2)}, budget, **clamps)
