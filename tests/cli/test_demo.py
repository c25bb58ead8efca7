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


SEQUENCE: dict[str, Any] = {
    "tasks": ["rotated", "inverted"],
    "rows": [
        {"method": "base", "adapter": None, "accuracies": [25.0, 2.5], "acc": 13.75}
        | {"bwt": None, "forgetting": None, "seconds": None},
        {"method": "seq", "adapter": "default", "accuracies": [10.04, 80.0], "acc": 45.02}
        | {"bwt": -70.0, "forgetting": 70.0, "seconds": 12.34},
    ],
    "runs": {"seq": "run-seq"},
    "summary": ["Earlier tasks end below their best."],
    "warnings": ["warning: the run was begun with another torch"],
    "seconds": 12.0,
    "paths": {"sequence": "demo/sequence.yaml"},
}


@pytest.fixture
def sequences(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def run(out: Path, *, progress: Any, **given: Any) -> dict[str, Any]:
        seen.append({"out": out, **given})
        return SEQUENCE

    monkeypatch.setattr("loraforge.demo.sequence.run_sequence_demo", run)
    return seen


def test_a_sequence_is_trained_and_told(run: Run, sequences: list[dict[str, Any]], tmp_path: Path) -> None:
    result = run("demo", "--sequence", "--seed", 3, "--quick", "-o", tmp_path)
    assert result.exit_code == 0, result.stderr
    # An unfinished demo is continued: what is there is judged by the demo itself.
    assert sequences == [{"out": tmp_path, "seed": 3, "quick": True, "overwrite": False}]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["method", "adapter", "rotated", "inverted", "ACC", "BWT", "forgetting", "seconds"] in lines
    assert ["seq", "default", "10", "80", "45", "-70", "70", "12.3"] in lines
    assert ["base", "-", "25", "2.5", "13.8", "-", "-", "-"] in lines
    assert "Earlier tasks end below their best." in result.stdout
    assert f"{tmp_path / 'run-seq'}: cl_matrix.json, report.html" in result.stdout
    assert "loraforge train-ilora demo/sequence.yaml --method joint" in result.stdout
    assert "another torch" in result.stderr and "another torch" not in result.stdout


def test_json_of_a_sequence(run: Run, sequences: list[dict[str, Any]], tmp_path: Path) -> None:
    assert only_object(run("demo", "--sequence", "-o", tmp_path / "demo", "--json", "--overwrite")) == SEQUENCE
    assert sequences[0]["overwrite"] is True and sequences[0]["quick"] is False


def test_a_sequence_has_a_folder_of_its_own(
    run: Run, sequences: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("demo", "--sequence").exit_code == 0
    assert sequences[0]["out"] == Path("loraforge-demo-sequence")


def test_a_sequence_of_full_models_is_refused(run: Run, sequences: list[dict[str, Any]], tmp_path: Path) -> None:
    result = run("demo", "--sequence", "--full", "-o", tmp_path / "demo")
    assert result.exit_code == 2 and "--full" in result.stderr and sequences == []
