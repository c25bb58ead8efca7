from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from loraforge.training import single
from tests.cli.conftest import only_object

Run = Callable[..., Result]
RECORD: dict[str, Any] = {
    "out": "o", "method": "lora", "best": None, "steps": 3, "epochs": 1.0, "seconds": 0.5,
    "metrics": {"test": {"n": 9, "metrics": {"accuracy": 0.5}, "intervals": {"accuracy": (0.25, 0.75)}}},
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def train(**arguments: Any) -> dict[str, Any]:
        found.append(arguments)
        return RECORD | {"out": arguments["out"]}

    monkeypatch.setattr(single, "train_lora", train)
    monkeypatch.setattr(single, "train_full", train)
    return found


def test_flags_become_arguments(run: Run, calls: list[dict[str, Any]]) -> None:
    result = run(
        "train-lora", "--base", "b", "--train", "d/mood.train.jsonl", "--test", "t.csv", "--labels", "bad,good",
        "--text", "words", "--max-length", 32, "--out", "o", "--r", 4, "--alpha", 4, "--targets", "query,value",
        "--rank-pattern", r"layer\.0=2,x=3", "--alpha-pattern", "x=0.5", "--dora", "--epochs", 2, "--lr", 0.01,
        "--batch-size", 4, "--accumulate", 2, "--bf16", "--set", "warmup_steps=5", "--seed", 3, "--snapshots", "0,5",
        "--early-stopping", 2, "--resume", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (call,) = calls
    assert call.pop("progress") is None
    assert call == {
        "base": "b", "out": "o", "seed": 3, "device": "cpu", "resume": True, "early_stopping": 2, "snapshots": [0, 5],
        "task": {"id": "mood", "train": "d/mood.train.jsonl", "test": "t.csv", "labels": ["bad", "good"],
                 "text": "words", "max_length": 32},
        "train": {"num_train_epochs": 2.0, "learning_rate": 0.01, "per_device_train_batch_size": 4,
                  "gradient_accumulation_steps": 2, "bf16": True, "warmup_steps": "5"},
        "lora": {"r": 4, "alpha": 4.0, "targets": "query,value", "rank_pattern": {r"layer\.0": 2, "x": 3},
                 "alpha_pattern": {"x": 0.5}, "dora": True},
    }  # fmt: skip
    assert "accuracy" in result.stdout and "0.250 to 0.750" in result.stdout and "written to o" in result.stdout


def test_a_task_file_stands_alone_or_is_changed_by_flags(run: Run, calls: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_text("id: mood\ntrain: rows.jsonl\ntext: words\n", encoding="utf-8")
    for flags in ((), ("--text", "other", "--eval", "e.jsonl")):
        assert run("train-full", "--base", "b", "--task", file, "--out", "o", *flags).exit_code == 0
    assert calls[0]["task"] == str(file)
    spec = calls[1]["task"]
    assert (spec.train, spec.eval, spec.text) == (str(tmp_path / "rows.jsonl"), "e.jsonl", "other")


def test_pattern_files_are_read(run: Run, calls: list[dict[str, Any]], tmp_path: Path) -> None:
    ranks, targets = tmp_path / "ranks.json", tmp_path / "targets.yaml"
    ranks.write_text(json.dumps({"query": 2}), encoding="utf-8")
    targets.write_text("[query, value]", encoding="utf-8")
    result = run("train-lora", "--base", "b", "--train", "t.jsonl", "--out", "o", "--rank-pattern", ranks,
                 "--targets", targets, "--json")  # fmt: skip
    assert calls[0]["lora"] == {"rank_pattern": {"query": 2}, "targets": ["query", "value"]}
    assert only_object(result)["steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--train", "t", "--out", "o"), "--base is missing"),
        (("--base", "b", "--train", "t"), "--out is missing"),
        (("--base", "b", "--out", "o"), "no task was named"),
        (("--base", "b", "--train", "t", "--out", "o", "--set", "warmup_steps"), "--set takes a key and a value"),
        (("--base", "b", "--train", "t", "--out", "o", "--set", "max_steps=1", "--max-steps", 2), "name the same"),
        (("--base", "b", "--train", "t", "--out", "o", "--set", "a=1", "--set", "a=2"), "given twice"),
        (("--base", "b", "--train", "t", "--out", "o", "--snapshots", "often"), "--snapshots"),
        (("--base", "b", "--train", "t", "--out", "o", "--rank-pattern", "query"), "--rank-pattern"),
    ],
)
def test_usage_errors(run: Run, calls: list[dict[str, Any]], arguments: tuple[object, ...], expected: str) -> None:
    result = run("train-lora", *arguments)
    assert result.exit_code == 2 and expected in result.stderr
    assert calls == []


def test_only_the_first_rank_speaks(run: Run, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    result = run("train-lora", "--base", "b", "--train", "t", "--out", "o", "--json")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert len(calls) == 1


def test_bad_input_is_exit_code_3(run: Run, tmp_path: Path) -> None:
    result = run("train-lora", "--base", tmp_path / "no", "--train", "t.jsonl", "--out", tmp_path / "o", "--json")
    assert result.exit_code == 3
    assert only_object(result)["error"]["where"] == str(tmp_path / "no")
