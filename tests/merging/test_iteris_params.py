"""Every parameter of the calibrated methods is checked when it is set, by name."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from loraforge.errors import UsageError
from loraforge.merging.iteris_params import IterisParams

FIELDS = {f.name: f for f in dataclasses.fields(IterisParams)}
CHOICES = [name for name, f in FIELDS.items() if "choices" in f.metadata]
NUMBERS = [name for name, f in FIELDS.items() if "low" in f.metadata]
FLAGS = [name for name, f in FIELDS.items() if f.type == "bool"]
WHOLE = [name for name, f in FIELDS.items() if f.type == "int" and "low" in f.metadata]
AUTO = [name for name, f in FIELDS.items() if "Auto" in str(f.type)]
OPTIONAL = [name for name, f in FIELDS.items() if "None" in str(f.type)]


def refused(**values: Any) -> str:
    with pytest.raises(UsageError) as caught:
        IterisParams(**values)
    assert caught.value.exit_code == 2
    return str(caught.value)


def alone(name: str, value: Any) -> dict[str, Any]:
    """The value, with a fitting twin where two parameters go together."""
    twins = {"alpha_1": "alpha_2", "alpha_2": "alpha_1"}
    extra = {"reg_ceof": 0.0} if value == "merged" else {}
    return {name: value} | extra | ({twins[name]: "auto" if value == "auto" else 1e-3} if name in twins else {})


def test_every_field_is_of_a_kind_that_is_checked() -> None:
    assert set(FIELDS) == {*CHOICES, *NUMBERS, *FLAGS, "manual_ceof"}
    assert set(AUTO) == {"alpha_1", "alpha_2", "reg_ceof"} and set(OPTIONAL) == {"manual_ceof", "camr_alpha"}


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name: str) -> None:
    for value in FIELDS[name].metadata["choices"]:
        assert getattr(IterisParams(**alone(name, value)), name) == value
    message = refused(**{name: "nonsense"})
    assert name in message and "nonsense" in message
    assert all(str(choice) in message for choice in FIELDS[name].metadata["choices"])


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    low = FIELDS[name].metadata["low"]
    assert getattr(IterisParams(**alone(name, low)), name) == low
    for value in (low - 1, float("nan"), float("inf"), "many", True, [1]):
        message = refused(**alone(name, value))
        assert name in message, message


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers(name: str) -> None:
    message = refused(**{name: FIELDS[name].metadata["low"] + 0.5})
    assert name in message and "whole" in message


@pytest.mark.parametrize("name", NUMBERS)
def test_auto_and_none_only_where_they_mean_something(name: str) -> None:
    if name in AUTO:
        assert getattr(IterisParams(**alone(name, "auto")), name) == "auto"
    else:
        assert name in refused(**{name: "auto"})
    if name in OPTIONAL:
        assert getattr(IterisParams(**{name: None}), name) is None
    else:
        assert name in refused(**alone(name, None))


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name: str) -> None:
    # if_divide has a condition of its own.
    fitting = {"samples_num": 20, "inner_num": 4, "outer_num": 5}
    for value in (True, False):
        assert getattr(IterisParams(**{name: value}, **fitting), name) is value
    for wrong in (1, 0, "yes", None):
        assert name in refused(**{name: wrong})


@pytest.mark.parametrize("name", ["reg_ceof", "dcs_min_ess"])
def test_shares(name: str) -> None:
    for value in (0, 0.5, 1, 1.0):
        assert getattr(IterisParams(**{name: value}), name) == value
    for value in (1.5, 2):
        assert "share" in refused(**{name: value})


def test_alphas_are_chosen_together() -> None:
    for pair in ({"alpha_1": "auto", "alpha_2": 1e-3}, {"alpha_1": 1e-3, "alpha_2": "auto"}):
        message = refused(**pair)
        assert "alpha_1" in message and "alpha_2" in message


def test_coefficients_are_numbers() -> None:
    for value in ((1.0, 0.5), [1, 2], None):
        assert IterisParams(manual_ceof=value).manual_ceof == value  # type: ignore[arg-type]
    for wrong in ("12", 1.0, ("a", 1.0), (True, 1.0)):
        assert "manual_ceof" in refused(manual_ceof=wrong)


def test_divided_batches_must_add_up() -> None:
    assert IterisParams(if_divide=True, inner_num=6, outer_num=10, samples_num=60).if_divide
    assert "6 x 10 != 50" in refused(if_divide=True, inner_num=6, outer_num=10, samples_num=50)


@pytest.mark.parametrize(
    ("values", "searches"),
    [
        ({"alpha_1": "auto", "alpha_2": "auto", "reg_ceof": 0.0}, True),
        ({"alpha_1": 1e-3, "alpha_2": 1e-3, "reg_ceof": "auto"}, True),
        ({"alpha_1": 1e-3, "alpha_2": 1e-3, "reg_ceof": 0.25}, False),
    ],
)
def test_a_fixed_number_switches_the_search_off(values: dict[str, Any], searches: bool) -> None:
    assert IterisParams(**values).searches is searches


def test_values_cannot_be_changed_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        IterisParams().max_iter = 3  # type: ignore[misc]


def test_no_torch() -> None:
    """`loraforge methods iteris-plus` and completion read this file."""
    code = "import sys, loraforge.merging.iteris_params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_merged_target_has_nothing_to_mix() -> None:
    assert "target=merged" in refused(target="merged", reg_ceof=0.5)
    assert "target=merged" in refused(target="merged", reg_ceof="auto")
