"""`loraforge measure spectrum` from the shell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tests.measure.update_cases import CASES, write_adapter, write_base

from .conftest import only_object

Run = Callable[..., Result]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    write_base(tmp_path / "base", CASES["mha"])
    write_adapter(tmp_path / "adapter", CASES["mha"])
    return {name: str(tmp_path / name) for name in ("base", "adapter", "out")}


def test_with_the_base(run: Run, places: dict[str, str]) -> None:
    options = ("--base", places["base"], "--adapter", places["adapter"], "-k", "5", "--eps", "0.8")
    result = run("measure", "spectrum", *options, "--out", places["out"])
    assert result.exit_code == 0, result.output
    assert "intruders of 5" in result.stdout and "q_proj" in result.stdout and "amplification" in result.stdout
    line = json.loads((Path(places["out"]) / "spectrum.jsonl").read_text().splitlines()[0])
    assert {"k1", "k5", "k10", "k20"} == set(line["n_intruder"]) and "0.8" in line["n_intruder"]["k5"]
    assert list(line)[:8] == [
        "module", "rank", "sv", "stable_rank", "eff_rank", "rank90", "rank99", "rank_use",
    ]  # fmt: skip
    assert len((Path(places["out"]) / "spectrum_heads.jsonl").read_text().splitlines()) == 2 * 4 * 4


def test_an_adapter_alone(run: Run, places: dict[str, str]) -> None:
    options = ("measure", "spectrum", "--adapter", places["adapter"], "--heads", "4")
    found = only_object(run(*options, "--no-per-head", "--json"))
    assert len(found["lines"]) == 8 and found["heads"] == [] and "n_intruder" not in found["lines"][0]
    human = run(*options)
    assert human.exit_code == 0 and "rank use" in human.stdout and "--base" in human.stderr


@pytest.mark.parametrize(
    ("options", "word"),
    [([], "--adapter"), (["--adapter", "a", "--eps", "1.5"], "--eps"), (["--adapter", "a", "-k", "0"], "-k")],
    ids=["none", "eps", "k"],
)
def test_what_is_refused(options: list[str], word: str, run: Run) -> None:
    result = run("measure", "spectrum", *options)
    assert result.exit_code == 2 and word in result.stderr
