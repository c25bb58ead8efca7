from __future__ import annotations

import json
from collections.abc import Callable

from typer.testing import Result

from loraforge.merging.methods import METHODS

from .conftest import only_object

Run = Callable[..., Result]


def test_every_method_has_a_row(run: Run) -> None:
    result = run("methods")
    assert result.exit_code == 0
    # No table that is piped is cut or wrapped: name and paper of a method stand on one line.
    lines = result.stdout.splitlines()
    for row in METHODS.values():
        (line,) = [line for line in lines if row.title in line]
        assert line.lstrip().startswith(row.name) and line.endswith(row.paper)
    assert "(linear)" in result.stdout


def test_json_has_the_pinned_keys(run: Run) -> None:
    found = json.loads(run("methods", "--json").stdout)
    assert [row["name"] for row in found] == list(METHODS)
    assert all({"name", "title", "needs", "output", "params", "paper"} <= row.keys() for row in found)


def test_one_method_with_its_parameters(run: Run) -> None:
    result = run("methods", "iteris")
    assert result.exit_code == 0 and "calibration" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.lstrip().startswith("use_mats ")]
    assert line.split()[:3] == ["use_mats", "false", "true|false"]
    params = {param["name"]: param for param in only_object(run("methods", "iteris", "--json"))["params"]}
    assert params["use_mats"]["default"] is False and params["init"]["choices"] == ["sweep", "adapters"]


def test_an_alias_and_a_method_without_parameters(run: Run) -> None:
    result = run("methods", "linear")
    assert result.stdout.startswith("task-arithmetic (linear)") and "no parameters" in result.stdout


def test_an_unknown_method_is_a_usage_error(run: Run) -> None:
    result = run("methods", "iterisplus", "--json")
    assert result.exit_code == 2 and "did you mean 'iteris-plus'" in only_object(result)["error"]["next"]
