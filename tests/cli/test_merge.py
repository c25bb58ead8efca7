from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from loraforge.cli.merge import REPORTED

from .conftest import PLAN, REPORT, FakeMerge, only_object

Run = Callable[..., Result]


def test_people_read_a_row_the_place_and_how_to_load_it(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("merge", "a", "b", "-m", "linear", "-o", out)
    assert result.exit_code == 0 and result.stderr == ""
    header, _, row, *rest = result.stdout.splitlines()
    assert header.split() == ["method", "modules", "rank", "relative", "error", "kept", "energy", "seconds", "size"]
    assert row.split() == ["task-arithmetic", "2", "8", "0", "1", "0.25", "2", "B"]
    assert rest[0] == f"written to {out}"
    code = "\n".join(line.strip() for line in rest[-2:])
    assert code == f'from peft import PeftModel\nmodel = PeftModel.from_pretrained(base_model, "{out}")'


def test_json_is_one_object_with_the_pinned_keys(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    fake_merge.before = lambda: print("a library talks")
    fake_merge.report["kept_energy"] = float("nan")
    result = run("merge", "a", "b", "-m", "linear", "-o", tmp_path / "out", "--json")
    found = only_object(result)
    assert list(found) == ["out", *REPORTED]
    assert found["out"] == str(tmp_path / "out") and found["kept_energy"] is None
    assert found["adapters"] == REPORT["adapters"]
    assert "a library talks" in result.stderr


def test_quiet_prints_nothing(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    fake_merge.before = lambda: warnings.warn("odd", UserWarning, stacklevel=1)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run("merge", "a", "-m", "svd", "-o", tmp_path / "out", "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_warnings_are_lines_on_stderr(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    fake_merge.before = lambda: warnings.warn("rank 16 was clamped to 8", UserWarning, stacklevel=1)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run("merge", "a", "-m", "svd", "-o", tmp_path / "out")
    assert result.stderr == "warning: rank 16 was clamped to 8\n"


def test_warnings_of_the_report_are_shown_and_not_too_many(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    fake_merge.report["warnings"] = [f"layer.{i}: rank 16 clamped to 8" for i in range(12)]
    result = run("merge", "a", "-m", "svd", "-o", tmp_path / "out")
    assert "warning: layer.4: rank 16 clamped to 8\n" in result.stderr and "layer.5" not in result.stderr
    assert "7 more" in result.stderr
    verbose = run("merge", "a", "-m", "svd", "-o", tmp_path / "other", "-v")
    assert "warning: layer.11: rank 16 clamped to 8\n" in verbose.stderr


def test_the_error_is_told_by_module(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    worst = {"module": "encoder.k", "rank": 3, "relative_error": 0.25, "kept_energy": 0.9375, "norm": 2.0}
    fake_merge.report |= {"relative_error": 0.125, "layers": [*REPORT["layers"], worst]}
    brief = run("merge", "a", "-m", "svd", "-o", tmp_path / "out").stdout
    assert "0.25 in encoder.k" in brief and "encoder.q" not in brief
    verbose = run("merge", "a", "-m", "svd", "-o", tmp_path / "other", "-v").stdout
    rows = [line.split() for line in verbose.splitlines()]
    assert ["encoder.k", "3", "0.25", "0.9375", "2"] in rows and ["encoder.q", "8", "0", "1", "2"] in rows


def test_verbose_prints_what_is_being_solved(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    result = run("merge", "a", "-m", "svd", "-o", tmp_path / "out", "-v")
    assert "solve 1/2 encoder.q" in result.stderr


def test_a_terminal_gets_bars_that_say_what_is_being_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    from loraforge.cli._output import Output

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    written: list[str] = []
    monkeypatch.setattr(sys.stderr, "write", lambda text: written.append(text) or len(text), raising=False)
    with Output().progress() as progress:
        assert progress is not None
        progress("solve", "encoder.[q]", 1, 2)
        progress("solve", "encoder.v", 2, 2)
    drawn = "".join(written)
    assert "solve" in drawn and "encoder.v" in drawn and "2/2" in drawn


def test_without_a_terminal_there_is_no_progress() -> None:
    from loraforge.cli._output import Output

    with Output().progress() as progress:
        assert progress is None


@pytest.mark.parametrize("where", [[], ["-o", "out"]])
def test_a_dry_run_prints_the_plan_and_writes_nothing(
    where: list[str], run: Run, fake_merge: FakeMerge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["merge", "a", "b", "-m", "svd", "--dry-run", *where]
    plain, as_json = run(*words), run(*words, "--json")
    assert plain.exit_code == as_json.exit_code == 0
    assert ["encoder.q", "16", "x", "8", "4", "+", "2", "<=", "4"] in [
        line.split() for line in plain.stdout.splitlines()
    ]
    assert "peak 2.0 KiB, output 512 B" in plain.stdout
    assert "write the adapter" in plain.stdout and "nothing was written" in plain.stdout
    found = only_object(as_json)
    assert found["dry_run"] is True and found["plan"] == PLAN
    assert list(tmp_path.iterdir()) == []


def test_a_long_plan_is_cut_unless_verbose(run: Run, fake_merge: FakeMerge, monkeypatch: pytest.MonkeyPatch) -> None:
    row = PLAN["modules"][0]
    monkeypatch.setitem(PLAN, "modules", [{**row, "module": f"layer.{i}"} for i in range(30)])
    words = ["merge", "a", "-m", "svd", "--dry-run"]
    assert "layer.29" not in run(*words).stdout and "10 more modules" in run(*words).stdout
    assert "layer.29" in run(*words, "-v").stdout


def test_an_existing_output_is_refused_before_any_work(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x", encoding="utf-8")
    refused = run("merge", "a", "-m", "svd", "-o", out)
    assert refused.exit_code == 3 and str(out) in refused.stderr and "--overwrite" in refused.stderr
    assert fake_merge.calls == [] and [p.name for p in out.iterdir()] == ["precious"]
    (out / "precious").rename(out / "run.json")  # now it is the output of an earlier run
    assert run("merge", "a", "-m", "svd", "-o", out, "--overwrite").exit_code == 0


def test_an_existing_report_is_refused_before_any_work(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    report = tmp_path / "r.html"
    report.write_text("x", encoding="utf-8")
    result = run("merge", "a", "-m", "svd", "-o", tmp_path / "out", "--report", report)
    assert result.exit_code == 3 and str(report) in result.stderr and fake_merge.calls == []


def test_odd_names_are_printed_as_they_are(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    out = tmp_path / "[red]out[/red] :smile:"
    result = run("merge", "a", "-m", "svd", "-o", out)
    assert f"written to {out}\n" in result.stdout
