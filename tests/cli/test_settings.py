from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytest

from loraforge.cli._settings import parse_settings, parse_value, settings_of, type_name
from loraforge.errors import UsageError
from loraforge.merging.methods import METHODS

PLUS = METHODS["iteris-plus"]


@pytest.mark.parametrize(
    ("text", "hint", "expected"),
    [
        ("1e-5", float, 1e-5),
        ("1e-5", float | Literal["auto"], 1e-5),
        ("auto", float | Literal["auto"], "auto"),
        ("3", float, 3.0),
        ("10", int, 10),
        ("1e3", int, 1000),
        ("123456789012345678901", int, 123456789012345678901),
        ("yes", bool, True),
        ("False", bool, False),
        ("0", bool, False),
        ("none", float | None, None),
        ("2", int | None, 2),
        ("none", str, "none"),
        ("sweep", str, "sweep"),
        ("1", int | float, 1),
        ("1.5", int | float, 1.5),
        ("true", bool | str, True),
        ("1,0.5", tuple[float, ...] | None, (1.0, 0.5)),
        ("[1, 2]", list[int], [1, 2]),
        ("1,2", Sequence[float], (1.0, 2.0)),
        ("True", Literal[True], True),
    ],
)
def test_a_value_is_read_by_its_type(text: str, hint: Any, expected: object) -> None:
    found = parse_value(text, hint)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "hint"),
    [("1.5", int), ("", int), ("ten", float), ("2", bool), ("x", Literal["auto"]), ("a,b", tuple[float, ...])],
)
def test_a_value_of_another_type_is_refused(text: str, hint: Any) -> None:
    with pytest.raises(ValueError):
        parse_value(text, hint)


def test_keys_may_be_written_with_dashes_and_values_with_equals() -> None:
    found = parse_settings(PLUS, ["max-iter=3", "init = adapters"], {})
    assert found["max_iter"] == 3


def test_flags_and_settings_come_together() -> None:
    flags = {"use_mats": ("--no-mats", False), "max_iter": ("--max-iter", 4)}
    assert parse_settings(PLUS, ["alpha_1=1e-5"], flags) == {"alpha_1": 1e-5, "use_mats": False, "max_iter": 4}


@pytest.mark.parametrize(
    ("assignments", "flags", "words"),
    [
        (["max_itr=3"], {}, ["unknown parameter 'max_itr'", "did you mean 'max_iter'"]),
        (["max_iter"], {}, ["KEY=VALUE", "max_iter"]),
        (["=3"], {}, ["KEY=VALUE"]),
        (["max_iter=many"], {}, ["max_iter", "many", "int"]),
        (["init=3", "init=4"], {}, ["init", "twice"]),
        (["alpha_1=maybe"], {}, ["alpha_1", "float | auto"]),
        (["use_mats=true"], {"use_mats": ("--no-mats", False)}, ["--no-mats", "--set use_mats"]),
    ],
)
def test_wrong_settings_are_usage_errors(assignments: list[str], flags: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_settings(PLUS, assignments, flags)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_method_without_parameters_says_so() -> None:
    with pytest.raises(UsageError, match="'svd' has no parameters"):
        parse_settings(METHODS["svd"], [], {"max_iter": ("--max-iter", 3)})


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_of_every_method_can_be_written_and_read(name: str) -> None:
    row = METHODS[name]
    for setting in settings_of(row):
        assert setting.help, f"{name}: {setting.name} has no help text"
        text = "none" if setting.default is None else str(setting.default)
        found = parse_settings(row, [f"{setting.name}={text}"], {})
        assert found == {setting.name: setting.default}
        row.make_params(found)


def test_defaults_are_those_of_the_method_and_not_of_the_family() -> None:
    defaults = {setting.name: setting.default for setting in settings_of(METHODS["regmean"])}
    assert defaults["max_iter"] == METHODS["regmean"].defaults["max_iter"] == 1


def test_type_names_are_words() -> None:
    assert type_name(float | Literal["auto"]) == "float | auto"
    assert type_name(bool) == "true|false"
    assert type_name(tuple[float, ...] | None) == "list of float | none"
