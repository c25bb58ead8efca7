"""The pictures that the document names: importance against change, rank correlations, and chance in grey beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loraforge.report.heads_axes import (
    CASES,
    Row,
    head_name,
    is_plain,
    looks,
    place_labels,
    scale,
    signed,
)
from loraforge.report.plots import GRID, INK, figure
from loraforge.report.tables import present

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {
    "I_pre": "importance before training, I_pre",
    "I_post": "importance after training, I_post",
    "U": "update U = ‖ΔW‖",
    "Urel": "relative update Urel = ‖ΔW‖ / Σ‖W₀‖",
    "Urel_l2": "relative update Urel_l2 = ‖ΔW‖ / ‖W₀‖",
    "G": "gradient on the gate G",
    "F": "Fisher F",
    "Ppred": "predicted plasticity Ppred",
}
Content = Mapping[str, Any]


def known(rows: Sequence[Row], *columns: str) -> list[Row]:
    """The heads of which all these columns are known."""
    return [row for row in rows if all(present(row.get(column)) for column in columns)]


def case_keys(content: Content) -> dict[tuple[Any, ...], str]:
    """Head -> the kind of case that it is."""
    return {head_key(line): name for name in CASES for line in content["cases"].get(name) or ()}


def head_key(row: Row) -> tuple[Any, ...]:
    """Stack, kind, layer and head of a row."""
    return row.get("stack") or "enc", row.get("kind") or "self", row["layer"], row["head"]


@contextmanager
def importance_update_chart(content: Content) -> Iterator[Figure]:
    """fig_I_vs_U: importance before training against relative update; the corners of the cases are shaded."""
    with figure(6.2) as (drawn, axes):
        labels = scatter(axes, content, "I_pre", "Urel", corners=True)
        axes.set_title(told(content, "Ipre_Urel", "ρ(I_pre, Urel)"))
        _case_legend(drawn, axes)
        place_labels(drawn, axes, labels, _points(content, "I_pre", "Urel"))
        yield drawn


@contextmanager
def importance_gradient_chart(content: Content) -> Iterator[Figure]:
    """fig_I_vs_G: importance before training against the mean gradient on the gate."""
    with _pair(content, "I_pre", "G", "Ipre_G") as drawn:
        yield drawn


@contextmanager
def update_predicted_chart(content: Content) -> Iterator[Figure]:
    """fig_U_vs_Ppred: update against predicted plasticity with the least-squares line."""
    with _pair(content, "U", "Ppred", "U_Ppred", line=content.get("line")) as drawn:
        yield drawn


@contextmanager
def before_after_chart(content: Content) -> Iterator[Figure]:
    """fig_Ipre_vs_Ipost: importance before and after training on equal axes with the line of no change."""
    with figure(6.6) as (drawn, axes):
        labels = scatter(axes, content, "I_pre", "I_post")
        rows = known(content["heads"], "I_pre", "I_post")
        if rows:
            same_axes(axes, [float(row[key]) for row in rows for key in ("I_pre", "I_post")])
            far = sorted(rows, key=lambda row: -max(abs(row["I_pre"]), abs(row["I_post"])))[:8]
            names = [(row["I_pre"], row["I_post"], head_name(row, is_plain(content["heads"]))) for row in far]
            labels += [name for name in names if name not in labels]
        axes.set_title(told(content, "Ipre_Ipost", "ρ(I_pre, I_post)"))
        _case_legend(drawn, axes)
        place_labels(drawn, axes, labels, _points(content, "I_pre", "I_post"))
        yield drawn


@contextmanager
def _pair(content: Content, x: str, y: str, key: str, line: Mapping[str, Any] | None = None) -> Iterator[Figure]:
    """Two columns against each other; with `line` (slope, intercept, pearson) on linear axes and with that line."""
    with figure(5.6) as (drawn, axes):
        labels = scatter(axes, content, x, y, straight=line is not None)
        title = told(content, key, f"ρ({x}, {y})")
        if line and present(line.get("slope")):
            ends = list(axes.get_xlim())
            axes.plot(ends, [line["intercept"] + line["slope"] * end for end in ends], "--", color=INK, linewidth=1.2,
                      label="least-squares line", scalex=False, scaley=False)  # fmt: skip
            title += f"; Pearson r = {signed(line.get('pearson'))}"
        axes.set_title(title)
        _case_legend(drawn, axes)
        place_labels(drawn, axes, labels, _points(content, x, y))
        yield drawn


def scatter(
    axes: Axes, content: Content, x: str, y: str, *, corners: bool = False, straight: bool = False,
    look: tuple[str, str] | None = None,
) -> list[tuple[float, float, str]]:  # fmt: skip
    """Draws the heads of one run as points with the intervals of importance; returns the labels of the cases."""
    rows = known(content["heads"], x, y)
    colour, _ = look or looks([content.get("method")])[0]
    axes.set(xlabel=NAMES.get(x, x), ylabel=NAMES.get(y, y))
    if not rows:
        axes.text(0.5, 0.5, f"{x} or {y} was not measured", ha="center", va="center", transform=axes.transAxes)
        return []
    if not straight:
        for side, column in (("x", x), ("y", y)):
            scale(axes, side, [row[column] for row in rows])
    for column, side in ((x, "x"), (y, "y")):
        _intervals(axes, known(rows, f"{column}_lo", f"{column}_hi"), x, y, column, side)
    cases, plain = case_keys(content), is_plain(content["heads"])
    rest = [row for row in rows if head_key(row) not in cases]
    axes.plot([r[x] for r in rest], [r[y] for r in rest], "o", color=colour, alpha=0.5, markersize=6, mec="none",
              label="other heads" if cases else "heads")  # fmt: skip
    labels = []
    for name, (marker, label) in CASES.items():
        found = [row for row in rows if cases.get(head_key(row)) == name]
        if found:
            axes.plot([r[x] for r in found], [r[y] for r in found], marker, color=colour, markersize=8.5, mec=INK,
                      mew=0.9, label=label)  # fmt: skip
        labels += [(row[x], row[y], head_name(row, plain)) for row in found]
    axes.grid()
    if corners:
        shade_corners(axes, content)
    return labels


def _intervals(axes: Axes, rows: Sequence[Row], x: str, y: str, column: str, side: str) -> None:
    """95 % intervals of importance as thin lines behind the points; the more, the paler."""
    alpha = 0.28 if len(rows) <= 40 else 0.15
    for row in rows:
        ends, other = [row[f"{column}_lo"], row[f"{column}_hi"]], [row[y if side == "x" else x]] * 2
        axes.plot(*((ends, other) if side == "x" else (other, ends)), "-", color=INK, alpha=alpha, linewidth=0.9)


def shade_corners(axes: Axes, content: Content) -> None:
    """The two corners that the thresholds of the cases cut off, in grey."""
    limits = content["cases"].get("thresholds") or {}
    keys = [f"{name}_p{content.get(end)}" for name in ("I_pre", "Urel") for end in ("hi", "lo")]
    if not all(present(limits.get(key)) for key in keys):
        return
    important, unimportant, plastic, static = (float(limits[key]) for key in keys)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.fill_between([important, right], bottom, static, color=GRID, alpha=0.55, linewidth=0, zorder=0.5)
    axes.fill_between([left, unimportant], plastic, top, color=GRID, alpha=0.55, linewidth=0, zorder=0.5)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def same_axes(axes: Axes, values: Sequence[float]) -> None:
    """Equal scale and limits on both axes, and the line on which both numbers are the same."""
    for side in "xy":
        scale(axes, side, values)
    low = min(axes.get_xlim()[0], axes.get_ylim()[0])
    high = max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot([low, high], [low, high], "--", color=INK, linewidth=1, alpha=0.7, zorder=1, label="no change (y = x)")
    axes.set(xlim=(low, high), ylim=(low, high))


def _points(content: Content, x: str, y: str) -> list[tuple[float, float]]:
    return [(row[x], row[y]) for row in known(content["heads"], x, y)]


def _case_legend(drawn: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower left", ncols=4, fontsize=10, columnspacing=1.6)


def told(content: Content, key: str, name: str) -> str:
    """A rank correlation beside its chance band, as a title says it."""
    entry = content["rho"].get(key) or {}
    band = entry.get("rho95") or content["null"].get("rho95")
    chance = f" (by chance within ±{band:.2f})" if present(band) else ""
    return f"{name} = {signed(entry['rho'])}{chance}" if present(entry.get("rho")) else f"{name} is undefined"
