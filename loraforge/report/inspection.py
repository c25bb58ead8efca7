"""The report and the picture of `loraforge inspect`: what is in adapters, and where they disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loraforge.report.agreement_charts import conflict_chart, energy_chart, inspection_picture
from loraforge.report.page import fold, page, points, section, table, text, whole_file, write_page
from loraforge.report.plots import save_png, svg
from loraforge.report.tables import Table, format_bytes

# Modules that the page names as those of least agreement.
WORST = 12
_MISSING = 8
_SHARES = ("sign_conflict", "overlap_out", "overlap_in")


def inspection_html(found: Mapping[str, Any]) -> str:
    """What `loraforge.inspect` found as a self-contained HTML page."""
    adapters = found["adapters"]
    several = len(adapters) > 1
    parts = [
        "<h1>What is in the adapters</h1>" if several else "<h1>What is in the adapter</h1>",
        text("Every number on this page is computed from the factors of the adapters.", "lead"),
        table(adapters_table(found)),
        *(text(f"{adapter['name']}: {note}", "warn") for adapter in adapters for note in adapter["notes"]),
        _coverage(found),
        _conflicts(found) if several else "",
        section(
            "Spectra",
            text("The mean over the modules of an adapter. Where the left curve meets a dotted line, that rank keeps "
                 "so much of the squared norm: what lies to the right of it can be cut cheaply."),
            svg(partial(energy_chart, found), "kept energy and singular values by rank"),
        ),
        section("Module by module", *(fold(a["name"], table(modules_table(a))) for a in adapters)),
    ]  # fmt: skip
    return page("loraforge inspect", parts)


def write_inspection_report(path: Path, found: Mapping[str, Any]) -> Path:
    """Writes `inspection_html` to a file that appears whole or not at all."""
    return write_page(Path(path), inspection_html(found))


def save_inspection_picture(path: Path, found: Mapping[str, Any]) -> Path:
    """Draws conflicts and spectra as a PNG that appears whole or not at all."""
    with whole_file(path) as draft:
        save_png(partial(inspection_picture, found), draft)
    return path


def adapters_table(found: Mapping[str, Any]) -> Table:
    """A row an adapter: format, sizes, mean ranks."""
    headers = (
        "adapter", "format", "base", "modules", "rank", "effective rank", "stable rank", "rank for 90 %",
        "rank for 99 %", "norm", "size",
    )  # fmt: skip
    rows = tuple(
        (
            a["name"], a["format"], a["base"], len(a["modules"]), _span([m["rank"] for m in a["modules"]]),
            a["effective_rank"], a["stable_rank"], a["rank_90"], a["rank_99"], a["norm"], format_bytes(a["bytes"]),
        )
        for a in found["adapters"]
    )  # fmt: skip
    return Table(headers, rows, caption="Effective, stable and energy ranks are means over the modules.")


def modules_table(adapter: Mapping[str, Any]) -> Table:
    """A row a module of one adapter."""
    keys = ("rank", "scaling", "norm", "effective_rank", "stable_rank", "rank_90", "rank_99")
    rows = tuple(
        (m["module"], m["kind"], " x ".join(map(str, m["shape"])), *(m[key] for key in keys))
        for m in adapter["modules"]
    )
    return Table(("module", "kind", "shape", *(_title(key) for key in keys)), rows)


def worst_table(found: Mapping[str, Any]) -> Table:
    """The modules on which the adapters agree least, by the mean cosine of all pairs."""
    rows = []
    for module, cosines in found["cosine_modules"].items():
        shares = found["conflict_modules"][module]
        cells = [_mean_pair(cosines), *(_mean_pair(shares[key]) for key in _SHARES)]
        if cells[0] is not None:
            rows.append((module, *cells))
    rows.sort(key=lambda row: float(row[1]))
    headers = ("module", "mean cosine", "sign conflict", "shared outputs", "shared inputs")
    return Table(headers, tuple(rows[:WORST]), caption="Means over all pairs of adapters that have the module.")


def _coverage(found: Mapping[str, Any]) -> str:
    coverage = found["coverage"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in coverage["kinds"].items())
    several = len(found["adapters"]) > 1
    told = [f"{coverage['modules']} modules are adapted: {kinds}."]
    if several:
        told = [
            f"{coverage['modules']} modules are adapted by any of them ({kinds}), {coverage['shared_by_all']} by all."
        ]
    for name, missing in coverage["missing"].items():
        if missing:
            more = f" and {len(missing) - _MISSING} more" if len(missing) > _MISSING else ""
            told.append(f"{name} lacks {len(missing)}: {', '.join(missing[:_MISSING])}{more}.")
    for adapter in found["adapters"]:
        if adapter["heads"]:
            told.append(f"{adapter['name']} also holds {len(adapter['heads'])} tensors of fully trained modules.")
    return section("Coverage", points(told))


def _conflicts(found: Mapping[str, Any]) -> str:
    worst = worst_table(found)
    return section(
        "Conflicts",
        text("How the updates of two adapters relate, over all modules that both change. A negative cosine means that "
             "each undoes a part of the other when they are added. Shared directions with a small cosine mean that "
             "both write to or read from the same places, with other content."),
        svg(partial(conflict_chart, found), "cosine, sign conflict and shared directions of all pairs"),
        "<h3>Where they agree least</h3>" if worst.rows else "",
        table(worst) if worst.rows else "",
    )  # fmt: skip


def _mean_pair(matrix: Sequence[Sequence[float | None]]) -> float | None:
    """Mean of the entries above the diagonal that are known."""
    known = [value for i, row in enumerate(matrix) for value in row[i + 1 :] if value is not None]
    return sum(known) / len(known) if known else None


def _title(key: str) -> str:
    return {"rank_90": "rank for 90 %", "rank_99": "rank for 99 %"}.get(key, key.replace("_", " "))


def _span(values: Sequence[int]) -> str:
    if not values:
        return "–"
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
