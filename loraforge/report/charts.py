"""The charts of the reports, each a context manager that yields a drawn figure for `plots.svg` or `plots.save_png`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loraforge.report.plots import COLOURS, GRID, INK, figure
from loraforge.report.tables import calibrated_layers, iterations, present

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Above this many modules a chart has no room for a name each.
NAMED = 40


@contextmanager
def accuracy_chart(results: Mapping[str, Any], title: str | None = None) -> Iterator[Figure]:
    """Accuracy by task: a bar a merge, with the base and the task's own adapter as lines across the group."""
    rows = results["rows"]
    merges = [row for row in rows if row["kind"] == "merge"]
    groups = ["mean", *map(str, results["tasks"])]
    with figure(4.6) as (drawn, axes):
        # The mean stands apart on the left: it is what most readers look for first.
        # It is wider, too, so that its numbers have room.
        places = [0.0, *(i + 1.6 for i in range(len(groups) - 1))]
        spans = [1.3, *(0.84 for _ in groups[1:])]
        for i, row in enumerate(merges):
            heights = [row["mean"], *row["accuracies"]]
            widths = [span / len(merges) for span in spans]
            middles = [p - s / 2 + (i + 0.5) * w for p, s, w in zip(places, spans, widths, strict=True)]
            axes.bar(middles, heights, [0.9 * w for w in widths], color=COLOURS[i % len(COLOURS)], label=row["name"])
            axes.text(middles[0], heights[0] + 1, f"{heights[0]:.0f}", ha="center", va="bottom", fontsize=9)
        _reference_lines(axes, rows, places, spans, str(results.get("inputs", "adapters")).removesuffix("s"))
        axes.set_xticks(places, groups)
        axes.get_xticklabels()[0].set_fontweight("bold")
        axes.set(ylim=(0, 103), xlim=(places[0] - 0.8, places[-1] + 0.6), ylabel="accuracy, %")
        axes.grid(axis="y")
        axes.axvline(0.87, color=GRID, linewidth=1.2)
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, columnspacing=1.6)
        if title:
            axes.set_title(title, fontsize=14, fontweight="bold", pad=12)
        yield drawn


def _reference_lines(
    axes: Axes, rows: Sequence[Mapping[str, Any]], places: Sequence[float], spans: Sequence[float], kind: str
) -> None:
    looks: dict[str, tuple[str, Any]] = {
        "base": ("base, no adapter" if kind == "adapter" else "base", (0, (1.2, 1.2))),
        "adapter": (f"the task's own {kind}", "solid"),
    }
    for row in rows:
        if row["kind"] in looks:
            label, line = looks[row["kind"]]
            lefts = [p - s / 2 - 0.04 for p, s in zip(places, spans, strict=True)]
            rights = [p + s / 2 + 0.04 for p, s in zip(places, spans, strict=True)]
            axes.hlines([row["mean"], *row["accuracies"]], lefts, rights, colors=INK, linestyles=line, linewidth=2.0,
                        label=label)  # fmt: skip


@contextmanager
def residual_chart(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Residual of every module before and after solving, in the model's order."""
    layers = [x for x in calibrated_layers(report) if present(x.get("residual_after"))]
    with figure(_height(layers)) as (drawn, axes):
        places = range(len(layers))
        before, after = ([layer.get(key) for layer in layers] for key in ("residual_before", "residual_after"))
        if any(present(value) for value in before):
            pairs = [(p, b, a) for p, b, a in zip(places, before, after, strict=True) if present(b)]
            axes.hlines([p for p, _, _ in pairs], [a for *_, a in pairs], [b for _, b, _ in pairs], colors=GRID, lw=2.5)
            axes.plot([b for _, b, _ in pairs], [p for p, _, _ in pairs], "o", mfc="none", mec=COLOURS[1], mew=1.8,
                      label="before")  # fmt: skip
        axes.plot(after, list(places), "o", color=COLOURS[0], label="after")
        _name_modules(axes, [layer["module"] for layer in layers])
        values = [float(v) for v in (*before, *after) if v is not None and present(v)]
        if min(values) > 0 and max(values) > 30 * min(values):
            _log_scale(axes, "x")
        else:
            axes.set_xlim(left=0)
        axes.set_xlabel("residual")
        axes.grid(axis="x")
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)
        yield drawn


@contextmanager
def sample_size_chart(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Effective sample size of every module."""
    layers = [layer for layer in calibrated_layers(report) if present(layer.get("ess"))]
    with figure(_height(layers)) as (drawn, axes):
        for place, layer in enumerate(layers):
            ess = layer["ess"] if isinstance(layer["ess"], list | tuple) else [layer["ess"]]
            values = [v for v in ess if present(v)]
            axes.hlines(place, 0, max(values), colors=GRID, linewidth=2.5)
            axes.plot(values, [place] * len(values), "o", color=COLOURS[2])
        _name_modules(axes, [layer["module"] for layer in layers])
        axes.set_xlim(left=0)
        shares = all(bar.get_xdata()[-1] <= 1 for bar in axes.lines)
        axes.set_xlabel(
            ("effective sample size, share of all" if shares else "effective samples")
            + (" (a dot a task)" if _lists(layers) else "")
        )
        axes.grid(axis="x")
        yield drawn


@contextmanager
def spectra_chart(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Singular values of every merged module, coloured by the last part of the module's name."""
    layers = [layer for layer in report.get("layers") or () if present(layer.get("spectrum"))]
    kinds = list(dict.fromkeys(str(layer["module"]).rsplit(".", 1)[-1] for layer in layers))
    with figure(4.4) as (drawn, axes):
        shown: set[str] = set()
        for layer in layers:
            kind = str(layer["module"]).rsplit(".", 1)[-1]
            values = [value if present(value) and value > 0 else float("nan") for value in layer["spectrum"]]
            # Matplotlib leaves a label that starts with an underscore out of the legend.
            label = "_" if kind in shown else kind
            colour = COLOURS[kinds.index(kind) % len(COLOURS)]
            axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=1.4, alpha=0.8, label=label,
                      marker="o" if len(values) == 1 else None)  # fmt: skip
            shown.add(kind)
        _log_scale(axes, "y")
        axes.set(xlabel="number of the singular value", ylabel="singular value")
        axes.grid()
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside right upper", title="module")
        yield drawn


@contextmanager
def iterations_chart(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Relative change and residual by iteration, on a logarithmic scale."""
    log = iterations(report)
    steps = [entry.get("k", i) for i, entry in enumerate(log)]
    with figure(3.6, columns=2) as (drawn, both):
        for axes, key, colour in zip(both, ("relative_change", "residual"), (COLOURS[0], COLOURS[5]), strict=True):
            known = [(k, entry[key]) for k, entry in zip(steps, log, strict=True) if present(entry.get(key))]
            axes.set_title(key.replace("_", " "))
            axes.set_xlabel("iteration")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid()
            if not known:
                axes.text(0.5, 0.5, "not reported", ha="center", transform=axes.transAxes)
                continue
            axes.plot([k for k, _ in known], [v for _, v in known], "o-", color=colour)
            if all(value > 0 for _, value in known):
                _log_scale(axes, "y")
        yield drawn


def _log_scale(axes: Axes, side: str) -> None:
    """A logarithmic axis whose numbers are plain text (powers would need the formulas that the style switches off)."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    getattr(axes, f"set_{side}scale")("log")
    axis = getattr(axes, f"{side}axis")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _height(layers: Sequence[object]) -> float:
    return max(2.2, 0.9 + 0.24 * len(layers)) if len(layers) <= NAMED else 8.0


def _name_modules(axes: Axes, names: Sequence[str]) -> None:
    """Modules from top to bottom; names while there is room, a count otherwise."""
    axes.set_ylim(len(names) - 0.4, -0.6)
    if len(names) <= NAMED:
        axes.set_yticks(range(len(names)), names, fontsize=9.5)
    else:
        axes.set_ylabel(f"{len(names)} modules in running order")


def _lists(layers: Sequence[Mapping[str, Any]]) -> bool:
    return any(isinstance(layer["ess"], list | tuple) for layer in layers)
