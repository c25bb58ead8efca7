"""The tables of an evaluation as plain data, with scores as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraforge.report.tables import Table

Record = Mapping[str, Any]


def shown_rows(record: Record) -> list[Mapping[str, Any]]:
    """The rows without those adapters that are scored on their own task alone, where one row shows all of these."""
    rows = record["rows"]
    if not any(row["kind"] == "own" for row in rows):
        return list(rows)
    own = record["own"]
    return [row for row in rows if row["kind"] == "own" or set(_scored_tasks(row)) - _tasks_of(row["name"], own)]


def scores_table(record: Record, *, whole: bool = True) -> Table:
    """Scores with intervals: a row a model, a column a task, averages; the best merged (or only) rows are marked.

    Args:
        record: The evaluation.
        whole: Intervals from and to; else their larger half after a plus-minus sign, for narrow places.
    """
    tasks = record["tasks"]
    several = len(tasks) > 1
    headers = (
        "row",
        *(f"{task['id']}, {_unit(task)}" for task in tasks),
        *(("average", "normalised") if several else ()),
    )
    rows = tuple(
        (
            row["name"],
            *(score_text(row["cells"][task["id"]], task, whole=whole) for task in tasks),
            *(average_texts(row, tasks, whole) if several else ()),
        )
        for row in shown_rows(record)
    )
    return Table(headers, rows, _best(record), "")


def differences_table(record: Record) -> Table:
    """Differences to the row of comparison, in points, with paired intervals."""
    units = {task["id"]: task for task in record["tasks"]}
    units["average"] = record["tasks"][0]
    rows = tuple(
        (found["row"], found["task"], _with_interval(found["difference"], found["interval"], units[found["task"]], "+"),
         _clear(found["interval"]))
        for found in record["differences"]
    )  # fmt: skip
    return Table(("row", "task", "difference", "interval without 0"), rows)


def tasks_table(record: Record) -> Table:
    """What was scored: rows used and there, metric, source and its digest."""
    rows = tuple(
        (task["id"], task["kind"], task["title"], task.get("n"), task.get("available"), task.get("source"),
         str(task.get("sha256") or "")[:12])
        for task in record["tasks"]
    )  # fmt: skip
    return Table(("task", "kind", "metric", "rows", "available", "source", "sha256 (start)"), rows)


def score_text(cell: Mapping[str, Any], task: Mapping[str, Any], *, whole: bool = True) -> str | None:
    """A score with its interval as text; None where there is no score."""
    return None if cell["value"] is None else _with_interval(cell["value"], cell.get("interval"), task, whole=whole)


def average_texts(
    row: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]], whole: bool = True
) -> tuple[str | None, str | None]:
    """Average and normalised average of a row as text; None where there is none."""
    average, normalised = (
        None if row[key] is None else _with_interval(row[key], row[f"{key}_interval"], task, whole=whole)
        for key, task in (("average", tasks[0]), ("normalised", {"lower_is_better": False}))
    )
    return average, normalised


def _scored_tasks(row: Mapping[str, Any]) -> list[str]:
    return [task for task, cell in row["cells"].items() if cell["value"] is not None]


def _tasks_of(name: str, own: Mapping[str, str]) -> set[str]:
    return {task for task, owner in own.items() if owner == name}


def _with_interval(
    value: float, interval: Sequence[float] | None, task: Mapping[str, Any], sign: str = "", *, whole: bool = True
) -> str:
    form = f"{sign}.4g" if task["lower_is_better"] else f"{sign}.1f"
    factor = 1 if task["lower_is_better"] else 100
    if interval is None:
        return f"{factor * value:{form}}"
    if not whole:
        return f"{factor * value:{form}} ±{factor * max(value - interval[0], interval[1] - value):{form}}"
    return f"{factor * value:{form}} ({factor * interval[0]:{form}} to {factor * interval[1]:{form}})"


def _unit(task: Mapping[str, Any]) -> str:
    return str(task["title"]) + ("" if task["lower_is_better"] else " %")


def _best(record: Record) -> frozenset[tuple[int, int]]:
    """The best row of each column, of those that no task is the own one of; of all adapters where there are none."""
    rows, singles = shown_rows(record), set(record["own"].values())
    merged = [i for i, row in enumerate(rows) if row["kind"] not in ("base", "own") and row["name"] not in singles]
    chosen = merged or [i for i, row in enumerate(rows) if row["kind"] not in ("base", "own")]
    found = set()
    for column, task in enumerate(record["tasks"], 1):
        values = {i: rows[i]["cells"][task["id"]]["value"] for i in chosen}
        found |= {(i, column) for i in _extreme(values, task["lower_is_better"])}
    if len(record["tasks"]) > 1:
        last, lower = len(record["tasks"]) + 1, record["tasks"][0]["lower_is_better"]
        found |= {(i, last) for i in _extreme({i: rows[i]["average"] for i in chosen}, lower)}
        found |= {(i, last + 1) for i in _extreme({i: rows[i]["normalised"] for i in chosen}, False)}
    return frozenset(found)


def _extreme(values: Mapping[int, float | None], lower: bool) -> list[int]:
    known = {i: value for i, value in values.items() if value is not None}
    if len(known) < 2:
        return []
    best = (min if lower else max)(known.values())
    return [i for i, value in known.items() if value == best]


def _clear(interval: Sequence[float] | None) -> str:
    return "yes" if interval is not None and (interval[0] > 0 or interval[1] < 0) else "no"
