"""Score files of a run: each row's scores beside its adapters, gathered into cl_matrix and cl_metrics. Torch-free."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError
from loraforge.storage.atomic import write_whole
from loraforge.training.sequence.layout import MATRIX, METRICS, TABLE, read_json, task_folder, write_json
from loraforge.training.sequence.metrics import cl_metrics, row_metrics

SCORES, BASE_SCORES = "scores.json", "base_scores.json"
# A task that lost more than this since it was learnt is worth a word while the run still goes on.
ALARM = 0.1
Row = list[float | None]
Matrix = dict[str, Any]


def read_matrix(run: Path, tasks: Sequence[str], units: Sequence[str], adapters: Iterable[str]) -> Matrix:
    """The matrix of a run as far as it is scored: {base: [..] or None, default: [[..]], ema: [[..]]}.

    Args:
        run: Folder of the run.
        tasks: Ids of the columns.
        units: Ids of the rows: the tasks, or `joint`.
        adapters: The adapters that are scored.
    """
    base = read_json(run / BASE_SCORES)
    found: Matrix = {"base": _row(base, tasks) if base else None}
    for adapter in adapters:
        rows = []
        for unit in units:
            scores = read_json(task_folder(run, unit) / SCORES).get(adapter)
            if scores is None:
                break
            rows.append(_row(scores, tasks))
        found[adapter] = rows
    return found


def _row(scores: Mapping[str, Any], tasks: Sequence[str]) -> Row:
    return [scores[task]["score"] if task in scores else None for task in tasks]


def single_scores(run: Path, tasks: Sequence[str]) -> Row:
    """The score of each task when trained alone, out of a run of the method `single`.

    Raises:
        LoraforgeError: No such run, or it lacks one of the tasks.
    """
    content = read_json(run / "sequence.json")
    method = content.get("depends", {}).get("method")
    if method != "single":
        got = f"method {method}" if method else "no sequence.json"
        raise LoraforgeError("the run has no tasks trained alone", where=run, got=got, expected="--method single")
    found: Row = []
    for task in tasks:
        score = read_json(task_folder(run, task) / SCORES).get("default", {}).get(task)
        if score is None:
            raise LoraforgeError("the run of single tasks lacks a task's own score", where=run, got=task)
        found.append(score["score"])
    return found


def metrics_of(matrix: Matrix, method: str, count: int, single: Row | None = None) -> dict[str, Any]:
    """The metrics of each adapter: {adapter: {name: value}}; None for an adapter that is not scored to the end.

    Args:
        matrix: Of `read_matrix`.
        method: Methods without an order of tasks have a mean score alone.
        count: Number of tasks.
        single: Scores of tasks trained alone.

    Raises:
        LoraforgeError: A score of a trained task is missing or undefined.
    """
    found: dict[str, Any] = {}
    for adapter, rows in matrix.items():
        if adapter == "base":
            continue
        whole = len(rows) == (1 if method == "joint" else count)
        if not whole:
            found[adapter] = None
        elif method == "joint":
            found[adapter] = row_metrics(rows[0])
        elif method == "single":
            found[adapter] = row_metrics([rows[i][i] for i in range(count)], own=True)
        else:
            found[adapter] = cl_metrics(rows, matrix["base"], single)
    return found


def write_matrix(
    run: Path, matrix: Matrix, metrics: Mapping[str, Any], tasks: Sequence[str], units: Sequence[str]
) -> None:
    """Writes cl_matrix.json, cl_matrix.csv and cl_metrics.json.

    Raises:
        OSError: The disk refuses.
    """
    write_json(run / MATRIX, matrix)
    page = io.StringIO()
    table = csv.writer(page, lineterminator="\n")
    table.writerow(["adapter", "after", *tasks])
    if matrix["base"] is not None:
        table.writerow(["base", "", *matrix["base"]])
    for adapter, rows in matrix.items():
        if adapter != "base":
            table.writerows([adapter, unit, *row] for unit, row in zip(units, rows, strict=False))
    write_whole(run / TABLE, page.getvalue())
    write_json(run / METRICS, metrics)


def early_report(matrix: Matrix, tasks: Sequence[str], k: int, run: Path) -> list[str]:
    """What the last row says about forgetting, in lines for a terminal.

    Args:
        matrix: With k + 1 rows or more.
        tasks: Ids of the tasks.
        k: Position of the task just learnt.
        run: Folder of the run, to name what is kept there.
    """
    lines = []
    for adapter, rows in matrix.items():
        if adapter == "base" or len(rows) <= k:
            continue
        told = []
        lost: list[tuple[float, str]] = []
        for i in range(k + 1):
            now, own = rows[k][i], rows[i][i]
            if now is None or own is None:
                told.append(f"{tasks[i]} undefined")
                continue
            told.append(f"{tasks[i]} {now:.3f}" + (f" ({now - own:+.3f})" if i < k else ""))
            lost += [(own - now, tasks[i])] if i < k else []
        mean = f"; mean change of earlier tasks {0 - sum(x for x, _ in lost) / len(lost):+.3f}" if lost else ""
        lines.append(f"after {tasks[k]}, {adapter}: {', '.join(told)}{mean}")
        worst = max(lost, default=(0.0, ""))
        if worst[0] > ALARM:
            lines.append(
                f"  {worst[1]} lost {worst[0]:.3f} since it was learnt; the adapters before {tasks[k]} are kept in "
                f"{task_folder(run, tasks[k - 1])}. A larger ilora_buffer_size or replay_batch_size, or fewer steps "
                "at a lower learning_rate, keep more"
            )
    return lines
