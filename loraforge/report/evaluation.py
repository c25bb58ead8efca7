"""The report of an evaluation: one table of rows x tasks with intervals, a picture of it, differences, how it ran."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraforge.report.evaluation_tables import (
    Record,
    average_texts,
    differences_table,
    score_text,
    scores_table,
    shown_rows,
    tasks_table,
)
from loraforge.report.page import code, facts, fold, page, points, section, table, text, write_page
from loraforge.report.plots import COLOURS, GRID, figure, svg
from loraforge.report.tables import Table, format_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*"
_ABOUT = (
    "In parentheses: 95 % intervals, Wilson's for shares of right answers, the percentile bootstrap over the rows of "
    "data for all others. They tell how much the choice of test rows matters, not how much training seeds do."
)


def evaluation_html(record: Record) -> str:
    """The record of `loraforge eval` as a self-contained HTML page.

    Args:
        record: base, split, tasks, rows, own, differences, settings, versions, seconds.
    """
    shares = [task for task in record["tasks"] if not task["lower_is_better"]]
    others = [task for task in record["tasks"] if task["lower_is_better"]]
    drawn = [(tasks, what) for tasks, what in ((shares, "percent"), (others, "perplexity")) if tasks]
    return page(
        "loraforge eval",
        [
            "<h1>Evaluation</h1>",
            text(_verdict(record), "lead"),
            facts(_facts(record)),
            *(
                svg(partial(scores_chart, record, tasks, what), f"scores by task and row, {what}")
                for tasks, what in drawn
            ),
            table(scores_table(record)),
            text(_ABOUT, "note"),
            text(_about_averages(record), "note"),
            _differences(record),
            _further_metrics(record),
            section("Heads", points(_heads(record))) if _heads(record) else "",
            _gaps(record),
            section("The data", table(tasks_table(record))),
            section("How it ran", *_how(record)),
        ],
    )


def write_evaluation_report(path: Path, record: Record) -> Path:
    """Writes `evaluation_html` to a file that appears whole or not at all."""
    return write_page(Path(path), evaluation_html(record))


@contextmanager
def scores_chart(record: Record, tasks: Sequence[Mapping[str, Any]], what: str) -> Iterator[Figure]:
    """Scores as points with their intervals: a group a task, a colour and a marker a row; the mean comes first."""
    rows = shown_rows(record)
    mean = what == "percent" and len(tasks) == len(record["tasks"]) > 1
    groups = [*(["average"] if mean else []), *(task["id"] for task in tasks)]
    step = 0.8 / len(rows)
    with figure(1.3 + len(groups) * max(0.5, 0.2 * len(rows))) as (drawn, axes):
        for i, row in enumerate(rows):
            for place, group in enumerate(groups):
                found = (row["average"], row["average_interval"]) if group == "average" and mean else None
                value, interval = found or (row["cells"][group]["value"], row["cells"][group].get("interval"))
                if value is not None:
                    _point(axes, value, interval, place - 0.4 + (i + 0.5) * step, i, 100 if what == "percent" else 1)
        axes.set_yticks(range(len(groups)), groups)
        axes.set_ylim(len(groups) - 0.45, -0.55)
        for place in range(1, len(groups)):
            axes.axhline(place - 0.5, color=GRID, linewidth=0.8)
        axes.set_xlabel(f"score, {what}" if what == "percent" else f"{what} (lower is better)")
        axes.grid(axis="x")
        handles = [
            axes.plot([], [], _MARKERS[i % len(_MARKERS)], color=COLOURS[i % len(COLOURS)], label=row["name"])[0]
            for i, row in enumerate(rows)
        ]
        drawn.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.6)
        yield drawn


def _point(axes: Axes, value: float, interval: Sequence[float] | None, place: float, i: int, factor: float) -> None:
    colour = COLOURS[i % len(COLOURS)]
    if interval is not None:
        axes.hlines(place, factor * interval[0], factor * interval[1], colors=colour, linewidth=2)
    axes.plot([factor * value], [place], _MARKERS[i % len(_MARKERS)], color=colour, markersize=6.5)


def _verdict(record: Record) -> str:
    known = [row for row in record["rows"] if row["average"] is not None and row["kind"] != "own"]
    if len(record["tasks"]) == 1 or not known:
        task = record["tasks"][0]
        known = [row for row in record["rows"] if row["cells"][task["id"]]["value"] is not None]
        key = (lambda row: -row["cells"][task["id"]]["value"]) if task["lower_is_better"] else (
            lambda row: row["cells"][task["id"]]["value"])  # fmt: skip
        best = max(known, key=key)
        return f"Best {task['title']} on {task['id']}: {best['name']}, {score_text(best['cells'][task['id']], task)}."
    lower = record["tasks"][0]["lower_is_better"]
    best = (min if lower else max)(known, key=lambda row: row["average"])
    told = f"Best average over {len(record['tasks'])} tasks: {best['name']}, {average_texts(best, record['tasks'])[0]}"
    own = next((row for row in record["rows"] if row["kind"] == "own" and row["average"] is not None), None)
    if own is not None:  # several models, therefore no rival of one
        told += f"; each task's own adapter: {average_texts(own, record['tasks'])[0]}"
    return f"{told}."


def _facts(record: Record) -> dict[str, object]:
    rows = [row for row in record["rows"] if row["kind"] != "own"]
    data = sum(task.get("n") or 0 for task in record["tasks"])
    found: dict[str, object] = {"rows": len(rows), "tasks": len(record["tasks"]), f"{record['split']} rows": data}
    return found | {"seconds": record["seconds"]} if "seconds" in record else found


def _about_averages(record: Record) -> str:
    own = ", ".join(f"{name} on {task}" for task, name in record["own"].items())
    told = "Normalised: the mean of the shares of what each task's own adapter reaches"
    if len(record["tasks"]) < 2:
        return ""
    return f"{told} ({own})." if own else f"{told}; no row of this table is a task's own adapter."


def _differences(record: Record) -> str:
    if not record["differences"]:
        return ""
    against = record["differences"][0]["against"]
    told = (
        f"Each row minus '{against}', in points, over the same rows of data; the intervals are paired, so they are "
        "usually narrower than those of two separate scores. With many comparisons some leave out 0 by chance."
    )
    return section(f"Differences to {against}", text(told), table(differences_table(record)))


def _further_metrics(record: Record) -> str:
    """All metrics where more than the main one was asked for."""
    rows = [
        (row["name"], task, name, value, cell["intervals"].get(name), cell.get("reasons", {}).get(name))
        for row in record["rows"]
        for task, cell in row["cells"].items()
        for name, value in cell.get("metrics", {}).items()
        if len(cell["metrics"]) > 1 or value is None
    ]
    if not rows:
        return ""
    headers = ("row", "task", "metric", "value", "95 % interval", "why not")
    return section("All metrics", fold(f"{len(rows)} values", table(Table(headers, tuple(rows)))))


def _heads(record: Record) -> list[str]:
    """Where a head came from that is not the row's own."""
    return [
        f"{row['name']} answers {task} with {cell['head']}."
        for row in record["rows"]
        if row["kind"] != "own"
        for task, cell in row["cells"].items()
        if cell.get("head") not in (None, "own")
    ]


def _gaps(record: Record) -> str:
    """Why cells are empty."""
    told = [
        f"{row['name']} on {task}: {cell['reason']}"
        for row in shown_rows(record)
        for task, cell in row["cells"].items()
        if cell["value"] is None and row["kind"] != "own"
    ]
    return section("Empty cells", points(told)) if told else ""


def _how(record: Record) -> list[str]:
    settings = [f"{key} = {format_cell(value)}" for key, value in (record.get("settings") or {}).items()]
    versions = ", ".join(f"{name} {number}" for name, number in (record.get("versions") or {}).items())
    paths = [f"{row['name']}: {row['path']}" for row in record["rows"] if row.get("path")]
    return [text(f"Base: {record['base']}. {versions}."), code("\n".join([*settings, *paths]))]
