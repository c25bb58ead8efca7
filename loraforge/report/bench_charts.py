"""The picture of `loraforge bench`: how many times faster, and how time grows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraforge.report.plots import COLOURS, GRID, INK, WIDTH, figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
# Forms of this program; all others are what it is compared with.
_OURS = ("cuda", "cpu", "loraforge", "sweep", "iterate", "iteris-plus")
_PEERS = ("reference", "torch", "peft", "document")
_TITLES = {
    "kernels": "Operators: times faster than PyTorch",
    "merge": "Merges: times faster than peers",
    "iteris": "Calibrated merge: times faster than the document's loop",
    "train": "Continual training: times faster than loops, lists and PEFT",
    "heads": "Measuring heads: times faster than whole passes, and than merging",
    "scale": "Seconds against size (exponent)",
}
_BAR = 0.23  # inches of a case
_SCALE = 4.6  # inches of the panel of lines
_WIDE = 16.0  # inches of two columns
_THICKEST = 0.6


def save_bench_picture(path: Path, result: Row) -> Path:
    """Writes the picture of a result as PNG."""
    return save_png(partial(bench_chart, result), path)


@contextmanager
def bench_chart(result: Row) -> Iterator[Figure]:
    """A panel a group: bars of speed-ups on a logarithmic axis, lines for `scale`; the operators beside the rest."""
    groups = [group for group in result["groups"] if any(row["group"] == group for row in result["rows"])]
    speedups = {group: _speedups(result, group) for group in groups if group != "scale"}
    heights = {group: _SCALE if group == "scale" else 1.2 + _BAR * max(2, len(speedups[group])) for group in groups}
    beside = [group for group in groups if group != "kernels"] if "kernels" in groups else []
    height = max(heights["kernels"], sum(heights[group] for group in beside)) if beside else sum(heights.values())
    with figure(height + 0.5) as (drawn, first):
        first.remove()
        drawn.set_size_inches(_WIDE if beside else WIDTH, height + 0.5)
        mosaic = [["kernels", group] for group in beside] if beside else [[group] for group in groups]
        panels = drawn.subplot_mosaic(mosaic, height_ratios=[heights[row[-1]] for row in mosaic])
        for group in groups:
            axes = panels[group]
            axes.set_title(_TITLES[group], fontweight="bold")
            if group == "scale":
                _draw_lines(axes, result)
            else:
                _draw_bars(axes, speedups[group])
        machine = result["machine"]
        where = machine["gpu"] if str(result["device"]).startswith("cuda") else machine["machine"]
        drawn.suptitle(
            f"{where}, {machine['threads']} thread{'' if machine['threads'] == 1 else 's'}, torch {machine['torch']}, "
            f"commit {machine['commit']}, {machine['date']}",
            fontsize=10, x=0.01, ha="left",
        )  # fmt: skip
        yield drawn


def _speedups(result: Row, group: str) -> list[tuple[str, dict[str, float]]]:
    """(case or side, peer -> seconds of the peer over ours)."""
    cases: dict[str, dict[str, Row]] = {}
    for row in result["rows"]:
        if row["group"] == group:
            cases.setdefault(row["case"], {})[row["form"]] = row
    found = []
    for case, forms in cases.items():
        peers = {name: forms[name] for name in _PEERS if name in forms}
        for name in _OURS:
            if name in forms and forms[name]["seconds"] > 0.0:
                label = (
                    case if group in ("kernels", "train", "heads") else name if group == "iteris" else forms[name]["op"]
                )
                found.append((label, {p: row["seconds"] / forms[name]["seconds"] for p, row in peers.items()}))
    return found


def _draw_bars(axes: Axes, cases: Sequence[tuple[str, dict[str, float]]]) -> None:
    """A group of bars a case, one a peer, from 1 to the speed-up."""
    peers = [peer for peer in _PEERS if any(peer in times for _, times in cases)]
    if not cases or not peers:
        axes.text(0.5, 0.5, "no compiled form was measured", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    # A peer has one colour in all panels.
    drawn: dict[str, tuple[list[float], list[float], list[float]]] = {peer: ([], [], []) for peer in peers}
    for at, (_, times) in enumerate(cases):
        for place, (peer, value) in enumerate(times.items()):
            for values, found in zip(
                drawn[peer], (at - 0.4 + 0.8 * (place + 0.5) / len(times), value, 0.8 / len(times)), strict=True
            ):
                values.append(found)
    for peer, (middles, values, thick) in drawn.items():
        lengths, bars = [value - 1.0 for value in values], [min(0.9 * t, _THICKEST) for t in thick]
        axes.barh(middles, lengths, bars, left=1.0, color=COLOURS[_PEERS.index(peer)], label=f"over {peer}")
        for middle, value in zip(middles, values, strict=True):
            axes.annotate(
                f"{value:.3g}x", (max(value, 1.0), middle), xytext=(4, 0), textcoords="offset points", va="center",
                fontsize=7.5, fontweight="bold" if value < 1.0 else "normal",
            )  # fmt: skip
    _log(axes, "x")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 1.3)
    axes.axvline(1.0, color=INK, linewidth=1.2)
    axes.set_yticks(range(len(cases)), [name for name, _ in cases], fontsize=8.5)
    axes.set_ylim(len(cases) - 0.45, -0.55)
    axes.grid(axis="x")
    axes.legend(loc="lower right", fontsize=9, frameon=True, edgecolor=GRID)


def _draw_lines(axes: Axes, result: Row) -> None:
    """Seconds against each axis, both logarithmic; a line an axis and form."""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in result["rows"]:
        if row["group"] == "scale":
            lines.setdefault((row["op"], row["form"]), []).append(row)
    exponents = {(f["axis"], f["form"]): f for f in result["fits"] if f["quantity"] == "seconds"}
    axis_names = list(dict.fromkeys(axis for axis, _ in lines))
    for (axis, form), rows in lines.items():
        fit = exponents.get((axis, form))
        label = axis if form == "loraforge" else f"{axis}, dense {form}"
        if fit is not None:
            label += f" ({fit['exponent']:.2f}" + (f" ± {fit['stderr']:.2f})" if fit["stderr"] is not None else ")")
        axes.plot(
            [row["size"][axis] for row in rows], [row["seconds"] for row in rows],
            "o-" if form == "loraforge" else "s--", color=COLOURS[axis_names.index(axis) % len(COLOURS)], label=label,
        )  # fmt: skip
    _log(axes, "x")
    _log(axes, "y")
    axes.set(xlabel="adapters, rank, width, modules or tokens", ylabel="seconds")
    axes.grid()
    axes.legend(loc="upper left", fontsize=8.5, frameon=True, edgecolor=GRID)


def _log(axes: Axes, side: str) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{side}scale")("log")
    axis = getattr(axes, f"{side}axis")
    low, high = axes.get_xlim() if side == "x" else axes.get_ylim()
    if high < 100.0 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
