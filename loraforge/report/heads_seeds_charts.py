"""Pictures over several seeds: each seed a mark, what seeds agree on, what tasks share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loraforge.report.heads_axes import Bar, bars, looks, null_key, plain_numbers, run_keys
from loraforge.report.heads_compare import STATISTICS
from loraforge.report.plots import GRID, INK, figure
from loraforge.report.tables import present

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Content = Mapping[str, Any]
_DRAWN = ("spearman_rho_Ipre_Urel", "spearman_rho_Ipost_U", "topk_overlap_Ipre_Urel", "topk_overlap_Ipre_Ipost")


def groups_of(content: Content, name: str) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(method, task, what there is), task by task; `name` is `statistics` or `stability`."""
    found = [(m, t, entry) for m, by_task in content[name].items() for t, entry in by_task.items()]
    return sorted(found, key=lambda item: item[1])


def run_styles(content: Content) -> dict[str, tuple[str, str]]:
    """Method -> (colour, marker)."""
    methods = list(dict.fromkeys([*content["statistics"], *content["stability"]]))
    return dict(zip(methods, looks(methods), strict=True))


@contextmanager
def statistics_chart(content: Content) -> Iterator[Figure]:
    """seeds_statistics: a mark a seed, the mean as a bar, one standard deviation as a line; a panel a statistic."""
    from matplotlib.ticker import MaxNLocator

    groups = groups_of(content, "statistics")
    keys = [key for key in _DRAWN if any(key in found for *_, found in groups)]
    styles = run_styles(content)
    with figure(1.4 + 0.42 * len(groups), columns=max(len(keys), 1), squeeze=False, sharey=True) as (drawn, grid):
        for axes, key in zip(grid[0], keys, strict=False):
            for place, (method, _, found) in enumerate(groups):
                _spread(axes, place, found.get(key) or {}, styles[method])
            band: Any = content.get("rho95")
            if "rho" in key and present(band):
                axes.axvspan(-band, band, color=GRID, alpha=0.75, linewidth=0, zorder=0.5)
            axes.axvline(0, color=INK, linewidth=0.9)
            axes.set_title(STATISTICS.get(key, key), fontsize=11)
            axes.set_xlim((-1, 1) if "rho" in key else (0, 1))
            axes.grid(axis="x")
            axes.xaxis.set_major_locator(MaxNLocator(3, prune="both"))
            plain_numbers(axes, "x")
        grid[0][0].set_yticks(range(len(groups)), [f"{task}, {method}" for method, task, _ in groups])
        grid[0][0].set_ylim(len(groups) - 0.4, -0.6)
        null_key(drawn, run_keys(styles))
        yield drawn


def _spread(axes: Axes, place: int, entry: Mapping[str, Any], look: tuple[str, str]) -> None:
    colour, marker = look
    values = [value for value in entry.get("values") or () if present(value)]
    axes.plot(values, [place] * len(values), marker, color=colour, alpha=0.6, markersize=6, mec="none")
    if present(entry.get("mean")):
        axes.plot([entry["mean"]] * 2, [place - 0.28, place + 0.28], "-", color=INK, linewidth=2.2)
    if present(entry.get("sd")):
        axes.plot([entry["mean"] - entry["sd"], entry["mean"] + entry["sd"]], [place] * 2, "-", color=INK, linewidth=1)


@contextmanager
def stability_chart(content: Content) -> Iterator[Figure]:
    """seeds_stability: mean rank correlation of the heads between seeds."""
    groups = groups_of(content, "stability")
    columns = list(dict.fromkeys(column for *_, found in groups for column in found))
    rows = [(column, task) for column in columns for task in dict.fromkeys(task for _, task, _ in groups)]
    styles = run_styles(content)
    with figure(1.2 + 0.3 * len(rows)) as (drawn, axes):
        for method, task, found in groups:
            colour, marker = styles[method]
            for column in columns:
                value = (found.get(column) or {}).get("rho")
                if present(value):
                    place = rows.index((column, task))
                    axes.plot([0, value], [place, place], "-", color=GRID, linewidth=2, zorder=1)
                    axes.plot([value], [place], marker, color=colour, markersize=7, mec=INK, mew=0.5)
        axes.set_yticks(range(len(rows)), [f"{column}, {task}" for column, task in rows])
        axes.set(xlim=(-1, 1), ylim=(len(rows) - 0.4, -0.6))
        axes.set_xlabel("mean ρ between two seeds (1: the same order of heads)")
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.grid(axis="x")
        plain_numbers(axes, "x")
        drawn.legend(handles=run_keys(styles), loc="outside lower left", ncols=4, fontsize=10)
        yield drawn


@contextmanager
def tasks_chart(content: Content) -> Iterator[Figure]:
    """seeds_tasks: whether the same heads matter and move on two tasks."""
    styles = run_styles(content)
    rows = [
        Bar(f"{row['quantity']}: {row['a']} and {row['b']}", row.get("rho"),
            (-row["rho95"], row["rho95"]) if present(row.get("rho95")) else None, None, styles[row["method"]])
        for row in content["cross_task"]
    ]  # fmt: skip
    with figure(1.2 + 0.36 * len(rows)) as (drawn, axes):
        bars(axes, rows, (-1, 1))
        axes.set_xlabel("ρ over the heads, means over the seeds")
        null_key(drawn, run_keys(styles))
        yield drawn
