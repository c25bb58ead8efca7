from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import Result

import loraforge

from .conftest import only_object

Run = Callable[..., Result]


def module(name: str, rank: int, scaling: float) -> dict[str, Any]:
    spectrum = [2.0, 1.0][:rank]
    known = {"module": name, "shape": [16, 8], "rank": rank, "scaling": scaling, "dtype": "float32"}
    return known | {"norm": 2.236068, "spectrum": spectrum, "effective_rank": 1.89, "stable_rank": 1.25}


def adapter(name: str, modules: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "path": f"loras/{name}",
        "format": "peft",
        "base": "tiny",
        "task_type": None,
        "sha256": "00",
        "bytes": 2048,
        "parameters": 96,
        "norm": 3.25,
        "modules": modules,
    }


FOUND: dict[str, Any] = {
    "adapters": [
        adapter("[a]", [module("encoder.q", 2, 0.5), module("encoder.v", 1, 2.0)]),
        adapter("b", [module("encoder.q", 2, 1.0)]),
    ],
    "cosine": [[1.0, -0.125], [-0.125, 1.0]],
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []

    def inspect(paths: Any) -> dict[str, Any]:
        seen.append(paths)
        return {**FOUND, "adapters": FOUND["adapters"][: len(paths)]}

    monkeypatch.setitem(vars(loraforge), "inspect", inspect)
    return seen


def test_a_row_an_adapter_and_the_cosines(run: Run, asked: list[Any]) -> None:
    result = run("inspect", "loras/a", "loras/b")
    assert result.exit_code == 0 and asked == [["loras/a", "loras/b"]]
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["[a]", "peft", "tiny", "-", "2", "1..2", "0.5..2", "float32", "3.25", "96", "2.0", "KiB"] in rows
    assert ["b", "peft", "tiny", "-", "1", "2", "1", "float32", "3.25", "96", "2.0", "KiB"] in rows
    assert ["[a]", "1", "-0.125"] in rows and ["b", "-0.125", "1"] in rows
    assert "encoder.q" not in result.stdout
    assert "Cosine between the deltas" in result.stdout.splitlines(), "a title is one line"


def test_verbose_has_a_row_a_module(run: Run, asked: list[Any]) -> None:
    rows = [line.split() for line in run("inspect", "loras/a", "-v").stdout.splitlines()]
    assert ["encoder.v", "16", "x", "8", "1", "2", "2.236", "2", "1.89", "1.25"] in rows


def test_one_adapter_has_no_cosines(run: Run, asked: list[Any]) -> None:
    assert "osine" not in run("inspect", "loras/a").stdout


def test_json_has_the_same_numbers(run: Run, asked: list[Any]) -> None:
    assert only_object(run("inspect", "loras/a", "loras/b", "--json")) == FOUND
