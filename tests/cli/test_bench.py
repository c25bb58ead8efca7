from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

import loraforge.bench.run as bench_run
from loraforge.bench.cases import Case, Work
from loraforge.bench.verdicts import compare, load_result
from loraforge.cli._output import Output
from loraforge.cli.bench import print_result
from tests.bench.stored import stored_result

from .conftest import only_object
from .test_startup import HEAVY, loaded

Run = Callable[..., Result]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands for `run_bench`: keeps what it was asked for, gives a result by hand."""
    calls: list[dict[str, Any]] = []

    def fake(groups: Any = (), *, compare_with: str | None = None, **options: Any) -> dict[str, Any]:
        calls.append({"groups": list(groups), "compare_with": compare_with, **options})
        result = stored_result()
        if compare_with is not None:
            result["comparison"] = {"file": compare_with, **compare(result, load_result(Path(compare_with)))}
        return result

    monkeypatch.setattr(bench_run, "run_bench", fake)
    return calls


def test_the_options_reach_the_run(run: Run, measured: list[dict[str, Any]]) -> None:
    result = run("bench", "scale", "merge", "--full", "--device", "cpu", "--threads", 2, "--runs", 4)
    assert result.exit_code == 0, result.stderr
    (call,) = measured
    call.pop("progress")
    assert call == {
        "groups": ["scale", "merge"], "size": "full", "device": "cpu", "threads": 2, "runs": 4, "compare_with": None,
    }  # fmt: skip
    run("bench")
    assert measured[1]["groups"] == [] and measured[1]["size"] == "default" and measured[1]["device"] == "auto"


def test_tables_go_to_stdout_and_reasons_to_stderr(run: Run, measured: list[dict[str, Any]]) -> None:
    result = run("bench")
    for word in ("a processor, 2 cores", "Operators: compiled (cpu)", "x torch", "Merges in memory", "x document",
                 "Exponents", "11 timings"):  # fmt: skip
        assert word in result.stdout
    assert "not measured: cpu of 3 cases" in result.stderr and "not measured" not in result.stdout
    assert "All timings" not in result.stdout and "All timings" in run("bench", "-v").stdout
    quiet = run("bench", "--quiet")
    assert quiet.stdout == "" and quiet.stderr == "" and quiet.exit_code == 0


@pytest.mark.parametrize(("columns", "lacking"), [(160, ()), (100, ("GB/s", "roofline %")), (80, ("GB/s", "error"))])
def test_a_narrow_terminal_leaves_columns_out_and_cuts_no_number(
    monkeypatch: pytest.MonkeyPatch, columns: int, lacking: tuple[str, ...]
) -> None:
    long = "an_operator_of_a_long_name 24 x S=1,024 R=32"
    row = {"group": "kernels", "case": long, "seconds": 1.2345e-3, "gb_per_s": 0.1234, "gflop_per_s": 12.34}
    row |= {"roofline": 0.1234, "error": 1.234e-12}
    result = stored_result(groups=["kernels"], rows=[row | {"form": form} for form in ("reference", "torch", "cpu")])
    page = io.StringIO()
    monkeypatch.setattr(page, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", page)
    monkeypatch.setenv("COLUMNS", str(columns))
    print_result(Output(), result)
    text = re.sub(r"\x1b\[[0-9;]*m", "", page.getvalue())
    table = next(part for part in text.split("\n\n") if "Operators" in part).splitlines()
    assert max(len(line.rstrip()) for line in table[1:4]) <= columns
    assert all(header not in table[1] for header in lacking) and ("no room" in text) == bool(lacking)
    assert table[3].startswith(long) and table[3].split()[-1] == ("1.23e-12" if columns == 160 else "1")


def test_json_out_and_plot(run: Run, measured: list[dict[str, Any]], tmp_path: Path) -> None:
    out, plot = tmp_path / "sub" / "bench.json", tmp_path / "bench.png"
    result = run("bench", "--json", "--out", out, "--plot", plot)
    found = only_object(result)
    assert found == json.loads(out.read_text(encoding="utf-8")) and len(found["rows"]) == 11
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.png", "sub"]  # no draft is left
    again = run("bench", "--out", out)
    assert again.exit_code == 3 and str(out) in again.stderr and len(measured) == 1
    assert run("bench", "--out", out, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("words", "code", "word"),
    [
        (["kernel"], 2, "did you mean 'kernels'"),
        (["speed"], 2, "unknown group"),
        (["--fail-over", "1.2"], 2, "--compare"),
        (["--compare", "nowhere.json", "--fail-over", "0.5"], 2, "--fail-over is a factor"),
        (["--compare", "nowhere.json"], 3, "nowhere.json"),
        (["--out", "bench.txt"], 2, ".json"),
        (["--plot", "bench.svg"], 2, ".png"),
        (["--runs", "0"], 2, "--runs"),
        (["--threads", "0"], 2, "--threads"),
        (["--colour"], 2, "--colour"),
    ],
)
def test_what_cannot_be_done(run: Run, measured: list[dict[str, Any]], words: list[str], code: int, word: str) -> None:
    result = run("bench", *words)
    assert result.exit_code == code and word in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_comparison_is_shown_and_may_fail(run: Run, measured: list[dict[str, Any]], tmp_path: Path) -> None:
    old = stored_result()
    for row in old["rows"]:
        row["seconds"] /= 1.5 if row["form"] == "cpu" else 1.0
    old["machine"]["threads"] = 8
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old), encoding="utf-8")
    shown = run("bench", "--compare", path)
    assert shown.exit_code == 0 and "slower" in shown.stdout and "same" in shown.stdout
    assert "other threads: stored 8, now 1" in shown.stderr
    assert run("bench", "--compare", path, "--fail-over", "1.6").exit_code == 0
    failed = run("bench", "--compare", path, "--fail-over", "1.4", "--json")
    assert failed.exit_code == 4 and "pick_rank 2 x R=3 cpu takes 1.50 times" in failed.stderr
    slower = [row for row in only_object(failed)["comparison"]["rows"] if row["verdict"] == "slower"]
    assert [row["form"] for row in slower] == ["cpu"]
    kept = run("bench", "--compare", path, "--out", path, "--overwrite")
    assert kept.exit_code == 3 and json.loads(path.read_text(encoding="utf-8")) == old  # an input is never replaced


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_planted_wrong_result_is_code_4(run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    x = torch.ones(16)

    def build(device: torch.device) -> Work:
        return Work({"reference": lambda: x * 2.0, "torch": lambda: x * 2.1}, lambda: [x.double() * 2.0], 1e-6)

    monkeypatch.setattr(
        "loraforge.bench.operators.kernel_cases", lambda size, device: [Case("wrong_op", "n=16", {"n": 16}, build)]
    )
    result = run("bench", "kernels", "--size", "tiny", "--runs", 1, *words)
    assert result.exit_code == 4
    assert "kernels wrong_op n=16, form torch: error 0.05, allowed 1e-06" in result.stderr
    if words:
        (failure,) = only_object(result)["failures"]
        assert failure["case"] == "wrong_op n=16" and failure["form"] == "torch"
    else:
        assert "wrong_op n=16" in result.stdout


def test_a_wrong_objective_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = {"group": "iteris", "case": "BERT", "form": "iteris-plus", "error": None, "allowed": None}
    monkeypatch.setattr(bench_run, "run_bench", lambda *a, **k: stored_result(failures=[failure]))
    result = run("bench")
    assert result.exit_code == 4 and "iteris BERT, form iteris-plus: the objective is wrong" in result.stderr


def test_the_hidden_size_is_hidden_and_help_loads_no_torch(run: Run) -> None:
    assert loaded(["bench", "--help"]).isdisjoint((*HEAVY, "rich", "pydantic"))
    text = run("bench", "--help").stdout
    assert "--size" not in text
    for word in ("kernels", "merge", "iteris", "scale", "--full", "--compare", "--fail-over", "--plot", "--threads"):
        assert word in text
