from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import loraforge
from loraforge.cli.app import app

REPORT: dict[str, Any] = {
    "method": "task-arithmetic",
    "params": {},
    "adapters": [{"path": "a", "sha256": "00", "modules": 2, "ranks": [4]}],
    "modules": 2,
    "rank_max": 8,
    "parameters": 256,
    "relative_error": 0.0,
    "kept_energy": 1.0,
    "seconds": 0.25,
    "phases": {"solve": 0.1},
    "peak_rss_bytes": 1 << 28,
    "device": "cpu",
    "kernels": "reference",
    "warnings": [],
    "layers": [
        {"module": "encoder.q", "rank": 8, "relative_error": 0.0, "kept_energy": 1.0, "norm": 2.0},
        {"module": "encoder.v", "rank": 8, "relative_error": 0.0, "kept_energy": 1.0, "norm": 3.0},
    ],
}
PLAN: dict[str, Any] = {
    "modules": [{"module": "encoder.q", "shape": [16, 8], "ranks": [4, 2], "rank_out": 4, "at_most": True}],
    "output_bytes": 512,
    "peak_bytes": 2048,
    "flops": 1.5e6,
    "steps": ["read the factors", "write the adapter"],
}


class FakeMerge:
    """Stands for `loraforge.merge`: keeps its arguments, reports progress, raises or writes what it is told."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.raises: BaseException | None = None
        self.report: dict[str, Any] = dict(REPORT)
        self.before: Callable[[], None] = lambda: None

    def __call__(self, *, progress: Any = None, **arguments: Any) -> FakeMerge:
        self.calls.append(arguments)
        self.before()
        if self.raises is not None:
            raise self.raises
        if progress is not None:
            progress("solve", "encoder.q", 1, 2)
        if arguments.get("dry_run"):
            self.report = {"plan": PLAN}
        elif arguments.get("out") is not None:
            arguments["out"].mkdir(parents=True, exist_ok=bool(arguments.get("overwrite")))
            (arguments["out"] / "adapter_config.json").write_text("{}", encoding="utf-8")
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        (only,) = self.calls
        return only


@pytest.fixture
def fake_merge(monkeypatch: pytest.MonkeyPatch) -> FakeMerge:
    fake = FakeMerge()
    # The name is resolved lazily; an item of the module's own dictionary comes before that.
    monkeypatch.setitem(vars(loraforge), "merge", fake)
    return fake


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("COLUMNS", "100")

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="loraforge")

    return invoke


def only_object(result: Result) -> dict[str, Any]:
    """The one JSON object on stdout; fails on anything beside it."""
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found
