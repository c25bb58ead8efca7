"""Tables and picture of a result."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from loraforge.bench.tables import all_rows, comparison_page, heading, pages, skipped_lines
from loraforge.bench.verdicts import compare
from loraforge.report.bench_charts import bench_chart, save_bench_picture

from .stored import stored_result


def test_operators_are_a_line_a_case_with_speed_ups() -> None:
    page = pages(stored_result())[0]
    cells = dict(zip(page.headers, page.rows[0], strict=True))
    assert cells["operator and size"] == "pick_rank 2 x R=3" and cells["cpu ms"] == 2.0
    assert cells["x reference"] == pytest.approx(2.0) and cells["x torch"] == pytest.approx(1.5)
    assert cells["roofline %"] == 25.0 and cells["GB/s"] == 5.0 and cells["error"] == 1e-7
    lacking = dict(zip(page.headers, page.rows[1], strict=True))
    assert lacking["cpu ms"] is None and lacking["x reference"] is None and lacking["torch ms"] is None


def test_merges_iteris_and_scale_have_their_own_columns() -> None:
    _, merge, iteris, scale, exponents = pages(stored_result())
    assert merge.headers == ["method", "loraforge ms", "peft ms", "x peft", "error"]
    assert merge.rows == [["svd, rank 4", 1.0, 50.0, pytest.approx(50.0), 1e-7]] and "2 x 8x8, r=4" in merge.title
    assert iteris.rows[1] == ["sweep", 1.0, 0.05, 4.0, 0.5, 0.3, 1e-7] and "BERT 1 x 8" in iteris.title
    assert scale.rows == [["width", 8, 1.0, 1.0, 10.0, 10.0], ["width", 16, 2.0, 2.0, None, None]]
    assert exponents.rows == [["width", "loraforge", 2, 1.0, None, 0.5, 0.1]]


def test_what_was_not_measured_is_a_line_a_reason() -> None:
    assert skipped_lines(stored_result()) == ["not measured: cpu of 3 cases (first: case 0): not built"]


def test_the_heading_names_machine_commit_date_threads_and_ceilings() -> None:
    text = "\n".join(heading(stored_result()))
    for word in (
        "a processor, 2 cores",
        "1 thread,",
        "torch 2",
        "none",
        "2026-01-02",
        "processor time",
        "copy 10 GB/s",
    ):
        assert word in text
    assert "ceilings" not in "\n".join(heading(stored_result(ceilings=None)))


def test_every_row_and_the_comparison_are_tables() -> None:
    result = stored_result()
    assert len(all_rows(result).rows) == len(result["rows"])
    page = comparison_page({"file": "old.json"} | compare(result, result))
    assert {row[-1] for row in page.rows} == {"same"} and {row[5] for row in page.rows} == {1.0}


def test_the_picture_has_a_panel_a_group(tmp_path: Path) -> None:
    with bench_chart(stored_result()) as drawn:
        titles = [axes.get_title(loc="left") for axes in drawn.axes]
        bars = {text.get_text() for text in drawn.axes[1].texts}
        lines = [line.get_label() for line in drawn.axes[3].lines]
    assert len(titles) == 4 and all(titles)
    assert bars == {"50x"} and lines == ["width (1.00)", "width, dense torch"]
    picture = save_bench_picture(tmp_path / "bench.png", stored_result())
    with Image.open(picture) as image:
        assert image.width > 1000 and image.height > 800


@pytest.mark.parametrize("groups", [["scale"], ["kernels"]])
def test_a_picture_of_less(groups: list[str], tmp_path: Path) -> None:
    result = stored_result(groups=groups)
    result["rows"] = [row for row in result["rows"] if row["form"] != "cpu"]
    assert save_bench_picture(tmp_path / "bench.png", result).stat().st_size > 1000
