"""Pictures of several runs on the same heads: shared axes, shared bins, chance in grey, a colour and a marker a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loraforge.report.heads_axes import (
    bars,
    head_name,
    is_plain,
    null_key,
    place_labels,
    plain_numbers,
    run_keys,
    run_looks,
    scale,
)
from loraforge.report.heads_charts import NAMES, head_key, known, same_axes, scatter, told
from loraforge.report.heads_stats_charts import RHO_POST, RHO_PRE, case_bars, count_limits, overlap_bars, rho_bars
from loraforge.report.plots import INK, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Content = Mapping[str, Any]
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":")
_NEUTRAL = "#7a828c"


@contextmanager
def panels_chart(content: Content) -> Iterator[Figure]:
    """compare_I_vs_U: importance before training against relative update, a panel a run, on the same axes."""
    names, styles = content["names"], run_looks(content)
    columns = min(len(names), 3)
    rows = math.ceil(len(names) / columns)
    with figure(4.9 * rows + 0.4, columns, rows, squeeze=False, sharex=True, sharey=True) as (drawn, grid):
        panels, labels = list(grid.flat), []
        for axes, name in zip(panels, names, strict=False):
            labels.append(scatter(axes, content["runs"][name], "I_pre", "Urel", look=styles[name]))
        _same_scale(panels[0], [content["runs"][name] for name in names], "I_pre", "Urel")
        for axes, name in zip(panels, names, strict=False):
            axes.set_title(f"{name}\n{told(content['runs'][name], 'Ipre_Urel', 'ρ')}", fontsize=11)
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        found: dict[str, Any] = {}
        for axes in panels[: len(names)]:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                found.setdefault(label, _grey(handle))
        drawn.legend(found.values(), found.keys(), loc="outside lower left", ncols=4, fontsize=10)
        for axes, name, marks in zip(panels, names, labels, strict=False):
            rows_ = known(content["runs"][name]["heads"], "I_pre", "Urel")
            place_labels(drawn, axes, marks, [(row["I_pre"], row["Urel"]) for row in rows_])
        yield drawn


def _grey(handle: Any) -> Any:
    """A mark of the legend that stands for every run's colour."""
    from matplotlib.lines import Line2D

    mark = Line2D([], [], linestyle="none", color=_NEUTRAL)
    mark.set(marker=handle.get_marker(), markersize=handle.get_markersize())
    mark.set(markeredgecolor=handle.get_markeredgecolor(), markeredgewidth=handle.get_markeredgewidth())
    return mark


def _same_scale(axes: Axes, runs: Sequence[Content], x: str, y: str) -> None:
    """One scale from all runs together; the axes are shared, so it holds for every panel."""
    for side, column in (("x", x), ("y", y)):
        scale(axes, side, [row[column] for run in runs for row in known(run["heads"], x, y)])


@contextmanager
def stats_chart(content: Content) -> Iterator[Figure]:
    """compare_stats: correlations with importance before and after, overlaps, numbers of cases; run beside run."""
    styles = run_looks(content)
    runs = [(content["runs"][name], styles[name]) for name in content["names"]]
    post = [(key, label) for key, label in RHO_POST if key in ("Ipost_U", "Ipost_Urel", "Ipost_G")]
    height = 1.6 + 0.42 * len(runs) * 3 * 2
    with figure(min(height, 11), 2, 2) as (drawn, ((a, b), (c, d))):
        groups = [
            [rho_bars(run, RHO_PRE, look) for run, look in runs],
            [overlap_bars(run, look) for run, look in runs],
            [case_bars(run, look) for run, look in runs],
            [rho_bars(run, post, look) for run, look in runs],
        ]
        counts = [bar for group in groups[2] for bar in group]
        for axes, group, limits, form, title in (
            (a, groups[0], (-1, 1), "+.2f", "importance before training, ρ"),
            (b, groups[1], (0, 1), ".2f", f"overlap of the top {runs[0][0]['stats'].get('topk', '')}"),
            (c, groups[2], count_limits(counts), ".0f", "cases (heads)"),
            (d, groups[3], (-1, 1), "+.2f", "importance after training, ρ"),
        ):
            _beside(axes, group, limits, form)
            axes.set_title(title, fontsize=12)
        drawn.set_layout_engine("constrained", wspace=0.05, hspace=0.04)
        null_key(drawn, run_keys(styles))
        yield drawn


def _beside(axes: Axes, groups: Sequence[Sequence[Any]], limits: tuple[float, float], form: str) -> None:
    """The bars of all runs interleaved: one statistic after the other, run below run; one label a statistic."""
    rows = [group[i] for i in range(len(groups[0])) for group in groups]
    bars(axes, rows, limits, form)
    several = len(groups)
    middles = [i * several + (several - 1) / 2 for i in range(len(groups[0]))]
    axes.set_yticks(middles, [bar.label for bar in groups[0]])
    for i in range(1, len(groups[0])):
        axes.axhline(i * several - 0.5, color=INK, linewidth=0.5, alpha=0.35)


@contextmanager
def update_chart(content: Content) -> Iterator[Figure]:
    """compare_update_dist: how the update is spread over the heads; the same bins for every run."""
    import numpy as np

    styles = run_looks(content)
    with figure(4.2, columns=2, sharey=True) as (drawn, both):
        for axes, column in zip(both, ("Urel", "U"), strict=True):
            values = {name: _updates(content["runs"][name], column) for name in content["names"]}
            joined = [value for found in values.values() for value in found]
            edges = np.histogram_bin_edges(joined, bins=30) if joined else np.linspace(0, 1, 31)
            for i, (name, found) in enumerate(values.items()):
                colour, _ = styles[name]
                line = _DASHES[i % len(_DASHES)]
                axes.hist(found, edges, color=colour, alpha=0.18)
                axes.hist(found, edges, histtype="step", color=colour, linewidth=1.8, linestyle=line)
                if found:
                    axes.axvline(float(np.median(found)), color=colour, linewidth=1.2, linestyle=line, alpha=0.8)
            axes.set_xlabel(NAMES["Urel"] if column == "Urel" else "log₁₀ of the update U")
            axes.grid(axis="y")
            plain_numbers(axes, "x")
        both[0].set_ylabel("heads")
        both[0].set_title("upright lines: medians", fontsize=11)
        drawn.legend(handles=_line_keys(styles), loc="outside lower left", ncols=4, fontsize=10)
        yield drawn


def _updates(run: Content, column: str) -> list[float]:
    found = [row[column] for row in known(run["heads"], column)]
    return found if column == "Urel" else [math.log10(value) for value in found if value > 0]


def _line_keys(styles: Mapping[str, tuple[str, str]]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=colour, linewidth=2, linestyle=_DASHES[i % len(_DASHES)], label=name)
        for i, (name, (colour, _)) in enumerate(styles.items())
    ]


@contextmanager
def headwise_chart(content: Content) -> Iterator[Figure]:
    """compare_headwise: the same head in two runs; importance before training only where the starts differ."""
    names = content["names"]
    columns = ["Urel", "I_post", *(["I_pre"] if content["comparison"].get("same_start") is False else [])]
    others = names[1:4]
    with figure(4.6 * len(others) + 0.3, len(columns), len(others), squeeze=False) as (drawn, grid):
        waiting = []
        for line, other in zip(grid, others, strict=True):
            for axes, column in zip(line, columns, strict=True):
                waiting.append((axes, *_headwise(axes, content, names[0], other, column)))
        handles, labels = grid[0][0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower left")
        for axes, marks, points in waiting:
            place_labels(drawn, axes, marks, points)
        yield drawn


def _headwise(axes: Axes, content: Content, a: str, b: str, column: str) -> tuple[list[Any], list[Any]]:
    first, second = ({head_key(r): r for r in known(content["runs"][name]["heads"], column)} for name in (a, b))
    both = [(row, second[key]) for key, row in first.items() if key in second]
    axes.set(xlabel=f"{column} of {a}", ylabel=f"{column} of {b}")
    axes.set_title(f"{NAMES[column]}\n{_agreement(content, a, b, column)}", fontsize=11)
    if not both:
        axes.text(0.5, 0.5, f"{column} was not measured in both", ha="center", transform=axes.transAxes)
        return [], []
    points = [(one[column], other[column]) for one, other in both]
    axes.plot(*zip(*points, strict=True), "o", color=_NEUTRAL, alpha=0.6, markersize=5.5, mec="none")
    axes.grid()
    same_axes(axes, [value for point in points for value in point])
    plain = is_plain([one for one, _ in both])
    apart = sorted(both, key=lambda pair: -abs(pair[0][column] - pair[1][column]))[:6]
    return [(one[column], other[column], head_name(one, plain)) for one, other in apart], points


def _agreement(content: Content, a: str, b: str, column: str) -> str:
    for pair in content["comparison"].get("pairs") or ():
        if {pair["a"], pair["b"]} == {a, b}:
            return told({"rho": pair["between"], "null": {}}, column, "ρ between the runs")
    return ""
