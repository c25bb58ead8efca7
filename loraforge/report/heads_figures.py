"""Pictures of heads beyond the scatter plots: heatmaps, components, deciles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loraforge.report.heads_axes import HEAVY, Row, looks, plain_numbers, scale
from loraforge.report.heads_charts import NAMES, known
from loraforge.report.plots import GRID, INK, figure
from loraforge.report.sequence_charts import DARK, LIGHT
from loraforge.report.tables import present

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Content = Mapping[str, Any]
PARTS = ("q", "k", "v", "o")
# Up to this many heads a cell has room for its number.
NUMBERED = 144
# Shades of a heatmap; from 49 on matplotlib embeds the colour bar as a picture. Odd, so that 0 is one of them.
_SHADES = 47
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def stacks(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Heads by the attention that they belong to: `encoder`, `decoder`, `decoder, cross-attention`."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        name = "decoder" if row.get("stack") == "dec" else "encoder"
        found.setdefault(name + (", cross-attention" if row.get("kind") == "cross" else ""), []).append(row)
    return found


@contextmanager
def heatmap_chart(content: Content, column: str) -> Iterator[Figure]:
    """fig_heatmap_*, layer x head: importance diverging around 0, magnitudes dark to light; numbers where they fit."""
    rows = known(content["heads"], column)
    panels = stacks(content["heads"])
    tall = max((row["layer"] for row in content["heads"]), default=0) + 1
    signed_values = column.startswith("I_")
    colours, norm = _colours([float(row[column]) for row in rows], signed_values)
    power = _power([abs(row[column]) for row in rows])
    with figure(min(1.7 + 0.36 * tall, 10.0), columns=len(panels), squeeze=False) as (drawn, grid):
        for axes, (name, heads) in zip(grid[0], panels.items(), strict=True):
            numbers = _numbers(column, power) if len(content["heads"]) <= NUMBERED else None
            mesh = _cells(axes, heads, column, colours, norm, numbers)
            if len(panels) > 1:
                axes.set_title(name, fontsize=12)
        bar = drawn.colorbar(mesh, ax=list(grid[0]), fraction=0.035, pad=0.015)
        bar.outline.set_edgecolor(GRID)
        _bar_numbers(bar, power, norm)
        unit = f" in 10{str(power).translate(_RAISED)}" if power else ""
        bar.set_label(NAMES.get(column, column) + unit)
        yield drawn


def _colours(values: Sequence[float], both_signs: bool) -> tuple[Any, Any]:
    """Colour map and scale; logarithmic beyond the median where the tail is heavy."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize, SymLogNorm

    sizes = sorted(abs(value) for value in values if value) or [1.0]
    middle, top = sizes[len(sizes) // 2], sizes[-1]
    heavy = top > HEAVY * middle
    if both_signs:
        norm = SymLogNorm(middle, linscale=1.0, vmin=-top, vmax=top) if heavy else Normalize(-top, top)
        return colormaps["PuOr"].resampled(_SHADES), norm
    least = min(values, default=0.0)
    norm = LogNorm(least, top) if heavy and least > 0 else Normalize(least if least < top else 0, top)
    return colormaps["cividis"].resampled(_SHADES), norm


def _power(values: Sequence[float]) -> int:
    """Power of ten that makes the numbers of cells short: 0 where they are already."""
    sizes = sorted(value for value in values if value)
    if not sizes or (sizes[len(sizes) // 2] >= 0.1 and sizes[-1] < 1000):
        return 0
    return math.floor(math.log10(sizes[len(sizes) // 2]))


def _numbers(column: str, power: int) -> Any:
    def told(value: float) -> str:
        scaled = value / 10.0**power
        digits = 0 if abs(scaled) >= 99.5 else 1 if abs(scaled) >= 0.95 else 2
        return f"{scaled:.{digits}f}".replace("-", "−") if value else "0"

    return told


def _cells(axes: Axes, rows: Sequence[Row], column: str, colours: Any, norm: Any, told: Any) -> Any:
    """One attention's heads; a head that was not measured stays blank and is crossed out."""
    import numpy as np

    layers, heads = (max(row[key] for row in rows) + 1 for key in ("layer", "head"))
    grid = np.full((layers, heads), np.nan)
    for row in rows:
        if present(row.get(column)):
            grid[row["layer"], row["head"]] = row[column]
    mesh = axes.pcolormesh(np.ma.masked_invalid(grid), cmap=colours, norm=norm, edgecolors=GRID, linewidth=0.5)
    size = min(9.5, 100 / max(heads, 1))
    for row in rows:
        place = row["head"] + 0.5, row["layer"] + 0.5
        value = row.get(column)
        if value is None or not present(value):
            axes.text(*place, "×", ha="center", va="center", color=INK, fontsize=9)
            continue
        red, green, blue, _ = colours(norm(value))
        ink = DARK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else LIGHT
        # Where there is no room for numbers a minus tells the two ends of the colours apart in print.
        text = told(value) if told else "−" if value < 0 and abs(norm(value) - norm(0.0)) > 0.15 else ""
        if text:
            axes.text(*place, text, ha="center", va="center", color=ink, fontsize=size if told else 7)
    axes.set(xlim=(0, heads), ylim=(layers, 0), xlabel="head", ylabel="layer")
    for axis, count in ((axes.xaxis, heads), (axes.yaxis, layers)):
        step = max(1, math.ceil(count / 24))
        axis.set_ticks([i + 0.5 for i in range(0, count, step)], [str(i) for i in range(0, count, step)])
    axes.spines[:].set_visible(False)
    return mesh


def _bar_numbers(bar: Any, power: int, norm: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, SymmetricalLogLocator

    if hasattr(norm, "linthresh"):
        decade = 10.0 ** math.ceil(math.log10(norm.linthresh))
        bar.ax.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=decade))
    elif type(norm).__name__ == "Normalize":
        bar.ax.yaxis.set_major_locator(MaxNLocator(6))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10.0**power:g}".replace("-", "−")))


@contextmanager
def components_chart(content: Content) -> Iterator[Figure]:
    """fig_components: which projections the update went into, layer by layer: squared norms, and their shares."""
    from matplotlib import colormaps

    layers: dict[tuple[str, int], dict[str, float]] = {}
    for name, rows in stacks(known(content["heads"], *(f"U{part}" for part in PARTS))).items():
        for row in rows:
            sums = layers.setdefault((name, row["layer"]), dict.fromkeys(PARTS, 0.0))
            for part in PARTS:
                sums[part] += row[f"U{part}"] ** 2
    several = len({name for name, _ in layers}) > 1
    names = [str(layer) for _, layer in layers]
    if several:
        names = [f"{name[:3]}{' cross' if 'cross' in name else ''} {layer}" for name, layer in layers]
    with figure(4.2, columns=2) as (drawn, both):
        for axes, shares in zip(both, (False, True), strict=True):
            floor = [0.0] * len(layers)
            for i, part in enumerate(PARTS):
                tops = [sums[part] / ((sum(sums.values()) or 1.0) if shares else 1.0) for sums in layers.values()]
                axes.bar(range(len(layers)), tops, 0.8, bottom=floor, color=colormaps["cividis"](0.08 + 0.29 * i),
                         edgecolor=INK, linewidth=0.6, label=f"W_{part}")  # fmt: skip
                floor = [low + top for low, top in zip(floor, tops, strict=True)]
            step = max(1, math.ceil(len(layers) / 16))
            axes.set_xticks(range(0, len(layers), step), names[::step], rotation=40 if several else 0)
            axes.set(title="share of the update" if shares else "squared update Σ‖ΔW‖² of the heads", xlabel="layer")
            axes.grid(axis="y")
            plain_numbers(axes, "y")
        both[1].set_ylim(0, 1)
        handles, labels = both[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower left", ncols=4)
        yield drawn


def deciles(values: Sequence[float], count: int = 10) -> list[list[int]]:
    """Indices by quantile bucket: every value in exactly one, equal values in the same; ties may leave some empty."""
    import numpy as np

    edges = np.quantile(values, [i / count for i in range(1, count)])
    places = np.searchsorted(edges, values, side="right")
    return [np.flatnonzero(places == i).tolist() for i in range(count)]


@contextmanager
def bucket_chart(content: Content) -> Iterator[Figure]:
    """fig_bucket_orthogonality: the relative update in ten buckets of importance, and the other way round."""
    rows = known(content["heads"], "I_pre", "Urel")
    colour, _ = looks([content.get("method")])[0]
    with figure(4.4, columns=2) as (drawn, both):
        for axes, (by, of) in zip(both, (("I_pre", "Urel"), ("Urel", "I_pre")), strict=True):
            axes.set(xlabel=f"decile of {by} (1 = least)", ylabel=NAMES[of])
            axes.set_xticks(range(1, 11))
            if not rows:
                continue
            groups = deciles([row[by] for row in rows])
            _violins(axes, [[rows[i][of] for i in group] for group in groups], colour)
            middle = sorted(row[of] for row in rows)[len(rows) // 2]
            axes.axhline(middle, color=INK, linewidth=1, linestyle=":")
            axes.grid(axis="y")
        both[0].set_title("a flat row of medians: no relation", fontsize=12)
        yield drawn


def _violins(axes: Axes, groups: Sequence[Sequence[float]], colour: str) -> None:
    """A violin a bucket with its heads as points and the median as a bar; small buckets are points alone."""
    scale(axes, "y", [value for group in groups for value in group])
    for place, group in enumerate(groups, 1):
        if not group:
            axes.annotate("none", (place, 0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
            continue
        if len(set(group)) > 3 and axes.get_yscale() == "linear":
            drawn = axes.violinplot([list(group)], [place], widths=0.85, showextrema=False)
            for body in drawn["bodies"]:  # type: ignore[attr-defined]
                body.set(facecolor=colour, alpha=0.25, edgecolor="none")
        axes.plot([place] * len(group), group, "o", color=colour, alpha=0.55, markersize=4.5, mec="none")
        middle = sorted(group)[len(group) // 2]
        axes.plot([place - 0.3, place + 0.3], [middle, middle], "-", color=INK, linewidth=2)
