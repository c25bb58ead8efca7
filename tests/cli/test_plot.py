from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from loraforge.measure.analysis.aggregate import aggregate
from loraforge.measure.analysis.compare import compare
from loraforge.report.heads_compare import ALT
from tests.cli.conftest import only_object
from tests.measure.head_files import write_measurements

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the least files, and a comparison of two, both without pictures."""
    place = tmp_path_factory.mktemp("plot")
    folders = []
    for method in ("FFT", "LoRA"):
        write_measurements(place / method, method, layers=2, heads=4, extras=False)
        aggregate(place / method, draws=20)
        folders.append(place / method)
    compare(folders, place / "compare", draws=20, report=False, names=["FFT", "LoRA"])
    return place


def test_a_run_is_drawn_into_another_folder(run: Run, measured: Path, tmp_path: Path) -> None:
    result = run("plot", measured / "FFT", "--out", tmp_path, "--format", "png,svg,html", "--json")
    assert result.exit_code == 0, result.stderr
    found = only_object(result)
    names = {Path(path).name for path in found["files"]}
    assert found["kind"] == "run" and names == {path.name for path in tmp_path.iterdir()}
    assert {"fig_I_vs_U.png", "fig_I_vs_U.svg", "fig_stats.png", "fig_heatmap_U.png", "report.html"} <= names
    assert "fig_I_vs_G.png" not in names, "G was not measured"
    assert (tmp_path / "fig_stats.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_comparison_prints_what_it_wrote(run: Run, measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Drawn elsewhere; here it is about the words.
    monkeypatch.setattr("loraforge.report.heads_compare.write_pictures", lambda *_: ([], dict.fromkeys(ALT, "")))
    result = run("plot", measured / "compare", "--format", "html")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [str(measured / "compare" / "report.html")]
    assert "FFT against LoRA" in (measured / "compare" / "report.html").read_text(encoding="utf-8")


def test_missing_files_are_named(run: Run, measured: Path, tmp_path: Path) -> None:
    (tmp_path / "heads.csv").write_bytes((measured / "FFT" / "heads.csv").read_bytes())
    result = run("plot", tmp_path)
    assert result.exit_code == 3
    for said in ("stats.json", "cases.json", "loraforge measure aggregate"):
        assert said in result.stderr


def test_a_folder_with_nothing_to_draw(run: Run, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        result = run("plot", folder)
        assert result.exit_code == 3 and "nothing to draw" in result.stderr and "seeds.json" in result.stderr


@pytest.mark.parametrize("formats", ["pdf", "png,gif", ","])
def test_unknown_formats_are_refused(run: Run, measured: Path, formats: str) -> None:
    result = run("plot", measured / "FFT", "--format", formats)
    assert result.exit_code == 2 and "png, svg, html" in result.stderr
