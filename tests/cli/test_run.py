from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from loraforge import pipelines
from loraforge.errors import UsageError

from .conftest import only_object

Run = Callable[..., Result]
FOUND: dict[str, Any] = {
    "name": "GLUE_t5",
    "out": "runs/GLUE_t5",
    "tasks": [{"id": "mnli", "metric": "exact_match", "n": 10}, {"id": "cola", "metric": "mcc", "n": 10}],
    "rows": [
        {"name": "base", "kind": "base", "scores": [0.5, -0.125], "mean": 0.1875, "normalised": None, "bytes": None},
        {"name": "own adapters", "kind": "own", "scores": [0.9, 0.5], "mean": 0.7, "normalised": 1.0, "bytes": None},
        {"name": "mnli", "kind": "adapter", "scores": [0.9, None], "mean": None, "normalised": None, "bytes": 1},
        {"name": "svd", "kind": "merge", "scores": [0.8, 0.25], "mean": 0.525, "normalised": 0.7, "bytes": 2048},
    ],
    "stages": [{"name": "train:mnli", "state": "skipped", "seconds": 12.345}],
    "seconds": 12.0,
    "missing": [],
    "paths": {"result": "run/merged/svd", "numbers": "run/results.json", "report": "run/report.html"},
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def run_pipeline(source: str, *, tell: Any, progress: Any, **options: Any) -> dict[str, Any]:
        seen.append({"source": source, **options})
        tell("told")
        return FOUND

    monkeypatch.setattr(pipelines, "run_pipeline", run_pipeline)
    return seen


def test_people_read_scores_and_places(run: Run, calls: list[dict[str, Any]]) -> None:
    result = run("run", "GLUE_t5")
    assert result.exit_code == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["model", "mnli", "(exact_match)", "cola", "(mcc)", "mean", "normalised", "size"] in lines
    assert ["base", "0.500", "-0.125", "0.188", "–", "–"] in lines
    assert ["svd", "0.800", "0.250", "0.525", "0.700", "2.0", "KiB"] in lines
    # The whole table of every adapter is in the report.
    assert not [line for line in lines if line[:1] == ["mnli"]]
    assert ["result", "run/merged/svd"] in lines and ["report", "run/report.html"] in lines
    assert "told" in result.stderr and "told" not in result.stdout
    assert "train:mnli" in run("run", "GLUE_t5", "-v").stdout


def test_options_reach_the_pipeline(run: Run, calls: list[dict[str, Any]]) -> None:
    result = run(
        "run", "mine.yaml", "-o", "there", "--data", "rows", "--base", "b", "--seed", 3, "--device", "cpu",
        "--set", "train.max_steps=5", "--set", "tasks.a.train=x.csv", "--set", "train.bf16=true",
        "--adapter", "a=loras/a", "--from", "merge", "--download", "--overwrite", "--dry-run",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    settings = {
        "base": "b",
        "device": "cpu",
        "seed": 3,
        "train.max_steps": 5,
        "tasks.a.train": "x.csv",
        "train.bf16": True,
    }
    assert calls == [
        {"source": "mine.yaml", "out": "there", "data": "rows", "settings": settings, "adapters": {"a": "loras/a"},
         "start": "merge", "only": None, "fetch_missing": True, "overwrite": True, "dry_run": True}
    ]  # fmt: skip


def test_json_is_what_the_pipeline_returns(run: Run, calls: list[dict[str, Any]]) -> None:
    assert only_object(run("run", "GLUE_t5", "--json")) == FOUND


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "train.max_steps"], "KEY=VALUE"),
        (["--set", "=3"], "KEY=VALUE"),
        (["--set", "seed=1", "--seed", 2], "given twice"),
        (["--set", "a=[1"], "not YAML"),
        (["--adapter", "loras/a"], "TASK=DIR"),
    ],
)
def test_bad_options_are_usage_errors(
    run: Run, calls: list[dict[str, Any]], arguments: list[object], message: str
) -> None:
    result = run("run", "GLUE_t5", *arguments)
    assert result.exit_code == 2 and message in result.stderr and calls == []


def test_an_interruption_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipelines, "run_pipeline", interrupted)
    result = run("run", "GLUE_t5")
    assert result.exit_code == 130 and "the same command goes on" in result.stderr


def test_errors_of_the_pipeline_keep_their_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise UsageError("unknown stage 'mrge'")

    monkeypatch.setattr(pipelines, "run_pipeline", refused)
    assert run("run", "GLUE_t5").exit_code == 2


def test_a_dry_run_of_a_preset_names_what_is_missing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real function: nothing is there, nothing is fetched, nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    result = run("run", "GLUE_t5", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "google/flan-t5-base" in result.stdout and "hf://nyu-mll/glue#mnli:validation_matched" in result.stdout
    assert "train:mnli" in result.stdout and "'loraforge download GLUE_t5' fetches" in result.stdout
    assert list(tmp_path.iterdir()) == []
    refused = run("run", "GLUE_t5")
    assert refused.exit_code == 3 and "loraforge download GLUE_t5" in refused.stderr
    assert run("run", "document").exit_code == 3 and run("run", "GLUE_t6").exit_code == 2
