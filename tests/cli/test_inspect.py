from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import loraforge

from .conftest import only_object

Run = Callable[..., Result]


def module(name: str, rank: int, scaling: float) -> dict[str, Any]:
    spectrum = [2.0, 1.0][:rank]
    known = {"module": name, "shape": [16, 8], "kind": "linear", "rank": rank, "scaling": scaling, "dtype": "float32"}
    known |= {"norm": 2.236068, "spectrum": spectrum, "effective_rank": 1.89, "stable_rank": 1.25}
    return known | {"rank_90": 2, "rank_99": 2}


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
        "kinds": {"linear": len(modules)},
        "notes": ["no alpha in the file"] if name == "b" else [],
        "heads": [],
        "norm": 3.25,
        "effective_rank": 1.89,
        "stable_rank": 1.25,
        "rank_90": 2.0,
        "rank_99": 2.5,
        "modules": modules,
    }


FOUND: dict[str, Any] = {
    "adapters": [
        adapter("[a]", [module("encoder.q", 2, 0.5), module("encoder.v", 1, 2.0)]),
        adapter("b", [module("encoder.q", 2, 1.0)]),
    ],
    "coverage": {
        "modules": 2,
        "shared_by_all": 1,
        "kinds": {"linear": 2},
        "missing": {"[a]": [], "b": ["encoder.v"]},
    },
    "cosine": [[1.0, -0.125], [-0.125, 1.0]],
    "sign_conflict": [[0.0, 0.5625], [0.5625, 0.0]],
    "overlap_out": [[1.0, 0.25], [0.25, 1.0]],
    "overlap_in": [[1.0, 0.375], [0.375, 1.0]],
    "cosine_modules": {"encoder.q": [[1.0, -0.125], [-0.125, 1.0]], "encoder.v": [[1.0, None], [None, None]]},
    "conflict_modules": {
        name: {key: [[1.0, 0.25], [0.25, 1.0]] for key in ("sign_conflict", "overlap_out", "overlap_in")}
        for name in ("encoder.q", "encoder.v")
    },
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []

    def inspect(paths: Any, device: str) -> dict[str, Any]:
        assert device == "auto"
        seen.append(paths)
        missing = dict(list(FOUND["coverage"]["missing"].items())[: len(paths)])
        coverage = FOUND["coverage"] | {"missing": missing}
        return {**FOUND, "adapters": FOUND["adapters"][: len(paths)], "coverage": coverage}

    monkeypatch.setitem(vars(loraforge), "inspect", inspect)
    return seen


def test_a_row_an_adapter_and_the_cosines(run: Run, asked: list[Any]) -> None:
    result = run("inspect", "loras/a", "loras/b")
    assert result.exit_code == 0 and asked == [["loras/a", "loras/b"]]
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["[a]", "peft", "tiny", "-", "2", "1..2", "0.5..2", "float32", "3.25", "96", "2.0", "KiB", "1.89", "2",
            "2.5"] in rows  # fmt: skip
    assert ["b", "peft", "tiny", "-", "1", "2", "1", "float32", "3.25", "96", "2.0", "KiB", "1.89", "2", "2.5"] in rows
    assert ["[a]", "1", "-0.125"] in rows and ["b", "-0.125", "1"] in rows
    assert ["[a]", "-", "0.5625"] in rows and ["b", "0.25", "-"] in rows and ["[a]", "-", "0.375"] in rows
    assert "2 modules (2 linear), 1 in all adapters" in result.stdout.splitlines()
    assert "b lacks 1: encoder.v" in result.stdout.splitlines() and "b: no alpha in the file" in result.stderr
    assert "encoder.q" not in result.stdout
    assert "Cosine between the deltas" in result.stdout.splitlines(), "a title is one line"


def test_verbose_has_a_row_a_module(run: Run, asked: list[Any]) -> None:
    rows = [line.split() for line in run("inspect", "loras/a", "-v").stdout.splitlines()]
    assert ["encoder.v", "linear", "16", "x", "8", "1", "2", "2.236", "2", "1.89", "1.25", "2", "2"] in rows


def test_one_adapter_has_no_cosines(run: Run, asked: list[Any]) -> None:
    printed = run("inspect", "loras/a").stdout
    assert "osine" not in printed and "onflict" not in printed and "all adapters" not in printed


def test_json_has_the_same_numbers(run: Run, asked: list[Any]) -> None:
    assert only_object(run("inspect", "loras/a", "loras/b", "--json")) == FOUND


def test_picture_and_report(run: Run, asked: list[Any], tmp_path: Path) -> None:
    picture, report = tmp_path / "sub" / "p.PNG", tmp_path / "r.html"
    result = run("inspect", "a", "b", "--picture", picture, "--report", report)
    assert result.exit_code == 0, result.stderr
    assert picture.read_bytes()[:4] == b"\x89PNG" and "<svg" in report.read_text(encoding="utf-8")
    assert f"written to {picture}" in result.stdout.splitlines()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["p.PNG", "r.html", "sub"]
    again = run("inspect", "a", "b", "--picture", picture)
    assert again.exit_code == 3 and "exists" in again.stderr and len(asked) == 1
    assert run("inspect", "a", "--picture", picture, "--report", report, "--overwrite").exit_code == 0


def test_a_picture_of_another_kind_is_a_usage_error(run: Run, asked: list[Any], tmp_path: Path) -> None:
    assert run("inspect", "a", "--picture", tmp_path / "p.jpg").exit_code == 2 and not asked
