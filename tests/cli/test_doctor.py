from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import Result

from loraforge.kernels import backend

from .conftest import only_object

Run = Callable[..., Result]


def test_the_machine_and_every_kernel_are_told(run: Run) -> None:
    result = run("doctor", "-v")
    assert result.exit_code == 0, result.stdout + result.stderr
    for row in backend.self_test():
        (line,) = [line for line in result.stdout.splitlines() if line.lstrip().startswith(f"{row['op']} ")]
        assert line.endswith("ok")
    assert "python" in result.stdout and "torch" in result.stdout and "threads" in result.stdout


def test_json_has_the_same_numbers(run: Run) -> None:
    found = only_object(run("doctor", "--json"))
    assert found["ok"] is True
    assert {"python", "threads", "cuda_build", "gpus", "versions"} <= found["environment"].keys()
    assert {test["op"] for test in found["tests"]} == {test["op"] for test in backend.self_test()}
    assert all(test["max_error"] <= test["tolerance"] for test in found["tests"])


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_wrong_kernel_is_code_4(words: list[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [
        {"op": "gram_", "device": "cpu", "path": "native", "max_error": 0.5, "tolerance": 1e-6, "ok": False},
        {"op": "pick_rank", "device": "cpu", "path": "native", "max_error": 0.0, "tolerance": 0.0, "ok": True},
    ]
    monkeypatch.setattr(backend, "self_test", lambda: rows)
    result = run("doctor", *words)
    assert result.exit_code == 4 and "gram_" in result.stderr and "pick_rank" not in result.stderr
    if words:
        assert only_object(result)["ok"] is False
    else:
        assert "FAILED" in result.stdout
