from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from loraforge.cli.methods import GROUPS, examples, group_of
from loraforge.merging.methods import METHODS

from .conftest import FakeMerge, only_object

Run = Callable[..., Result]


def test_every_method_has_a_row_under_what_it_needs(run: Run) -> None:
    result = run("methods")
    assert result.exit_code == 0
    # No table that is piped is cut or wrapped: name and paper of a method stand on one line.
    lines = result.stdout.splitlines()
    titles = [line for line in lines if line in GROUPS.values()]
    assert titles == [title for key, title in GROUPS.items() if any(group_of(row) == key for row in METHODS.values())]
    for row in METHODS.values():
        ((place, line),) = [
            (i, line) for i, line in enumerate(lines) if line.split(" ")[0] == row.name and line.endswith(row.paper)
        ]
        assert row.title in line and ("  yes  " in line) == row.checkpoints
        assert [text for text in lines[:place] if text in titles][-1] == GROUPS[group_of(row)]
    assert "(linear)" in result.stdout


def test_json_has_the_pinned_keys(run: Run) -> None:
    found = json.loads(run("methods", "--json").stdout)
    assert [row["name"] for row in found] == list(METHODS)
    assert all({"name", "title", "needs", "output", "params", "paper"} <= row.keys() for row in found)
    by_name = {row["name"]: row for row in found}
    assert by_name["slerp"]["adapters"] == {"min": 1, "max": 2} and by_name["slerp"]["default_weight"] is None
    assert by_name["iso-iasad"]["stats"] == "diag" and by_name["iso-iasad"]["group"] == "stats"
    assert by_name["iso-c"]["checkpoints"] and by_name["iso-c"]["post"] == "iso"
    assert by_name["geometric-mean"]["equal_ranks"] and not by_name["concat"]["checkpoints"]


def test_one_method_with_its_parameters(run: Run) -> None:
    result = run("methods", "iteris")
    assert result.exit_code == 0 and "calibration" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.lstrip().startswith("use_mats ")]
    assert line.split()[:3] == ["use_mats", "false", "true|false"]
    params = {param["name"]: param for param in only_object(run("methods", "iteris", "--json"))["params"]}
    assert params["use_mats"]["default"] is False and params["init"]["choices"] == ["sweep", "adapters"]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "slerp",
            ["adapters: 1 or 2", "default weights: none; --weights is refused"],
        ),
        ("geometric-mean", ["adapters: any, of one rank in each module", "full models: no"]),
        ("iso-iasad", ["needs: the adapters; better with input statistics (--stats, one file an adapter)"]),
        ("weighted-average", ["default weights: 1/N each", "adapters: any", "full models: yes, against --base"]),
    ],
)
def test_what_a_method_takes(run: Run, name: str, lines: list[str]) -> None:
    found = [line.strip() for line in run("methods", name).stdout.splitlines()]
    assert set(lines) <= set(found)


def test_an_alias_and_a_method_without_parameters(run: Run) -> None:
    result = run("methods", "linear")
    assert result.stdout.startswith("task-arithmetic (linear)") and "no parameters" in result.stdout


@pytest.mark.parametrize("name", list(METHODS))
def test_the_examples_are_commands(
    run: Run, fake_merge: FakeMerge, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every example reaches the merge with its options understood."""
    monkeypatch.chdir(tmp_path)
    shown = examples(METHODS[name])
    assert set(shown) <= {line.strip() for line in run("methods", name).stdout.splitlines()}
    for example in shown:
        words = shlex.split(example)
        result = run(*words[1:])
        assert result.exit_code == 0, f"{example}: {result.stderr}"
        assert fake_merge.calls[-1]["method"] == name
        (tmp_path / words[-1] / "run.json").touch()
        result = run(*words[1:], "--overwrite")
        assert result.exit_code == 0, result.stderr
        (tmp_path / words[-1]).rename(tmp_path / f"done{len(fake_merge.calls)}")


def test_an_unknown_method_is_a_usage_error(run: Run) -> None:
    result = run("methods", "iterisplus", "--json")
    assert result.exit_code == 2 and "did you mean 'iteris-plus'" in only_object(result)["error"]["next"]
