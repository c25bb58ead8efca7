from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import loraforge

from .conftest import only_object

Run = Callable[..., Result]
RESULTS: dict[str, Any] = {
    "tasks": ["rotated", "noisy"],
    "rows": [
        {"name": "base", "accuracies": [50.0, 25.5], "mean": 37.75, "rank": None, "seconds": 0.0, "bytes": 0},
        {"name": "svd", "accuracies": [90.0, 80.0], "mean": 85.0, "rank": 4, "seconds": 0.5, "bytes": 2048},
    ],
    "seconds": 12.0,
    "paths": {"report": "demo/report.html", "numbers": "demo/results.json"},
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def run_demo(out: Path, *, seed: int, quick: bool, full: bool, overwrite: bool, progress: Any) -> dict[str, Any]:
        seen.append({"out": out, "seed": seed, "quick": quick, "full": full, "overwrite": overwrite})
        return RESULTS

    monkeypatch.setitem(vars(loraforge), "run_demo", run_demo)
    return seen


def test_people_read_accuracies_and_places(run: Run, calls: list[dict[str, Any]], tmp_path: Path) -> None:
    result = run("demo", "-o", tmp_path / "demo", "--seed", 3, "--quick")
    assert result.exit_code == 0, result.stderr
    assert calls == [{"out": tmp_path / "demo", "seed": 3, "quick": True, "full": False, "overwrite": False}]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["model", "rotated", "noisy", "mean", "rank", "seconds", "size"] in lines
    assert ["svd", "90", "80", "85", "4", "0.5", "2.0", "KiB"] in lines
    assert ["report", "demo/report.html"] in lines and ["numbers", "demo/results.json"] in lines


def test_full_models_are_asked_for(run: Run, calls: list[dict[str, Any]], tmp_path: Path) -> None:
    assert run("demo", "-o", tmp_path / "demo", "--full").exit_code == 0
    assert [call["full"] for call in calls] == [True]


def test_json_is_what_the_demo_returns(run: Run, calls: list[dict[str, Any]], tmp_path: Path) -> None:
    assert only_object(run("demo", "-o", tmp_path / "demo", "--json")) == RESULTS


def test_an_existing_folder_is_refused_before_any_work(run: Run, calls: list[dict[str, Any]], tmp_path: Path) -> None:
    result = run("demo", "-o", tmp_path)
    assert result.exit_code == 3 and "--overwrite" in result.stderr and calls == []
    assert run("demo", "-o", tmp_path, "--overwrite").exit_code == 0
    assert [call["overwrite"] for call in calls] == [True]
