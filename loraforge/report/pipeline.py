"""The HTML report of a pipeline: what base, own adapters and merges reach on every task, and how it was done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraforge.report.charts import accuracy_chart
from loraforge.report.page import code, page, section, table, text, write_page
from loraforge.report.plots import svg
from loraforge.report.tables import Table, format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Any]


def pipeline_report_html(results: Results) -> str:
    """A pipeline's results as a self-contained HTML page.

    Args:
        results: {name, description, base, seed, tasks: [{id, metric, lower_is_better, n}], rows: [{name, kind (base,
            adapter, own, merge), scores, intervals, mean, normalised, seconds, bytes, rank, method}], stages: [{name,
            state, seconds}], inputs ("adapters" or "models"), versions, command}.
    """
    parts = [
        f"<h1>{text(str(results['name']))[3:-4]}</h1>",
        text(str(results.get("description") or "Train, merge and measure"), "lead"),
        text(verdict(results)),
        _chart(results),
        table(score_table(results)),
        text("Intervals are of 95 %, over the rows of the test set. 'Normalised' is the mean of score / score of the "
             "task's own. The best merge of each column is marked.", "note"),
        '<p class="note"><a href="evaluation/report.html">All metrics, and differences with their intervals</a></p>',
        section("Cost of the merges", table(merge_table(results))),
        section("Every adapter on every task", table(cross_table(results))) if _crossed(results) else "",
        section("Stages", table(stage_table(results))),
        section("How to reproduce it", code(str(results.get("command", ""))), text(_setting(results))),
    ]  # fmt: skip
    return page(f"{results['name']}: train, merge, measure", parts)


def write_pipeline_report(path: Path, results: Results) -> Path:
    """Writes `pipeline_report_html` to a file that appears whole or not at all."""
    return write_page(path, pipeline_report_html(results))


def verdict(results: Results) -> str:
    """One or two sentences: the best merge beside base and own adapters."""
    kind = str(results.get("inputs", "adapters"))
    told = []
    merges = [row for row in _rows(results, "merge") if row["mean"] is not None]
    if merges:
        lower = all(task.get("lower_is_better") for task in results["tasks"])
        best = (min if lower else max)(merges, key=lambda row: row["mean"])
        told.append(f"Of {len(merges)} merges, {best['name']} has the best mean: {_score(best['mean'])}.")
    for name, words in (("own", f"The {kind}, each on its own task"), ("base", "The base alone")):
        told += [f"{words}: {_score(row['mean'])}." for row in _rows(results, name) if row["mean"] is not None]
    return " ".join(told) or "Nothing could be measured."


def score_table(results: Results) -> Table:
    """Score and interval by model and task: base, own adapters, merges."""
    rows = [row for kind in ("base", "own", "merge") for row in _rows(results, kind)]
    headers = ("model", *(f"{task['id']} ({task['metric']})" for task in results["tasks"]), "mean", "normalised")
    cells = tuple(
        (row["name"], *map(_measured, row["scores"], row["intervals"]), _score(row["mean"]), _score(row["normalised"]))
        for row in rows
    )
    values = [[*row["scores"], row["mean"], row["normalised"]] for row in rows]
    merges = [i for i, row in enumerate(rows) if row["kind"] == "merge"]
    lower = [bool(task.get("lower_is_better")) for task in results["tasks"]]
    # A mean is one of shares, or one of perplexities; shares of the own score are always better when higher.
    signs = [-1 if each else 1 for each in (*lower, bool(lower) and all(lower), False)]
    best = {(i, column + 1) for column, sign in enumerate(signs) for i in _best(values, merges, column, sign)}
    return Table(headers, cells, frozenset(best))


def cross_table(results: Results) -> Table:
    """What every adapter reaches on every task."""
    headers = ("trained on", *(str(task["id"]) for task in results["tasks"]))
    cells = tuple((row["name"], *map(_score, row["scores"])) for row in _rows(results, "adapter"))
    return Table(headers, cells, caption="A dash: the task needs a head that this one does not have.")


def merge_table(results: Results) -> Table:
    """Method, largest rank, size and time of every merge."""
    rows = tuple(
        (row["name"], row.get("method"), row.get("rank"), _size(row.get("bytes")), _seconds(row.get("seconds")))
        for row in _rows(results, "merge")
    )
    return Table(("merge", "method", "largest rank", "size", "seconds"), rows)


def stage_table(results: Results) -> Table:
    """Stages with their state and time."""
    rows = tuple((stage["name"], stage["state"], _seconds(stage.get("seconds"))) for stage in results["stages"])
    return Table(("stage", "state", "seconds"), rows)


def _rows(results: Results, kind: str) -> list[Mapping[str, Any]]:
    return [row for row in results["rows"] if row["kind"] == kind]


def _chart(results: Results) -> str:
    """Bars by task, where all scores share the scale from 0 to 1."""
    rows = [row for kind in ("base", "own", "merge") for row in _rows(results, kind)]
    scores = [score for row in rows for score in [*row["scores"], row["mean"]]]
    if not _rows(results, "merge") or not all(score is not None and 0 <= score <= 1 for score in scores):
        return ""
    kinds = {"own": "adapter"}
    drawn = {
        "tasks": [task["id"] for task in results["tasks"]],
        "inputs": results.get("inputs", "adapters"),
        "rows": [
            {"name": row["name"], "kind": kinds.get(row["kind"], row["kind"]), "mean": 100 * row["mean"],
             "accuracies": [100 * score for score in row["scores"]]}
            for row in rows
        ],
    }  # fmt: skip
    return svg(partial(_score_chart, drawn), "score by task and merge")


@contextmanager
def _score_chart(drawn: Mapping[str, Any]) -> Iterator[Figure]:
    """The chart of accuracies for whatever metrics the tasks have."""
    with accuracy_chart(drawn) as figure:
        figure.axes[0].set_ylabel("score x 100")
        yield figure


def _crossed(results: Results) -> bool:
    """Whether some adapter was measured on another task than its own."""
    return any(sum(score is not None for score in row["scores"]) > 1 for row in _rows(results, "adapter"))


def _best(values: Sequence[Sequence[float | None]], rows: Sequence[int], column: int, sign: int) -> list[int]:
    """The rows with the largest (sign 1) or least (sign -1) value of a column."""
    known = [(sign * value, i) for i in rows if (value := values[i][column]) is not None]
    top = max((value for value, _ in known), default=None)
    return [i for value, i in known if value == top]


def _measured(score: float | None, interval: Sequence[float] | None) -> str:
    if interval is None or score is None:
        return _score(score)
    return f"{_score(score)} [{_score(interval[0])}, {_score(interval[1])}]"


def _score(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def _size(count: object) -> str | None:
    return format_bytes(count) if isinstance(count, int | float) else None


def _seconds(value: object) -> str | None:
    return f"{value:.1f}" if isinstance(value, int | float) else None


def _setting(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (results.get("versions") or {}).items())
    return f"Base {results.get('base')}, seed {results.get('seed')}" + (f", {versions}." if versions else ".")
