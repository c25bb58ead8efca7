"""`loraforge measure run`, and what `loraforge run` prints of a comparison: options, numbers, exit codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from loraforge import pipelines
from loraforge.errors import CheckFailed, LoraforgeError
from loraforge.measure import run as measuring
from loraforge.measure.settings import MeasureSettings
from tests.cli.conftest import only_object

Run = Callable[..., Result]
CASES = {"observed": 7, "expected": 4.5, "range95": [2, 8], "ratio": 1.6, "p": 0.2}
NULL = {"rho95": 0.163, "overlap_expected": 0.139, "cases_expected": {"important_but_static": CASES}}
FOUND: dict[str, Any] = {
    "out": "runs/a", "method": "LoRA", "task": "rte", "seed": 1, "rank": 8, "profile": "default", "n_heads": 144,
    "stats": {"spearman_rho_Ipre_U": 0.21, "topk_overlap_Ipre_U": 0.35, "n_important_but_static": 7,
              "n_plastic_but_unimportant": 3, "spearman_rho_Ipost_U": None, "null": NULL},
    "steps": [{"name": "importance_pre", "state": "skipped", "seconds": 0.01}],
    "warnings": ["the head has random weights"],
    "paths": {"numbers": "runs/a/stats.json", "report": "runs/a/report.html"},
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def measure_run(run_dir: str, *, progress: Any, **options: Any) -> dict[str, Any]:
        seen.append({"run_dir": run_dir, **options})
        return FOUND

    monkeypatch.setattr(measuring, "measure_run", measure_run)
    return seen


def test_people_read_numbers_beside_chance(run: Run, calls: list[dict[str, Any]]) -> None:
    result = run("measure", "run", "runs/a")
    assert result.exit_code == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert "LoRA, r 8 on rte, seed 1: 144 heads".split() in lines
    assert ["rho(I_pre,", "U)", "0.210", "within", "±0.16"] in lines
    assert ["rho(I_post,", "U)", "-", "within", "±0.16"] in lines
    assert ["top-K", "overlap", "of", "I_pre", "and", "U", "0.350", "0.14"] in lines
    assert ["important", "but", "static", "7", "4.5", "(2", "to", "8)"] in lines
    assert ["plastic", "but", "unimportant", "3", "-"] in lines
    assert ["report", "runs/a/report.html"] in lines
    assert "random weights" in result.stderr and "importance_pre" not in result.stdout
    assert "importance_pre" in run("measure", "run", "runs/a", "-v").stdout


def test_without_options_the_settings_are_the_defaults(run: Run, calls: list[dict[str, Any]]) -> None:
    assert run("measure", "run", "runs/a").exit_code == 0
    (call,) = calls
    assert call.pop("run_dir") == "runs/a" and call.pop("command") == "loraforge measure run runs/a"
    assert call.pop("overwrite") is False
    assert {call.pop(key) for key in ("out", "base", "final", "task", "data", "seed")} == {None}
    assert MeasureSettings.read(call) == MeasureSettings()


def test_options_reach_the_measurement(run: Run, calls: list[dict[str, Any]]) -> None:
    options = [
        "-o", "there", "--base", "b", "--final", "f", "--task", "t.yaml", "--data", "rows.csv", "--split", "eval",
        "--subset", "64:3", "--batch-size", 8, "--profile", "seed", "--method", "screen", "--objective", "kl",
        "--ablate", "mean", "--unit", "q", "--exact-top", 5, "--tokens-per-pass", 99, "--probe-steps", 7,
        "--spectrum", "--no-plots", "--topk", 9, "--hi", 80, "--lo", 20, "--dtype", "bfloat16", "--device", "cpu",
        "--seed", 4, "--overwrite",
    ]  # fmt: skip
    assert run("measure", "run", "runs/a", *options).exit_code == 0
    (call,) = calls
    places = {"run_dir": "runs/a", "out": "there", "base": "b", "final": "f", "task": "t.yaml", "data": "rows.csv"}
    assert {key: call.pop(key) for key in places} == places
    assert (call.pop("seed"), call.pop("overwrite")) == (4, True)
    command = call.pop("command")
    assert command.startswith("loraforge measure run runs/a ") and "--subset 64:3" in command
    assert "--no-plots" in command and "--spectrum" in command and "--overwrite" not in command
    assert MeasureSettings.read(call) == MeasureSettings(
        profile="document", split="eval", subset=64, subset_seed=3, batch_size=8, method="screen", objective="kl",
        ablate="mean", exact_top=5, tokens_per_pass=99, probe_steps=7, spectrum=True, plots=False, topk=9, hi=80,
        lo=20, dtype="bfloat16", device="cpu",
    )  # fmt: skip


def test_all_rows_and_json(run: Run, calls: list[dict[str, Any]]) -> None:
    assert only_object(run("measure", "run", "runs/a", "--subset", "all", "--json")) == FOUND
    assert calls[0]["subset"] is None


@pytest.mark.parametrize("subset", ["many", "5:x", "-3"])
def test_a_bad_subset_is_a_usage_error(run: Run, calls: list[dict[str, Any]], subset: str) -> None:
    result = run("measure", "run", "runs/a", f"--subset={subset}")
    assert result.exit_code == 2 and "--subset takes a number of rows" in result.stderr and calls == []


@pytest.mark.parametrize(("error", "code"), [(LoraforgeError("no heads"), 3), (CheckFailed("loss is nan"), 4)])
def test_errors_keep_their_codes(run: Run, monkeypatch: pytest.MonkeyPatch, error: LoraforgeError, code: int) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(measuring, "measure_run", refused)
    result = run("measure", "run", "runs/a")
    assert result.exit_code == code and error.what in result.stderr


def test_an_interruption_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "measure_run", interrupted)
    result = run("measure", "run", "runs/a")
    assert result.exit_code == 130 and "the same command goes on" in result.stderr


def test_the_real_function_refuses_what_is_no_run(run: Run, tmp_path: Path) -> None:
    result = run("measure", "run", tmp_path)
    assert result.exit_code == 3 and "ckpt_final" in result.stderr


def test_a_comparison_is_printed_as_a_table(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["spearman_rho_Ipre_U", "spearman_rho_Ipost_U", "topk_overlap_Ipre_U", "n_important_but_static",
            "n_plastic_but_unimportant"]  # fmt: skip
    row = {"task": "rte", "method": "FFT", "metric": "accuracy", "score": 0.75, "score_sd": 0.01,
           "statistics": {key: {"mean": 0.5, "sd": 0.125, "n": 2} for key in keys}, "null": NULL}  # fmt: skip
    found = {"name": "FFT_VS_LORA", "comparison": [row], "seeds": [1, 2], "warnings": ["a warning"], "seconds": 3.0,
             "stages": [{"name": "summary", "state": "done", "seconds": 1.0}], "missing": [],
             "paths": {"summary": "out/summary/report.html"}}  # fmt: skip
    monkeypatch.setattr(pipelines, "run_pipeline", lambda *_, **__: found)
    result = run("run", "FFT_VS_LORA", "-v")
    assert result.exit_code == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["rte", "FFT", "0.750", "±0.010", *["0.500", "±0.125"] * 5] in lines
    assert "rho within ±0.16, overlap 0.14, 4.5 heads of each kind" in result.stdout
    assert ["summary", "done", "1"] in lines and ["summary", "out/summary/report.html"] in lines
    assert "means over the seeds 1, 2" in result.stdout and "a warning" in result.stderr
    assert only_object(run("run", "FFT_VS_LORA", "--json")) == found
