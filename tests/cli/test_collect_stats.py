from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import loraforge

from .conftest import only_object

Run = Callable[..., Result]
FOUND: dict[str, Any] = {
    "out": "s.safetensors",
    "kind": "diag",
    "part": [1, 1],
    "samples": 12,
    "batches": 3,
    "modules": 4,
    "tokens": {"fewest": 7, "most": 90},
    "bytes": 2048,
    "skipped": {f"conv{i}": "Conv2d, 4 dimensions" for i in range(7)},
    "resumed_from": 0,
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []

    def collect(progress: Any = None, **given: Any) -> dict[str, Any]:
        seen.append(given)
        return FOUND | ({"part": [2, 4]} if "part" in given else {})

    def merge(parts: Any, out: Any, *, overwrite: bool) -> dict[str, Any]:
        seen.append((parts, out, overwrite))
        return {key: value for key, value in FOUND.items() if key != "skipped"}

    monkeypatch.setitem(vars(loraforge), "collect_stats", collect)
    monkeypatch.setitem(vars(loraforge), "merge_stats", merge)
    return seen


def test_options_reach_the_function_and_defaults_are_its_own(run: Run, asked: list[Any]) -> None:
    result = run("collect-stats", "--base", "m", "--data", "a.jsonl", "--data", "b.jsonl", "-o", "s.safetensors")
    assert result.exit_code == 0, result.output
    assert asked == [{"base": "m", "data": ["a.jsonl", "b.jsonl"], "out": "s.safetensors", "dtype": "float32"}]
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["diag", "whole", "4", "12", "3", "7..90", "2.0", "KiB"] in rows
    assert "no statistic of conv4: Conv2d" in result.stderr and "conv5" not in result.stderr
    assert "and 2 more without" in result.stderr


def test_every_option(run: Run, asked: list[Any]) -> None:
    result = run(
        "collect-stats", "--base", "m", "--data", "a", "--out", "s.safetensors", "--kind", "gram", "--targets", "q,k",
        "--samples", 9, "--max-length", 64, "--batch-tokens", 100, "--template", "{x}", "--part", "2/4", "--resume",
        "--overwrite", "--device", "cpu", "--seed", 0, "--base-dtype", "bfloat16", "-v",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert asked == [
        {
            "base": "m", "data": ["a"], "out": "s.safetensors", "kind": "gram", "targets": ["q,k"], "samples": 9,
            "max_length": 64, "batch_tokens": 100, "template": "{x}", "part": "2/4", "resume": True, "overwrite": True,
            "device": "cpu", "seed": 0, "dtype": "bfloat16",
        }
    ]  # fmt: skip
    assert "join the 4 parts: loraforge collect-stats --merge" in result.stdout and "conv6" in result.stderr


def test_merge_takes_the_parts(run: Run, asked: list[Any]) -> None:
    result = run("collect-stats", "--merge", "a", "b", "--out", "s.safetensors", "--json")
    assert asked == [(["a", "b"], "s.safetensors", False)] and only_object(result)["modules"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "m", "--data", "a"], "no output file"),
        (["--data", "a", "-o", "s"], "--base is missing"),
        (["--base", "m", "-o", "s"], "--data is missing"),
        (["a", "--base", "m", "--data", "a", "-o", "s"], "without a meaning"),
        (["--merge", "-o", "s"], "no part was named"),
        (["--merge", "a", "-o", "s", "--base", "m"], "collects nothing"),
    ],
)
def test_usage_errors(run: Run, asked: list[Any], arguments: list[str], message: str) -> None:
    result = run("collect-stats", *arguments)
    assert result.exit_code == 2 and message in result.stderr and not asked


def test_from_the_command_line_to_the_file(run: Run, tmp_path: Path) -> None:
    from tests.input_stats.models import write_base, write_data

    base, data, out = write_base(tmp_path / "m"), write_data(tmp_path / "d.safetensors"), tmp_path / "s.safetensors"
    result = run("collect-stats", "--base", base, "--data", data, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    assert only_object(result)["modules"] == 15 == len(loraforge.load_stats(out))
    assert run("collect-stats", "--base", base, "--data", data, "--out", out).exit_code == 3
