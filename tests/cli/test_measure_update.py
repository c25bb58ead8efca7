"""`loraforge measure update` from the shell: what it prints, writes and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from tests.measure.update_cases import CASES, write_adapter, write_base

from .conftest import only_object

Run = Callable[..., Result]
CASE = CASES["gqa"]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    write_base(tmp_path / "base", CASE)
    write_base(tmp_path / "final", CASE, seed=1)
    write_adapter(tmp_path / "adapter", CASE)
    return {name: str(tmp_path / name) for name in ("base", "final", "adapter", "out", "norms.json")}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_help_is_quick_and_names_the_ways(run: Run) -> None:
    text = run("measure", "update", "--help").output
    assert all(option in text for option in ("--adapter", "--final", "--heads", "--kv-share", "--snapshots", "--bias"))


def test_an_adapter_with_its_base(run: Run, places: dict[str, str]) -> None:
    result = run("measure", "update", "--base", places["base"], "--adapter", places["adapter"], "--out", places["out"])
    assert result.exit_code == 0, result.output
    assert "Urel" in result.stdout and "OV" in result.stdout and "norm of the update of all heads" in result.stdout
    out = Path(places["out"])
    lines = rows(out / "update.jsonl")
    assert [(line["layer"], line["head"]) for line in lines] == [(i, h) for i in range(2) for h in range(4)]
    assert list(lines[0]) == [
        "layer", "head", "U", "Urel", "Uq", "Uk", "Uv", "Uo", "nq", "nk", "nv", "no", "Urel_l2", "kv_head", "source",
        "stack", "kind", "OV", "QK",
    ]  # fmt: skip
    assert json.loads((out / "update.meta.json").read_text())["norm"] == "document"
    again = run("measure", "update", "--base", places["base"], "--adapter", places["adapter"], "--out", places["out"])
    assert again.exit_code == 3 and "--overwrite" in again.stderr


def test_an_adapter_alone(run: Run, places: dict[str, str]) -> None:
    refused = run("measure", "update", "--adapter", places["adapter"])
    assert refused.exit_code == 3
    assert all(option in refused.stderr for option in ("--base", "--config", "--heads"))
    result = run("measure", "update", "--adapter", places["adapter"], "--heads", "4", "--kv-heads", "2", "--json")
    found = only_object(result)
    assert len(found["lines"]) == 8 and found["lines"][0]["Urel"] is None and found["files"] == []
    human = run("measure", "update", "--adapter", places["adapter"], "--config", places["base"] + "/config.json", "-v")
    assert human.exit_code == 0 and "8 of 8 heads" in human.stdout and "--base" in human.stderr


def test_two_models_with_every_option(run: Run, places: dict[str, str]) -> None:
    result = run(
        "measure", "update", "--base", places["base"], "--final", places["final"], "--scope", "all", "--bias",
        "--no-kv-share", "--no-circuits", "--norm", "l2", "--cache", places["norms.json"], "--spectrum",
        "--out", places["out"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert Path(places["norms.json"]).is_file() and "Urel_l2" in result.stdout
    names = {path.name for path in Path(places["out"]).iterdir()}
    assert names == {
        "update.jsonl", "update.meta.json", "spectrum.jsonl", "spectrum.meta.json", "spectrum_heads.jsonl",
    }  # fmt: skip
    line = rows(Path(places["out"]) / "update.jsonl")[0]
    assert line["Ubq"] == 0.0 and line["OV"] is None and line["source"] == "dense"


def test_the_documents_columns(run: Run, places: dict[str, str]) -> None:
    arguments = ("--base", places["base"], "--final", places["final"], "--profile", "seed", "--out")
    result = run("measure", "update", *arguments, places["out"] + "/u.jsonl")
    assert result.exit_code == 0, result.output
    line = rows(Path(places["out"]) / "u.jsonl")[0]
    assert list(line) == ["layer", "head", "U", "Urel", "Uq", "Uk", "Uv", "Uo"]


def test_snapshots(run: Run, places: dict[str, str], tmp_path: Path) -> None:
    for step in (2, 8):
        write_adapter(tmp_path / "snapshots" / f"step-{step}", CASE, seed=step)
    arguments = ("measure", "update", "--snapshots", str(tmp_path / "snapshots"), "--base", places["base"])
    result = run(*arguments, "--out", places["out"])
    assert result.exit_code == 0, result.output
    assert "net/path" in result.stdout and "steps 0 to 8" in result.stdout
    assert json.loads((Path(places["out"]) / "path.json").read_text())["steps"] == [0, 2, 8]
    assert len(rows(Path(places["out"]) / "path.jsonl")) == 8


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        ([], 2, "--adapter"),
        (["--adapter", "a", "--final", "b"], 2, "--adapter and --final"),
        (["--final", "b"], 2, "--base"),
        (["--adapter", "nowhere"], 3, "nowhere"),
        (["--adapter", "a", "--heads", "0"], 2, "--heads"),
    ],
    ids=["none", "two", "no-base", "not-there", "no-heads"],
)
def test_what_is_refused(options: list[str], code: int, word: str, run: Run) -> None:
    result = run("measure", "update", *options)
    assert result.exit_code == code and word in result.stderr
