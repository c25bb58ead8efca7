"""The report of an evaluation from numbers alone: what is marked, what is said, nothing from a network."""

from __future__ import annotations

import pytest

from loraforge.report.evaluation import evaluation_html, write_evaluation_report
from loraforge.report.evaluation_tables import differences_table, scores_table, shown_rows


def cell(value, half=0.05, **more):
    interval = None if value is None else [value - half, value + half]
    return {"value": value, "interval": interval, "n": 50, "metrics": {"accuracy": value}, "intervals": {}, **more}


def gap():
    return {"value": None, "reason": "its own head is of task 'b<c>', and no other was named"}


def line(name, kind, a, b, average=None, normalised=None):
    found = {"name": name, "kind": kind, "path": f"loras/{name}", "cells": {"a": a, "b<c>": b}}
    found |= {"average": average, "average_interval": average and [average - 0.1, average + 0.1]}
    return found | {"normalised": normalised, "normalised_interval": None}


@pytest.fixture
def record():
    task = {"kind": "classification", "metric": "accuracy", "title": "accuracy", "lower_is_better": False, "n": 50,
            "available": 60, "source": "rows.jsonl", "sha256": "0" * 64}  # fmt: skip
    return {
        "base": "models/base",
        "split": "test",
        "tasks": [{"id": "a", **task}, {"id": "b<c>", **task}],
        "rows": [
            line("base", "base", cell(0.3, head="the head of one"), cell(0.2), 0.25, 0.3),
            line("own adapters", "own", cell(0.9), cell(0.8), 0.85, 1.0),
            line("one", "adapter", cell(0.9), gap()),
            line("two", "adapter", gap(), cell(0.8)),
            line("good $x$ <merge>", "adapter", cell(0.7), cell(0.8), 0.75, 0.9),
            line("worse", "adapter", cell(0.6), cell(0.5), 0.55, 0.7),
        ],
        "own": {"a": "one", "b<c>": "two"},
        "differences": [
            {"row": "worse", "against": "base", "task": "a", "difference": 0.3, "interval": [0.1, 0.5]},
            {"row": "worse", "against": "base", "task": "average", "difference": 0.3, "interval": [-0.1, 0.7]},
        ],
        "settings": {"seed": 0},
        "versions": {"torch": "2"},
        "seconds": 1.5,
    }


def test_single_adapters_are_one_row_and_the_best_merge_is_marked(record):
    assert [row["name"] for row in shown_rows(record)] == ["base", "own adapters", "good $x$ <merge>", "worse"]
    table = scores_table(record)
    assert table.headers == ("row", "a, accuracy %", "b<c>, accuracy %", "average", "normalised")
    assert table.rows[2] == (
        "good $x$ <merge>",
        "70.0 (65.0 to 75.0)",
        "80.0 (75.0 to 85.0)",
        "75.0 (65.0 to 85.0)",
        "90.0",
    )
    assert table.best == {(2, 1), (2, 2), (2, 3), (2, 4)}
    assert scores_table(record, whole=False).rows[3][1] == "60.0 ±5.0"


def test_all_rows_are_shown_where_none_stands_for_the_single_ones(record):
    record["rows"] = [row for row in record["rows"] if row["kind"] != "own"]
    assert len(shown_rows(record)) == 5


def test_differences_say_whether_their_interval_leaves_0_out(record):
    rows = differences_table(record).rows
    assert rows[0] == ("worse", "a", "+30.0 (+10.0 to +50.0)", "yes")
    assert rows[1][3] == "no"


def test_the_page_tells_the_verdict_and_needs_no_network(record, tmp_path):
    html = write_evaluation_report(tmp_path / "report.html", record).read_text()
    assert "Best average over 2 tasks: good $x$ &lt;merge&gt;, 75.0 (65.0 to 85.0); each task" in html
    assert "s own adapter: 85.0 (75.0 to 95.0)." in html
    assert "http" not in html and "<script" not in html and "<merge>" not in html
    assert "base answers a with the head of one." in html
    assert html == evaluation_html(record)


def test_perplexities_have_a_picture_of_their_own_and_the_lowest_is_best(record):
    record["tasks"][1] |= {"metric": "perplexity", "title": "perplexity", "lower_is_better": True}
    for row in record["rows"]:
        row |= {"average": None, "average_interval": None}
        if row["cells"]["b<c>"]["value"] is not None:
            row["cells"]["b<c>"] = cell({"good $x$ <merge>": 7.5}.get(row["name"], 12.25), 0.5)
    table = scores_table(record)
    assert table.headers[2] == "b<c>, perplexity" and table.rows[2][2] == "7.5 (7 to 8)"
    assert (2, 2) in table.best and (3, 2) not in table.best
    assert evaluation_html(record).count("<svg") == 2


def test_one_task_needs_no_averages(record):
    record["tasks"] = record["tasks"][:1]
    for row in record["rows"]:
        del row["cells"]["b<c>"]
    assert scores_table(record).headers == ("row", "a, accuracy %")
    assert "Best accuracy on a: own adapters, 90.0" in evaluation_html(record)
