"""Charts: they draw, as PNG and as inline SVG, and hold the numbers that they were given."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from loraforge.report import charts
from loraforge.report.plots import COLOURS, INK, save_png, svg


def test_accuracy_bars_have_the_heights_of_the_rows(results: dict[str, Any]) -> None:
    merges = [row for row in results["rows"] if row["kind"] == "merge"]
    with charts.accuracy_chart(results) as figure:
        (axes,) = figure.axes
        heights = [[bar.get_height() for bar in group] for group in axes.containers]
        labels = axes.get_legend_handles_labels()[1]
    assert heights == [[row["mean"], *row["accuracies"]] for row in merges]
    assert set(labels) == {"base, no adapter", "the task's own adapter", *(row["name"] for row in merges)}


def test_bars_of_a_group_do_not_overlap_the_next_group(results: dict[str, Any]) -> None:
    with charts.accuracy_chart(results) as figure:
        bars = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in figure.axes[0].patches)
    assert all(right <= left for (_, right), (left, _) in zip(bars, bars[1:], strict=False))


@pytest.mark.parametrize("name", ["residual_chart", "sample_size_chart", "spectra_chart", "iterations_chart"])
def test_charts_of_a_merge_are_inline_svg(report: dict[str, Any], name: str) -> None:
    text = svg(partial(getattr(charts, name), report), "a <label> & more")
    assert text.startswith('<svg role="img" aria-label="a &lt;label&gt; &amp; more"') and text.endswith("</svg>")
    assert "currentColor" in text and INK not in text and "xmlns" not in text and "mathdefault" not in text
    assert not re.search(r"https?:", text)


def test_picture_is_a_deterministic_png_wide_enough_for_a_readme(tmp_path: Path, results: dict[str, Any]) -> None:
    first, second = (save_png(lambda: charts.accuracy_chart(results, "t"), tmp_path / f"{i}.png") for i in "ab")
    data = first.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data == second.read_bytes()
    assert int.from_bytes(data[16:20], "big") >= 1600


def test_dollar_signs_in_names_are_no_formula(report: dict[str, Any]) -> None:
    report["iteris"]["layers"][0]["module"] = "a$\\frac{$b"
    assert "a$\\frac{$b" in svg(partial(charts.residual_chart, report), "x")


def test_colours_are_distinct() -> None:
    assert len(set(COLOURS)) == len(COLOURS) >= 8


def test_wide_range_of_residuals_is_logarithmic(report: dict[str, Any]) -> None:
    report["iteris"]["layers"][0]["residual_after"] = 1e-6
    with charts.residual_chart(report) as figure:
        assert figure.axes[0].get_xscale() == "log"
    report["iteris"]["layers"][0]["residual_after"] = 0.0
    with charts.residual_chart(report) as figure:
        assert figure.axes[0].get_xscale() == "linear"
