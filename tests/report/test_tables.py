"""Tables as plain data."""

from __future__ import annotations

from typing import Any

import pytest

from loraforge.report.tables import (
    accuracy_table,
    adapters_table,
    calibration_table,
    cost_table,
    format_bytes,
    format_cell,
    iterations_table,
    kernels_table,
    layers_table,
)


def test_accuracy_table_marks_the_best_merge_of_each_column(results: dict[str, Any]) -> None:
    table = accuracy_table(results)
    assert table.headers == ("model", *results["tasks"], "mean")
    assert [row[0] for row in table.rows[:3]] == ["base", "separate adapters", "iteris-plus"]
    # Row 2 leads everywhere in the sample; base and separate adapters never compete.
    assert table.best == {(2, column) for column in range(1, 10)}


def test_ties_are_all_marked(results: dict[str, Any]) -> None:
    results["rows"][4]["accuracies"][0] = results["rows"][2]["accuracies"][0]
    assert {cell for cell in accuracy_table(results).best if cell[1] == 1} == {(2, 1), (4, 1)}


def test_missing_accuracy_is_a_dash_and_never_best(results: dict[str, Any]) -> None:
    results["rows"][2]["accuracies"][0] = None
    table = accuracy_table(results)
    assert table.rows[2][1] is None and (2, 1) not in table.best and (3, 1) in table.best


def test_cost_table_has_merges_only(results: dict[str, Any]) -> None:
    rows = cost_table(results).rows
    assert [row[0] for row in rows] == [row["name"] for row in results["rows"][2:]]
    assert rows[0][1:4] == (3.25, "337.6 KiB", 32)


def test_layers_table_shows_only_what_was_reported(report: dict[str, Any], plain_report: dict[str, Any]) -> None:
    assert layers_table(plain_report).headers == ("module", "rank", "norm", "kept energy", "relative error")
    full = layers_table(report)
    assert "ρ" in full.headers and len(full.rows) == 12
    # A list over the tasks becomes its span; equal numbers become one.
    assert full.rows[0][full.headers.index("λ")] == "0.5 to 1.2"
    assert full.rows[0][full.headers.index("tokens")] == "2000"


def test_adapters_and_iterations(report: dict[str, Any]) -> None:
    assert adapters_table(report).rows[1] == ("adapters/mirrored", "01" * 8, 12, [4], 1.0)
    assert iterations_table(report).rows[0] == (1, 0.01, 0.1)
    assert iterations_table({}).rows == ()
    assert calibration_table(report).rows[2] == ("inverted", "inverted.safetensors", "ab" * 8, 256, 400)
    assert kernels_table(report["kernels"]).rows == (("gram_", "blocks", 144),)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.123456, "0.1235"),
        (12345.6, "12346"),
        (3, "3"),
        (True, "True"),
        ([4, 8], "4, 8"),
    ],
)
def test_cells(value: object, text: str) -> None:
    assert format_cell(value) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**40, "5.0 TiB")])
def test_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text
