"""The report of the demo of a training sequence: numbers in, one picture and one offline HTML page out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraforge.report.page import code, page, points, section, table, text, write_page
from loraforge.report.plots import COLOURS, GRID, figure, svg
from loraforge.report.tables import Table, phases_table, present

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOUT = {
    "seq": "plain training on one task after another",
    "er": "the same with replay: a few rows of earlier tasks are trained on again",
    "ilora": "replay, and a slow copy of the adapter (ema) whose hidden states the trained one (default) is held to",
}
_MEANINGS = (
    "ACC: mean accuracy over all tasks after the last one.",
    "BWT, backward transfer: mean change of an earlier task from being learnt to the end; below 0 something was lost.",
    "Forgetting: mean distance of an earlier task's end from its best; at 0 nothing was lost.",
    "Seconds: wall-clock time of the training alone. Both adapters of ilora come from one training.",
)


def write_sequence_demo(path: Path, results: Mapping[str, Any]) -> Path:
    """Writes `sequence_demo_html` to a file that appears whole or not at all."""
    return write_page(path, sequence_demo_html(results))


def sequence_demo_html(results: Mapping[str, Any]) -> str:
    """The results of the demo as a self-contained HTML page.

    Args:
        results: {tasks: [id], notes: {id: what}, rows: [{method, adapter, accuracies, acc, bwt, forgetting, seconds}],
            courses: [{name, rows: [[accuracy]]}], sizes: {train, test, buffer}, runs: {method: folder}, phases,
            versions, seed, quick, command, summary: [sentence]}; accuracies in percent.
    """
    runs = ", ".join(f"{folder}/report.html ({method})" for method, folder in results["runs"].items())
    parts = [
        "<h1>One adapter, one task after another</h1>",
        text(" ".join(results["summary"]), "lead"),
        svg(partial(courses_chart, results), "accuracy by task over the sequence"),
        text("Dotted: not trained on this task yet. A line that falls after its dots end is forgetting.", "note"),
        table(results_table(results)),
        points(_MEANINGS),
        section(
            "The tasks",
            text(
                "The classes and the head are the same in every task; what the images look like changes. One adapter "
                "learns the tasks in this order and is never told which task an image is of."
            ),
            points(f"{name}: {results['notes'][name]}" for name in results["tasks"]),
        ),
        section("The methods", points(f"{name}: {about}" for name, about in ABOUT.items())),
        section(
            "How to go on",
            code("\n".join(f"loraforge train-ilora sequence.yaml --method {name}" for name in ("joint", "single"))),
            text("Every setting is in sequence.yaml. Each run has a report of its own beside this page: " + runs + "."),
        ),
        section(
            "How to repeat it",
            code(str(results["command"])),
            text("Run with " + ", ".join(f"{name} {number}" for name, number in results["versions"].items()) + "."),
            table(phases_table(results["phases"])),
        ),
        section("Why to trust it", points(_sources(results))),
    ]
    return page("loraforge demo: training sequence", parts)


def results_table(results: Mapping[str, Any]) -> Table:
    """A row a trained adapter; the highest of each task and of ACC is marked, whichever method it is."""
    rows = tuple(
        (row["method"], row["adapter"], *map(_round, (*row["accuracies"], row["acc"], row["bwt"], row["forgetting"])),
         _round(row["seconds"]))
        for row in results["rows"]
    )  # fmt: skip
    count = len(results["tasks"])
    best = set()
    for column in range(2, count + 3):
        values = [row[column] for row in rows]
        best |= {(i, column) for i, value in enumerate(values) if value == max(values, key=float)}
    headers = ("method", "adapter", *map(str, results["tasks"]), "ACC", "BWT", "forgetting", "seconds")
    return Table(headers, rows, frozenset(best), "Accuracy in percent after the last task; the highest are marked.")


@contextmanager
def courses_chart(results: Mapping[str, Any], title: str | None = None) -> Iterator[Figure]:
    """Accuracy on every task by the base and after each task, a panel a trained adapter."""
    tasks, courses = list(map(str, results["tasks"])), results["courses"]
    with figure(3.9, columns=len(courses), squeeze=False, sharey=True) as (drawn, grid):
        for axes, course in zip(grid[0], courses, strict=True):
            rows: Sequence[Sequence[float]] = course["rows"]
            for i, task in enumerate(tasks):
                values = [row[i] for row in rows]
                colour = COLOURS[i % len(COLOURS)]
                axes.plot(range(i + 2), values[: i + 2], ":", color=colour, linewidth=1.4)
                axes.plot(range(i + 1, len(rows)), values[i + 1 :], "o-", color=colour, label=task, linewidth=2.0)
            axes.set_xticks(range(len(rows)), ["base", *tasks], rotation=30, ha="right")
            axes.set(title=course["name"], ylim=(0, 103), xlabel="after training on")
            axes.axvline(0.5, color=GRID, linewidth=1.0)
            axes.grid(axis="y")
        grid[0][0].set_ylabel("accuracy, %")
        drawn.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, title="accuracy on")
        if title:
            drawn.suptitle(title, fontsize=14, fontweight="bold")
        yield drawn


def summary(results: Mapping[str, Any]) -> list[str]:
    """What was measured, in sentences that hold whichever method came out ahead."""
    trained = [row for row in results["rows"] if row["method"] != "base"]
    plain = next(row for row in trained if row["method"] == "seq")
    lost = _round(plain["forgetting"]) or 0.0
    told = [
        f"Trained on one task after another (seq), earlier tasks end {lost:.1f} points below their best."
        if lost > 0
        else "Trained on one task after another (seq), earlier tasks lose nothing.",
        _leaders("Highest mean accuracy at the end", trained, "acc", max, " %"),
        _leaders("Least forgetting", trained, "forgetting", min, " points"),
    ]
    shares = [value / 100.0 for row in trained for value in row["accuracies"]]
    error = 100.0 * max(math.sqrt(p * (1.0 - p) / results["sizes"]["test"]) for p in shares)
    return [
        *told,
        f"One seed; each accuracy is of {results['sizes']['test']} images (standard error up to {error:.1f} points).",
    ]


def _leaders(what: str, rows: Sequence[Mapping[str, Any]], key: str, best: Any, unit: str) -> str:
    """The rows with the best value, rounded as they are shown: what looks equal is a tie."""
    values = [_round(row[key]) or 0.0 for row in rows]
    top = best(values)
    names = [row["name"] for row, value in zip(rows, values, strict=True) if value == top]
    return f"{what}: {', '.join(names)} with {top:.1f}{unit}."


def _sources(results: Mapping[str, Any]) -> list[str]:
    sizes = results["sizes"]
    told = [
        f"Every method trains on the same {sizes['train']} images a task in the same order, from the same base, with "
        f"the same steps, rates and seed ({results['seed']}); replay keeps {sizes['buffer']} images at most.",
        f"Accuracy is the share of {sizes['test']} images a task classified rightly, none of which was trained on. The "
        "scans behind them are the same for every task.",
        "The setting was settled in two pilots with one seed, scored on these same test images: plain training was to "
        "forget clearly in a minute or two, and the rate is constant because with one that falls to 0 both adapters of "
        "I-LORA end equal. The settings of I-LORA are its defaults, but for the size of the buffer.",
        "One seed on one small model ranks nothing for good: differences of a few points may turn with another.",
        "The same numbers lie beside this page in results.json, and in cl_matrix.json of each run.",
    ]
    if results["quick"]:
        told.insert(0, "This was the quick form: too few steps to say anything about the methods.")
    return told


def _round(value: Any) -> float | None:
    # Plus 0: a rounded -0.04 would be shown as -0.
    return round(float(value), 1) + 0.0 if present(value) else None
