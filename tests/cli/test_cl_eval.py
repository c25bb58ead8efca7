from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]
STATE = {
    "format": 1,
    "sequence": {
        "base_model": "nowhere", "output_dir": "run", "method": "seq",
        "tasks": [{"id": "a", "train": "a.jsonl", "test": "a.jsonl"}],
    },
    "depends": {"method": "seq", "tasks": []},
    "tasks": [{"id": "a", "state": "pending"}],
}  # fmt: skip


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run that has trained nothing yet."""
    (tmp_path / "sequence.json").write_text(json.dumps(STATE), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("command", ["cl-eval", "cl-report"])
def test_a_folder_that_is_no_run(run: Run, tmp_path: Path, command: str) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        result = run(command, folder)
        assert result.exit_code == 3 and "no training sequence" in result.stderr and str(folder) in result.stderr


def test_a_run_without_scores_has_no_report(run: Run, begun: Path) -> None:
    result = run("cl-report", begun)
    assert result.exit_code == 3 and "no scores yet" in result.stderr and f"cl-eval {begun}" in result.stderr


def test_own_scores_come_from_a_run_of_single_tasks(run: Run, begun: Path) -> None:
    result = run("cl-eval", begun, "--single", begun)
    assert result.exit_code == 3 and "no tasks trained alone" in result.stderr and "method seq" in result.stderr


def test_a_base_that_is_gone(run: Run, begun: Path) -> None:
    result = run("cl-eval", begun, "--device", "cpu")
    assert result.exit_code == 3 and "the base model is not on this machine" in result.stderr
