"""The report of a training sequence: numbers in, one offline HTML page and PNG pictures out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraforge.report import sequence_charts as charts
from loraforge.report.page import code, facts, fold, page, points, section, table, text, whole_file, write_page
from loraforge.report.plots import save_png, svg
from loraforge.report.tables import Table, present

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = {
    "acc": "final mean score (ACC)",
    "avg": "mean over the run (Avg)",
    "learning_acc": "score right after learning",
    "bwt": "backward transfer (BWT)",
    "forgetting": "forgetting",
    "fwt": "forward transfer (FWT)",
    "intransigence": "intransigence",
}
ABOUT = {
    "ilora": "I-LORA: replay of earlier rows, and a slow (ema) copy of the adapter whose hidden states it is held to",
    "er": "experience replay: rows of earlier tasks are trained on again; no ema adapter",
    "seq": "plain training on one task after another",
    "joint": "one adapter trained on the rows of all tasks at once",
    "single": "one adapter a task, each trained from the base alone",
}
_MEANINGS = [
    "Final mean score: mean of the last row, the scores on all tasks after the last one.",
    "Mean over the run: mean over the rows of the mean of the tasks seen by then.",
    "Backward transfer: mean change of a task's score from right after it was learnt to the end; below 0 means lost.",
    "Forgetting: mean distance from a task's best score before the last task to its score at the end. It is not the "
    "negative of backward transfer: a task that gained and then lost has both above 0.",
    "Forward transfer: mean score on a task right before it is trained, less the untrained base's.",
    "Intransigence: mean distance from a task's score when trained alone to its score right after it was learnt.",
    "A dash means undefined (one task has no backward transfer), never 0.",
]


def sequence_html(report: Mapping[str, Any]) -> str:
    """The page of one run.

    Args:
        report: {name, method, base, seed, tasks: [id], metric_names: {id: name}, matrix: {base, default, ema}, metrics:
            {adapter: {name: value}}, log: [{task, step, loss, ...}], buffer: [{task, histogram}], rows: [{id, rows,
            steps, seconds, scored_on, test_rows}], runs: [{name, method, adapter, metrics}], settings, versions,
            command, notes}; all but tasks, matrix, metrics and method may be empty.
    """
    report = _filled(report)
    parts = [
        f"<h1>{text(str(report['name']))[3:-4]}</h1>",
        text(verdict(report), "lead"),
        _facts(report),
        *(f'<p class="warn">{text(note)[3:-4]}</p>' for note in report["notes"]),
        section(
            "Scores after each task",
            svg(partial(charts.matrix_chart, report), "score matrix"),
            text(_reading(report), "note"),
            svg(partial(charts.course_chart, report), "scores over the run") if _in_order(report) else "",
        ),
        section("What the matrix says", table(metrics_table(report)), fold("What these mean", points(_MEANINGS))),
        section("Task by task", table(tasks_table(report))) if _in_order(report) else "",
        _beside(report),
        _training(report),
        section("The tasks", table(rows_table(report))) if report["rows"] else "",
        _repeat(report),
        section("Why to trust it", points(_sources(report))),
    ]
    return page(f"{report['name']}: training sequence", parts)


def write_sequence_report(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """Writes report.html and plots/*.png into a folder; each file appears whole or not at all.

    Raises:
        OSError: The disk refuses.
    """
    report = _filled(report)
    written = [write_page(folder / "report.html", sequence_html(report))]
    for name, draw in _pictures(report).items():
        path = folder / "plots" / f"{name}.png"
        with whole_file(path) as draft:
            save_png(draw, draft)
        written.append(path)
    return written


def _pictures(report: Mapping[str, Any]) -> dict[str, Callable[[], AbstractContextManager[Figure]]]:
    """The charts that this run has numbers for."""
    found = {"matrix": charts.matrix_chart}
    if _in_order(report):
        found["course"] = charts.course_chart
    if report["log"]:
        found["loss"] = charts.loss_chart
    if _logged(report, "ema_drift"):
        found["stability"] = charts.stability_chart
    if report["buffer"]:
        found["buffer"] = charts.buffer_chart
    if len(report["runs"]) > 1:
        found["methods"] = charts.methods_chart
    return {name: partial(draw, report) for name, draw in found.items()}


def verdict(report: Mapping[str, Any]) -> str:
    """What came out, in two sentences."""
    method, count = report["method"], len(report["tasks"])
    about = ABOUT.get(method, method)
    name = next((name for name in ("default", "ema") if report["metrics"].get(name)), None)
    if name is None:
        return f"{about[0].upper()}{about[1:]}, over {count} tasks."
    metrics = report["metrics"][name]
    told = f"{about[0].upper()}{about[1:]}. Over {count} tasks the final mean score is {metrics['acc']:.3f}"
    if method in ("joint", "single") or metrics.get("forgetting") is None:
        return f"{told}."
    return (
        f"{told}; right after learning it was {metrics['learning_acc']:.3f}, and earlier tasks ended "
        f"{abs(metrics['forgetting']):.3f} {'below' if metrics['forgetting'] >= 0 else 'above'} their best."
    )


def metrics_table(report: Mapping[str, Any]) -> Table:
    """A row a metric, a column an adapter."""
    names = [name for name in ("default", "ema") if report["metrics"].get(name)]
    rows = tuple(
        (title, *(_round(report["metrics"][name].get(key)) for name in names))
        for key, title in METRICS.items()
        if any(present(report["metrics"][name].get(key)) for name in names) or key not in ("intransigence", "fwt")
    )
    return Table(("metric", *(f"{name} adapter" for name in names)), rows)


def tasks_table(report: Mapping[str, Any]) -> Table:
    """A row a task and adapter: score of the base, when learnt, best since, at the end, what was lost."""
    base = report["matrix"].get("base") or [None] * len(report["tasks"])
    rows = []
    for name in ("default", "ema"):
        matrix = report["matrix"].get(name) or []
        for i, task in enumerate(report["tasks"][: len(matrix)]):
            own, last = matrix[i][i], matrix[-1][i]
            best = max((row[i] for row in matrix[i:] if present(row[i])), default=None)
            lost = None if not present(best) or not present(last) else best - last
            rows.append((task, name, *map(_round, (base[i], own, best, last, lost))))
    return Table(("task", "adapter", "base", "when learnt", "best", "at the end", "lost"), tuple(rows))


def rows_table(report: Mapping[str, Any]) -> Table:
    """What each task was trained and scored on."""
    names = report["metric_names"]
    rows = tuple(
        (row["id"], row.get("rows"), row.get("steps"), _round(row.get("seconds"), 1), names.get(row["id"]),
         row.get("scored_on"), row.get("test_rows"))
        for row in report["rows"]
    )  # fmt: skip
    return Table(("task", "training rows", "steps", "seconds", "score", "scored on", "rows there"), rows)


def _facts(report: Mapping[str, Any]) -> str:
    name = next((name for name in ("default", "ema") if report["metrics"].get(name)), None)
    shown: dict[str, object] = {"method": report["method"], "tasks": len(report["tasks"]), "base": report["base"]}
    if name is not None:
        for key, title in (("acc", "final mean score"), ("forgetting", "forgetting"), ("learning_acc", "when learnt")):
            if present(report["metrics"][name].get(key)):
                shown[f"{title} ({name})"] = _round(report["metrics"][name][key])
    return facts({**shown, "seed": report["seed"]})


def _reading(report: Mapping[str, Any]) -> str:
    if report["method"] == "joint":
        return "One row: the scores of the jointly trained adapter."
    if report["method"] == "single":
        return "A row an adapter, each trained on one task from the base; the framed cells are its own task."
    return (
        "A row after each task, a column a task. Framed: the task just learnt. Left of the frame: what is kept of "
        "earlier tasks. Right of it: tasks not trained yet."
    )


def _beside(report: Mapping[str, Any]) -> str:
    runs = report["runs"]
    if len(runs) < 2:
        return ""
    rows = tuple(
        (run["name"], run["method"], run["adapter"], *(_round(run["metrics"].get(key)) for key in METRICS))
        for run in runs
    )
    heads = ("run", "method", "adapter", *(title.split(" (")[0] for title in METRICS.values()))
    return section(
        "Beside other runs", svg(partial(charts.methods_chart, report), "runs"), table(Table(heads, rows)),
        text("One seed each unless the runs say otherwise: small differences between rows are no finding.", "note"),
    )  # fmt: skip


def _training(report: Mapping[str, Any]) -> str:
    pictures = [
        svg(draw, name)
        for name, draw in _pictures(report).items()
        if name in ("loss", "stability")
    ]  # fmt: skip
    if report["buffer"]:
        pictures += ["<h3>Replay buffer</h3>", svg(partial(charts.buffer_chart, report), "replay buffer")]
        pictures.append(
            text("The buffer file holds training rows as tokens; it is readable by its owner only.", "note")
        )
    return section("The training", *pictures) if pictures else ""


def _repeat(report: Mapping[str, Any]) -> str:
    parts = [code(str(report["command"]))] if report["command"] else []
    if report["versions"]:
        parts.append(text("Run with " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()) + "."))
    if report["settings"]:
        shown = json.dumps(report["settings"], indent=1, ensure_ascii=False, default=str)
        parts.append(fold("All settings", code(shown)))
    return section("How to repeat it", *parts) if parts else ""


def _sources(report: Mapping[str, Any]) -> list[str]:
    told = [
        "Every number on this page comes from the files beside it: cl_matrix.json, cl_metrics.json, train_log.jsonl.",
        "Scores are taken on the rows named above, which are not trained on unless the task's files overlap.",
        f"Every random draw comes from seed {report['seed']}; one run says nothing about how another seed would end.",
    ]
    if report["matrix"].get("ema"):
        told.append(
            "The two adapters are scored on the same rows. With a new-value weight of 0.25 the ema adapter follows the "
            "default one within a few steps; expect them to be close."
        )
    return told


def _in_order(report: Mapping[str, Any]) -> bool:
    return report["method"] not in ("joint", "single")


def _logged(report: Mapping[str, Any], key: str) -> bool:
    return any(present(line.get(key)) for line in report["log"])


def _round(value: Any, digits: int = 4) -> float | None:
    return round(float(value), digits) if present(value) else None


def _filled(report: Mapping[str, Any]) -> dict[str, Any]:
    empty: dict[str, Any] = {
        "name": "run", "base": None, "seed": None, "metric_names": {}, "log": [], "buffer": [], "rows": [], "runs": [],
        "settings": {}, "versions": {}, "command": None, "notes": [],
    }  # fmt: skip
    return {**empty, **report}
