"""The charts of `loraforge inspect`: how far adapters agree, and how fast their spectra fall."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraforge.report.plots import COLOURS, GRID, INK, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Above so many adapters a cell has no room for its number.
NUMBERED = 12
_LONGEST = 22
_LEVELS = (0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Panel:
    """One matrix: its key in the result, what it shows, how it reads, its colours, and the value of no relation.

    Attributes:
        reach: Least span of the colour scale (from `middle`, or from 0), so that noise takes no strong colour.
    """

    key: str
    title: str
    reading: str
    colours: str
    middle: float | None
    reach: float


PANELS = (
    Panel("cosine", "Cosine of the updates", "1 the same, 0 unrelated, -1 opposite", "PuOr", 0.0, 0.25),
    Panel("sign_conflict", "Sign conflict", "share of entries of opposite sign; 0.5 unrelated", "PuOr_r", 0.5, 0.1),
    Panel("overlap_out", "Shared output directions", "overlap of column spaces; 0 none, 1 all", "Blues", None, 1.0),
    Panel("overlap_in", "Shared input directions", "overlap of row spaces; 0 none, 1 all", "Blues", None, 1.0),
)


@contextmanager
def conflict_chart(found: Mapping[str, Any]) -> Iterator[Figure]:
    """Four matrices over the adapters: cosine, sign conflict, shared output and input directions."""
    with figure(2 * _side(found), columns=2, rows=2) as (drawn, grid):
        _loosen(drawn)
        for axes, panel in zip(grid.flat, PANELS, strict=True):
            _matrix(drawn, axes, panel, found)
        yield drawn


@contextmanager
def energy_chart(found: Mapping[str, Any]) -> Iterator[Figure]:
    """Kept energy by rank, and singular values against the largest: a line an adapter, the mean over its modules."""
    with figure(4.2, columns=2) as (drawn, both):
        _loosen(drawn)
        _spectra(drawn, both, found["adapters"])
        yield drawn


@contextmanager
def inspection_picture(found: Mapping[str, Any]) -> Iterator[Figure]:
    """All of it on one page; of one adapter its spectra alone."""
    if len(found["adapters"]) < 2:
        with energy_chart(found) as drawn:
            yield drawn
        return
    side = _side(found)
    with figure(2 * side + 3.8, columns=2, rows=3, height_ratios=(side, side, 3.8)) as (drawn, grid):
        _loosen(drawn)
        for axes, panel in zip(grid[:2].flat, PANELS, strict=True):
            _matrix(drawn, axes, panel, found)
        _spectra(drawn, grid[2], found["adapters"])
        yield drawn


def _loosen(drawn: Figure) -> None:
    """Room around titles and between panels, in inches."""
    engine = drawn.get_layout_engine()
    if engine is not None:
        engine.set(w_pad=0.14, h_pad=0.12)  # type: ignore[call-arg]


def _side(found: Mapping[str, Any]) -> float:
    """Inches of a matrix with its title and names."""
    return 3.4 + 0.14 * min(len(found["adapters"]), 16)


def _matrix(drawn: Figure, axes: Axes, panel: Panel, found: Mapping[str, Any]) -> None:
    """One matrix; its diagonal says nothing and takes no colour, so that the others have the whole scale."""
    from matplotlib.ticker import FuncFormatter

    names = [_short(adapter["name"]) for adapter in found["adapters"]]
    values = [
        [math.nan if i == j or value is None else float(value) for j, value in enumerate(row)]
        for i, row in enumerate(found[panel.key])
    ]
    low, high = _limits([v for row in values for v in row if not math.isnan(v)], panel)
    places = range(len(names))
    axes.set_facecolor(GRID)
    mesh: Any = axes.pcolormesh(
        [p - 0.5 for p in range(len(names) + 1)], [p - 0.5 for p in range(len(names) + 1)], values,
        cmap=panel.colours, vmin=low, vmax=high, edgecolors=GRID, linewidth=0.6,
    )  # fmt: skip
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), aspect="equal")
    axes.set_xticks(places, names, rotation=40, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(places, names, fontsize=9)
    axes.spines[:].set_visible(False)
    axes.set_title(panel.title, fontweight="bold", pad=20)
    axes.text(0, 1.02, panel.reading, transform=axes.transAxes, fontsize=9, va="bottom")
    bar = drawn.colorbar(mesh, ax=axes, shrink=0.85, aspect=24, pad=0.02)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    bar.ax.tick_params(labelsize=8.5)
    bar.outline.set_visible(False)
    if len(names) > NUMBERED:
        return
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if not math.isnan(value):
                colour = _readable(mesh.cmap(mesh.norm(value)))
                axes.text(j, i, _number(value), ha="center", va="center", color=colour, fontsize=_size(len(names)))


def _limits(values: Sequence[float], panel: Panel) -> tuple[float, float]:
    """Ends of the colour scale: from 0, or as far on either side of the middle."""
    if panel.middle is None:
        return 0.0, max([panel.reach, *values])
    reach = max([panel.reach, *(abs(value - panel.middle) for value in values)])
    return panel.middle - reach, panel.middle + reach


def _spectra(drawn: Figure, both: Sequence[Axes], adapters: Sequence[Mapping[str, Any]]) -> None:
    """Two panels of lines and one legend below."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    left, right = both
    for i, adapter in enumerate(adapters):
        spectra = [m["spectrum"] for m in adapter["modules"] if m["spectrum"] and m["spectrum"][0] > 0.0]
        if not spectra:
            continue
        count = max(map(len, spectra))
        look: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "linewidth": 1.8,
            "marker": "o" if count == 1 else None,
        }
        look["linestyle"] = ("solid", "dashed", "dotted")[i // len(COLOURS) % 3]
        places = list(range(1, count + 1))
        left.plot(places, _mean_energy(spectra, count), label=_short(adapter["name"]), **look)
        right.plot(places, _mean_relative(spectra, count), **look)
    for level in _LEVELS:
        left.axhline(level, color=INK, linewidth=0.9, linestyle=(0, (1.2, 2.4)))
        left.annotate(f"{level:.0%}", (0.01, level), (0, -3), xycoords=left.get_yaxis_transform(),
                      textcoords="offset points", va="top", fontsize=8.5)  # fmt: skip
    for axes, title, label in (
        (left, "Energy that a rank keeps", "share of the squared norm"),
        (right, "Singular values", "against the largest, logarithmic"),
    ):
        axes.set_title(title, fontweight="bold")
        axes.set(xlabel="rank", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()
    left.set_ylim(top=1.02)
    right.set_yscale("log")
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.yaxis.set_minor_formatter(NullFormatter())
    drawn.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, columnspacing=1.6)


def _mean_energy(spectra: Sequence[Sequence[float]], count: int) -> list[float]:
    """Mean over modules of the energy in the first k directions, k = 1..count."""
    total = [0.0] * count
    for S in spectra:
        whole, kept = math.fsum(s * s for s in S), 0.0
        for k in range(count):
            kept += S[k] ** 2 if k < len(S) else 0.0
            total[k] += kept / whole
    return [value / len(spectra) for value in total]


def _mean_relative(spectra: Sequence[Sequence[float]], count: int) -> list[float]:
    """Geometric mean over modules of S_k / S_1, over those that have k directions; NaN where none has."""
    means = []
    for k in range(count):
        logs = [math.log(S[k] / S[0]) for S in spectra if k < len(S) and S[k] > 1e-12 * S[0]]
        means.append(math.exp(math.fsum(logs) / len(logs)) if logs else math.nan)
    return means


def _short(name: object) -> str:
    text = str(name)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.095 or value == 0.0 else f"{value:.3f}"


def _size(count: int) -> float:
    return max(5.5, min(10.0, 52.0 / max(count, 4)))


def _readable(colour: Sequence[float]) -> str:
    """Black or white, whichever stands out on a cell."""
    red, green, blue = colour[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"
