"""Pictures of the update's singular values: fig_spectrum, fig_path, compare_ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loraforge.report.heads_axes import Row, plain_numbers, run_keys, run_looks
from loraforge.report.plots import GRID, INK, figure
from loraforge.report.tables import present

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Content = Mapping[str, Any]


@contextmanager
def spectrum_chart(content: Content) -> Iterator[Figure]:
    """fig_spectrum: singular values of every module's update, and how much of the rank each uses, layer by layer."""
    lines = [line for line in content["spectrum"] if present(line.get("sv"))]
    parts = list(dict.fromkeys(str(line.get("part") or "other") for line in lines))
    styles = dict(zip(parts, ((c, s, m) for c, (s, m) in zip(_PART_COLOURS, _PART_LINES, strict=True)), strict=False))
    with figure(4.6, columns=2) as (drawn, (left, right)):
        for line in lines:
            top = max(line["sv"]) or 1.0
            values = [value / top if value > 0 else math.nan for value in line["sv"]]
            colour, style, _ = styles[str(line.get("part") or "other")]
            left.plot(range(1, len(values) + 1), values, style, color=colour, linewidth=1.1, alpha=0.75,
                      marker="." if len(values) == 1 else None)  # fmt: skip
        left.set_yscale("log")
        # What is a millionth of the largest is rounding, not update.
        left.set_ylim(bottom=max(left.get_ylim()[0], 1e-6))
        left.set(title="singular values / largest", xlabel="number of the singular value")
        for part in parts:
            own = [line for line in lines if str(line.get("part") or "other") == part]
            found = [(line.get("layer"), line["eff_rank"]) for line in own if present(line.get("eff_rank"))]
            colour, style, marker = styles[part]
            places = [i if layer is None else layer for i, (layer, _) in enumerate(found)]
            right.plot(places, [value for _, value in found], style, marker=marker, color=colour, label=part)
        ranks = {line.get("rank") for line in lines if present(line.get("rank"))}
        top = max([line["eff_rank"] for line in lines if present(line.get("eff_rank"))], default=1.0)
        for rank in sorted(rank for rank in ranks if rank <= 4 * top):
            right.axhline(rank, color=INK, linewidth=1, linestyle=":", label=f"rank {rank}: the ceiling")
        right.set(title="effective rank", xlabel="layer")
        right.set_ylim(bottom=0)
        right.xaxis.get_major_locator().set_params(integer=True)
        for axes in (left, right):
            axes.grid()
            plain_numbers(axes, "y")
        handles, labels = right.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower left", ncols=6)
        yield drawn


_PART_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#8A7FD1", "#CC79A7", "#56B4E9", "#999999")
_PART_LINES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ("-", "v"), ("--", "P"), ("-.", "X"), (":", "*"))


@contextmanager
def path_chart(content: Content) -> Iterator[Figure]:
    """fig_path: how far each head was on its way at each snapshot, and when the order of the heads was settled."""
    path = content["path"]
    steps, total = path["steps"], path["total"]
    with figure(4.2, columns=2) as (drawn, (left, right)):
        shares = [_share(line.get("U") or ()) for line in path.get("lines") or ()]
        ends = [sorted(values) for values in zip(*(s for s in shares if len(s) == len(steps)), strict=False)]
        if ends:
            low, high = ([values[int(q * (len(values) - 1))] for values in ends] for q in (0.1, 0.9))
            left.fill_between(steps, low, high, color=GRID, alpha=0.75, linewidth=0, label="four of five heads")
        left.plot(steps, _share(total["U"]), "o-", color=INK, markersize=5, label="all heads together")
        if present(total.get("half_step")):
            left.plot([total["half_step"]], [0.5], "D", color="#D55E00", markersize=8, label="half of the update")
        left.set(title="size of the update / its last size", xlabel="step")
        left.set_ylim(bottom=0)
        known = [(s, rho) for s, rho in zip(steps, path.get("rank_correlation") or (), strict=False) if present(rho)]
        right.plot([s for s, _ in known], [rho for _, rho in known], "s-", color="#0072B2", markersize=5)
        right.set(title="order of the heads: ρ with the last update", xlabel="step", ylim=(-1.03, 1.03))
        for axes in (left, right):
            axes.grid()
            plain_numbers(axes, "y")
        drawn.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3)
        yield drawn


def _share(values: Sequence[float]) -> list[float]:
    """Of the last; all 0 where that is 0."""
    last = values[-1] if values else 0.0
    return [value / last if last else 0.0 for value in values]


@contextmanager
def ranks_chart(content: Content) -> Iterator[Figure]:
    """compare_ranks: effective rank of the update, layer by layer, a panel a projection; dotted: the LoRA ceiling."""
    styles = run_looks(content)
    lines = {name: _ranked(content["runs"][name]) for name in content["names"]}
    parts = list(dict.fromkeys(str(x.get("part") or "other") for found in lines.values() for x in found))[:8]
    columns = min(len(parts), 4)
    rows = math.ceil(len(parts) / columns)
    with figure(3.3 * rows + 0.6, columns, rows, squeeze=False, sharey=True, sharex=True) as (drawn, grid):
        for axes, part in zip(grid.flat, parts, strict=False):
            for name, found in lines.items():
                own = [line for line in found if str(line.get("part") or "other") == part]
                colour, marker = styles[name]
                places = [i if line.get("layer") is None else line["layer"] for i, line in enumerate(own)]
                axes.plot(places, [line["eff_rank"] for line in own], "-", marker=marker, color=colour, markersize=5)
                ceilings: set[Any] = {line.get("rank") for line in own} if _is_lora(content["runs"][name]) else set()
                for rank in sorted(rank for rank in ceilings if present(rank)):
                    axes.axhline(rank, color=colour, linewidth=1, linestyle=":")
            axes.set_title(part, fontsize=12)
            axes.set_yscale("log", base=2)
            axes.grid()
            plain_numbers(axes, "y")
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in grid[-1]:
            axes.set_xlabel("layer")
        for axes in list(grid.flat)[len(parts) :]:
            axes.set_visible(False)
        grid[0][0].set_ylabel("effective rank of ΔW")
        drawn.legend(handles=run_keys(styles), loc="outside lower left", ncols=4, fontsize=10)
        yield drawn


def _ranked(run: Content) -> list[Row]:
    return [line for line in run["spectrum"] if present(line.get("eff_rank"))]


def _is_lora(run: Content) -> bool:
    return str(run.get("method")).lower().startswith("lora")


def has_ranks(content: Content) -> bool:
    """Whether at least two runs have spectra."""
    return sum(bool(_ranked(content["runs"][name])) for name in content["names"]) >= 2
