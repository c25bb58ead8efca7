"""What the pictures of heads share: looks of methods, scales for heavy tails, null bands, labels without collisions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraforge.report.plots import COLOURS, GRID, INK
from loraforge.report.tables import present

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
BLUE, GREEN, VERMILLION = COLOURS[0], COLOURS[2], COLOURS[5]
# Colour and shape of a method always go together; triangles and squares are kept for the cases.
_OTHERS = ((GREEN, "P"), (COLOURS[3], "X"), (COLOURS[1], "p"), (COLOURS[4], "h"), (COLOURS[6], "*"))
CASES = {
    "important_but_static": ("^", "important but static"),
    "plastic_but_unimportant": ("s", "plastic but unimportant"),
}
# How much larger than the median magnitude the largest must be before an axis turns logarithmic.
HEAVY = 20


@dataclass(frozen=True, slots=True)
class Bar:
    """One number beside what chance gives.

    Attributes:
        label: What it is.
        value: None where it is undefined.
        null: 95 % band under chance, or None where it is unknown.
        interval: 95 % interval of the value itself, likewise.
        look: (colour, marker).
    """

    label: str
    value: float | None
    null: tuple[float, float] | None = None
    interval: Sequence[float | None] | None = None
    look: tuple[str, str] = (BLUE, "o")


def looks(methods: Sequence[str | None]) -> list[tuple[str, str]]:
    """(colour, marker) of each run: full fine-tuning blue, LoRA vermillion, whatever comes again or else in turn."""
    fixed = {"fft": (BLUE, "o"), "full": (BLUE, "o"), "lora": (VERMILLION, "D")}
    found: list[tuple[str, str]] = []
    for method in methods:
        wanted = fixed.get(str(method).lower().split("-")[0])
        if wanted is None or wanted in found:
            wanted = next((look for look in _OTHERS if look not in found), _OTHERS[-1])
        found.append(wanted)
    return found


def run_looks(content: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Name -> (colour, marker)."""
    names = content["names"]
    return dict(zip(names, looks([content["runs"][name].get("method") or name for name in names]), strict=True))


def run_keys(styles: Mapping[str, tuple[str, str]]) -> list[Any]:
    """Marks of a legend, one a run."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=8, mec=INK, mew=0.6, label=name)
        for name, (colour, marker) in styles.items()
    ]


def head_name(row: Row, plain: bool = True) -> str:
    """`L3H7`; in front of it the stack and, of cross-attention, the kind where a model has several."""
    place = f"L{row['layer']}H{row['head']}"
    if plain:
        return place
    return f"{row.get('stack') or 'enc'}{' cross' if row.get('kind') == 'cross' else ''} {place}"


def is_plain(rows: Sequence[Row]) -> bool:
    """Whether layer and head alone name a head."""
    return len({(row.get("stack") or "enc", row.get("kind") or "self") for row in rows}) < 2


def signed(value: float | None, form: str = "+.2f") -> str:
    """A number with its sign, a true minus, a dash where it is undefined."""
    return "–" if value is None or not present(value) else f"{value:{form}}".replace("-", "−")


def scale(axes: Axes, side: str, values: Sequence[float]) -> str:
    """Sets the scale that shows all values: symmetric logarithm for heavy tails of both signs, logarithm, or linear."""
    finite = [float(value) for value in values if present(value)]
    sizes = sorted(abs(value) for value in finite if value)
    if not sizes or sizes[-1] < HEAVY * sizes[len(sizes) // 2]:
        axes.locator_params(axis="x" if side == "x" else "y", nbins=5 if side == "x" else 8)  # long numbers need room
        plain_numbers(axes, side)
        return "linear"
    if min(finite) > 0:
        getattr(axes, f"set_{side}scale")("log")
        plain_numbers(axes, side)
        return "log"
    # Linear up to about the median: below it is mostly noise, which decades of its own would spread over the picture.
    threshold = 10.0 ** round(math.log10(sizes[len(sizes) // 2]))
    getattr(axes, f"set_{side}scale")("symlog", linthresh=threshold, linscale=1.0)
    plain_numbers(axes, side)
    return "symlog"


def plain_numbers(axes: Axes, side: str) -> None:
    """Numbers of an axis as plain text with a true minus: powers would need formulas, which the style switches off."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis = getattr(axes, f"{side}axis")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
    axis.set_minor_formatter(NullFormatter())


def bars(axes: Axes, rows: Sequence[Bar], limits: tuple[float, float], form: str = "+.2f") -> None:
    """Numbers as rows: a bar from 0 with a marker, the chance band in grey behind it, the number at the right edge."""
    from matplotlib.ticker import MaxNLocator

    for place, bar in enumerate(rows):
        if bar.null is not None:
            low, high = bar.null
            axes.barh(place, high - low, 0.86, left=low, color=GRID, alpha=0.75, linewidth=0)
        colour, marker = bar.look
        if bar.value is not None and present(bar.value):
            axes.barh(place, bar.value, 0.34, color=colour, alpha=0.85)
            axes.plot([bar.value], [place], marker, color=colour, markersize=8, mec=INK, mew=0.6)
        if bar.interval is not None and all(present(end) for end in bar.interval):
            low, high = (float(end) for end in bar.interval if end is not None)
            axes.plot([low, high], [place, place], "-", color=INK, linewidth=1.3)
        number = signed(bar.value, form)
        axes.annotate(number, (1, place), (5, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                      va="center", fontsize=10, annotation_clip=False)  # fmt: skip
    axes.set_yticks(range(len(rows)), [bar.label for bar in rows])
    axes.set(xlim=limits, ylim=(len(rows) - 0.4, -0.6))
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=form.endswith("0f")))
    plain_numbers(axes, "x")


def null_key(drawn: Figure, extra: Sequence[Any] = ()) -> None:
    """The legend that says what the grey behind the numbers is."""
    from matplotlib.patches import Patch

    grey = Patch(facecolor=GRID, alpha=0.75, label="where 95 % of values fall by chance")
    handles = [*extra, grey]
    drawn.legend(handles=handles, loc="outside lower left", ncols=min(len(handles), 4), fontsize=10, columnspacing=1.6)


def symmetric(values: Sequence[float | None], least: float = 0.0) -> tuple[float, float]:
    """Limits that hold all values, equal on both sides of 0."""
    top = 1.08 * max([least, *(abs(value) for value in values if value is not None and present(value))])
    return -top, top


def place_labels(
    drawn: Figure, axes: Axes, labels: Sequence[tuple[float, float, str]], points: Sequence[tuple[float, float]] = ()
) -> int:
    """Writes labels beside their points where they hide no other label and as few points as can be.

    Args:
        drawn: The figure; its layout is settled here, so everything else must be on it.
        axes: Where the points are.
        labels: (x, y, text) in data units, the most important first.
        points: All drawn points, in data units.

    Returns:
        How many found room; the others are left out.
    """
    from matplotlib.transforms import Bbox

    drawn.draw_without_rendering()
    frame, unit = axes.get_window_extent(), drawn.dpi / 72
    dots = [tuple(axes.transData.transform(point)) for point in points]
    taken: list[Any] = []
    shown = 0
    for x, y, text in labels:
        px, py = axes.transData.transform((x, y))
        width, height = (5.9 * len(text) + 2) * unit, 10.5 * unit
        best: tuple[float, Any, float, float] | None = None
        for number, (dx, dy) in enumerate(_OFFSETS):
            left = px + dx * unit - (width if dx < 0 else width / 2 if dx == 0 else 0)
            box = Bbox.from_bounds(left, py + dy * unit - height / 2, width, height)
            if any(box.overlaps(other) for other in taken) or not _inside(box, frame):
                continue
            cost = 12 * sum(box.x0 - 3 < a < box.x1 + 3 and box.y0 - 3 < b < box.y1 + 3 for a, b in dots) + number
            if best is None or cost < best[0]:
                best = (cost, box, dx, dy)
        if best is None:
            continue
        _, box, dx, dy = best
        taken.append(box)
        line = {"arrowstyle": "-", "color": INK, "lw": 0.5, "alpha": 0.6} if math.hypot(dx, dy) > 16 else None
        note = axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", fontsize=8.5, color=INK, va="center",
                             ha="right" if dx < 0 else "center" if dx == 0 else "left",
                             arrowprops=line)  # fmt: skip
        note.set_in_layout(False)
        shown += 1
    return shown


_OFFSETS = [
    (radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle)))
    for radius in (8, 14, 22, 32)
    for angle in (0, 180, 35, -35, 145, -145, 70, -70, 110, -110)
]


def _inside(box: Any, frame: Any) -> bool:
    return bool(box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1)
