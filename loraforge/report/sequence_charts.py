"""The charts of a training sequence, each a context manager that yields a drawn figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loraforge.report.plots import COLOURS, GRID, INK, figure
from loraforge.report.tables import present

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"default": "default adapter (plastic)", "ema": "ema adapter (stable)"}
# Above this many tasks a cell has no room for its number.
NUMBERED = 14
# Text on a coloured cell: the same in a light and a dark page, so not the page's ink.
DARK, LIGHT = "#10131a", "#fbfcfe"


@contextmanager
def matrix_chart(report: Mapping[str, Any]) -> Iterator[Figure]:
    """The score matrix of each adapter: a row after each task, the untrained base above them."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    tasks, matrix = list(map(str, report["tasks"])), report["matrix"]
    names = [name for name in ("default", "ema") if matrix.get(name)]
    rows = max(len(matrix[name]) for name in names) + 1
    values = [v for name in names for row in matrix[name] for v in row if present(v)]
    low, high = min([0.0, *values]), max([1.0, *values])
    scale, colours = Normalize(low, high), colormaps["YlGnBu"]
    with figure(min(1.5 + 0.52 * rows, 9.0), columns=len(names), squeeze=False) as (drawn, grid):
        for axes, name in zip(grid[0], names, strict=True):
            _cells(axes, [matrix.get("base") or [None] * len(tasks), *matrix[name]], scale, colours)
            axes.set_title(TITLES[name])
            axes.set_xticks([i + 0.5 for i in range(len(tasks))], tasks, rotation=30 if _long(tasks) else 0,
                           ha="right" if _long(tasks) else "center")  # fmt: skip
            axes.set_yticks([k + 0.5 for k in range(len(matrix[name]) + 1)], _row_names(report, len(matrix[name])))
            axes.set_xlabel("score on task")
        yield drawn


def _cells(axes: Axes, rows: Sequence[Sequence[float | None]], scale: Any, colours: Any) -> None:
    from matplotlib.patches import Rectangle

    width = len(rows[0])
    for k, row in enumerate(rows):
        for i, value in enumerate(row):
            known = value is not None and present(value)
            fill = colours(scale(value)) if known else (0.0, 0.0, 0.0, 0.0)
            axes.add_patch(Rectangle((i, k), 1, 1, facecolor=fill, edgecolor=GRID, linewidth=0.8))
            if known and width <= NUMBERED:
                bright = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 0.55
                axes.text(i + 0.5, k + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=9.5,
                          color=DARK if bright else LIGHT)  # fmt: skip
    if len(rows) == width + 1:
        for i in range(width):
            axes.add_patch(Rectangle((i, i + 1), 1, 1, facecolor="none", edgecolor=COLOURS[5], linewidth=2.0))
    axes.set(xlim=(0, width), ylim=(len(rows), 0))
    axes.spines[:].set_visible(False)


def _row_names(report: Mapping[str, Any], count: int) -> list[str]:
    tasks = list(map(str, report["tasks"]))
    if report.get("method") == "joint":
        return ["base", "all tasks"]
    word = "only" if report.get("method") == "single" else "after"
    return ["base", *(f"{word} {name}" for name in tasks[:count])]


@contextmanager
def course_chart(report: Mapping[str, Any]) -> Iterator[Figure]:
    """The score of every task after each task: a line starts where the task was learnt."""
    tasks, matrix = list(map(str, report["tasks"])), report["matrix"]
    names = [name for name in ("default", "ema") if matrix.get(name)]
    with figure(3.9, columns=len(names), squeeze=False, sharey=True) as (drawn, grid):
        for axes, name in zip(grid[0], names, strict=True):
            rows = matrix[name]
            for i, task in enumerate(tasks):
                line = [(k, rows[k][i]) for k in range(i, len(rows)) if present(rows[k][i])]
                axes.plot([k for k, _ in line], [v for _, v in line], "o-", color=COLOURS[i % len(COLOURS)], label=task)
                before = [(k, rows[k][i]) for k in range(min(i + 1, len(rows))) if present(rows[k][i])]
                axes.plot([k for k, _ in before], [v for _, v in before], ":", color=COLOURS[i % len(COLOURS)], lw=1.2)
            axes.set_xticks(range(len(rows)), tasks[: len(rows)], rotation=30 if _long(tasks) else 0,
                           ha="right" if _long(tasks) else "center")  # fmt: skip
            axes.set(title=TITLES[name], xlabel="after task")
            axes.grid(axis="y")
        grid[0][0].set_ylabel("score")
        drawn.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, title="score on")
        yield drawn


@contextmanager
def loss_chart(report: Mapping[str, Any]) -> Iterator[Figure]:
    """The parts of the loss by step: cross-entropy of the current and of the replayed rows, and the consistency."""
    parts = {"ce_current": "current rows", "ce_replay": "replayed rows", "loss": "total"}
    has_parts = any("ce_current" in line for line in report["log"])
    shown = ("ce_current", "ce_replay") if has_parts else ("loss",)
    extra = has_parts and any(present(line.get("l_cons")) for line in report["log"])
    with figure(3.6, columns=2 if extra else 1, squeeze=False) as (drawn, grid):
        axes = grid[0][0]
        for colour, key in zip((COLOURS[0], COLOURS[1]), shown, strict=False):
            _curve(axes, report, key, colour, parts[key])
        axes.set(title="cross-entropy" if has_parts else "loss", xlabel="step", ylim=(0, None))
        if len(shown) > 1:
            drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
        _boundaries(axes, report)
        if extra:
            _curve(grid[0][1], report, "l_cons", COLOURS[3], "")
            grid[0][1].set(title="consistency loss", xlabel="step", ylim=(0, None))
            _boundaries(grid[0][1], report)
        yield drawn


@contextmanager
def stability_chart(report: Mapping[str, Any]) -> Iterator[Figure]:
    """How far the ema adapter is from the default one, and the share of hidden units that were left alone."""
    with figure(3.4, columns=2) as (drawn, both):
        keys = (("ema_drift", "distance of ema from default", 0), ("kept_fraction", "share kept plastic", 2))
        for axes, (key, title, colour) in zip(both, keys, strict=True):
            _curve(axes, report, key, COLOURS[colour], "")
            axes.set(title=title, xlabel="step")
            axes.set_ylim(bottom=0)
            _boundaries(axes, report)
        yield drawn


@contextmanager
def buffer_chart(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Rows in the replay buffer after each task, by the task they come from."""
    tasks, states = list(map(str, report["tasks"])), report["buffer"]
    with figure(max(1.6, 0.9 + 0.4 * len(states))) as (drawn, axes):
        for place, state in enumerate(states):
            start = 0
            for i, task in enumerate(tasks):
                count = int(state["histogram"].get(task, 0))
                if count:
                    axes.barh(place, count, left=start, color=COLOURS[i % len(COLOURS)], height=0.7,
                              label=task if task not in axes.get_legend_handles_labels()[1] else "_")  # fmt: skip
                    axes.text(start + count / 2, place, str(count), ha="center", va="center", color=LIGHT, fontsize=9)
                start += count
        axes.set_yticks(range(len(states)), [f"after {state['task']}" for state in states])
        axes.set(ylim=(len(states) - 0.4, -0.6), xlabel="rows")
        axes.set_xlim(left=0)
        axes.grid(axis="x")
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside right upper", title="rows of")
        yield drawn


@contextmanager
def methods_chart(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Final score and forgetting of this run and the ones it is shown beside."""
    runs = report["runs"]
    with figure(3.2, columns=2) as (drawn, both):
        for axes, key, title in zip(both, ("acc", "forgetting"), ("final mean score", "forgetting"), strict=True):
            for place, run in enumerate(runs):
                value = run["metrics"].get(key)
                if value is not None:
                    axes.bar(place, value, 0.6, color=COLOURS[place % len(COLOURS)])
                    axes.annotate(f"{value:.3f}", (place, max(value, 0)), (0, 2), textcoords="offset points",
                                  ha="center", fontsize=9.5)  # fmt: skip
                else:
                    axes.text(place, 0, "undefined", ha="center", va="bottom", fontsize=9)
            axes.set_xticks(range(len(runs)), [run["name"] for run in runs], rotation=20, ha="right")
            axes.set(title=title, xlim=(-0.6, len(runs) - 0.4))
            axes.axhline(0, color=INK, linewidth=0.8)
            axes.margins(y=0.15)
            axes.grid(axis="y")
        yield drawn


def _curve(axes: Axes, report: Mapping[str, Any], key: str, colour: str, label: str) -> None:
    """A value of the log over all steps of the run, broken between tasks."""
    starts = _starts(report)
    shown = False
    for task, start in starts.items():
        line = [(start + x["step"], x[key]) for x in report["log"] if x.get("task") == task and present(x.get(key))]
        if line:
            axes.plot([s for s, _ in line], [v for _, v in line], "-", color=colour, linewidth=1.6,
                      marker="o" if len(line) == 1 else None, label="_" if shown else label or "_")  # fmt: skip
            shown = True
    axes.grid(axis="y")
    if not shown:
        axes.text(0.5, 0.5, "nothing was logged", ha="center", transform=axes.transAxes)


def _starts(report: Mapping[str, Any]) -> dict[str, int]:
    """Steps before each task."""
    starts, total = {}, 0
    for row in report["rows"]:
        starts[str(row["id"])] = total
        total += int(row.get("steps") or 0)
    return starts


def _boundaries(axes: Axes, report: Mapping[str, Any]) -> None:
    """Where tasks begin, over all steps of the run, with their names above the curves."""
    starts = _starts(report)
    low, high = axes.get_ylim()
    top = low + 1.12 * (high - low)
    total = sum(int(row.get("steps") or 0) for row in report["rows"])
    axes.set(ylim=(low, top), xlim=(0, max(total, 1)))
    for task, start in starts.items():
        if start:
            axes.axvline(start, color=GRID, linewidth=1.2)
        if len(starts) <= NUMBERED:
            axes.annotate(task, (start, top), (3, -2), textcoords="offset points", va="top", fontsize=8.5)


def _long(names: Sequence[str]) -> bool:
    return len(names) > 4 or max(map(len, names)) > 8
