"""Tables as plain data: headers, rows, which cells are best. Who prints them decides how they look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Table:
    """One table.

    Attributes:
        headers: Column titles.
        rows: Cells by row: text, numbers or None (not measured).
        best: (row, column) of the cells to be highlighted.
        caption: One sentence below the table.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()
    caption: str = ""


def format_bytes(count: float) -> str:
    """A size in the largest binary unit that leaves at least one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_cell(value: object) -> str:
    """A cell as text: floats with four significant digits, None and NaN as a dash, lists joined."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(format_cell(item) for item in value)
    if isinstance(value, float) and not isinstance(value, bool):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
    return str(value)


def accuracy_table(results: Mapping[str, Any]) -> Table:
    """Accuracy in percent by model and task; the best merge of each column is marked (ties all)."""
    tasks = tuple(map(str, results["tasks"]))
    rows = results["rows"]
    cells = [(str(row["name"]), *(_percent(v) for v in row["accuracies"]), _percent(row["mean"])) for row in rows]
    merges = [i for i, row in enumerate(rows) if row["kind"] == "merge"]
    best = {
        (i, column)
        for column in range(1, len(tasks) + 2)
        for i in merges
        if cells[i][column] == max((cells[k][column] for k in merges), key=_number)
    }
    return Table(("model", *tasks, "mean"), tuple(cells), frozenset(best), "Accuracy in percent on held-out images.")


def cost_table(results: Mapping[str, Any]) -> Table:
    """Seconds, bytes and largest rank of every merge."""
    rows = tuple(
        (row["name"], _rounded(row["seconds"], 2), format_bytes(row["bytes"]), row.get("rank"), row.get("needs"))
        for row in results["rows"]
        if row["kind"] == "merge"
    )
    return Table(("method", "seconds", "size", "largest rank", "needs"), rows)


def adapters_table(report: Mapping[str, Any]) -> Table:
    """Path, digest, modules, ranks and weight of the merged adapters."""
    adapters = report.get("adapters") or ()
    weights = report.get("weights") or [None] * len(adapters)
    rows = tuple(
        (a.get("path"), _start(a.get("sha256")), a.get("modules"), a.get("ranks"), weight)
        for a, weight in zip(adapters, weights, strict=False)
    )
    return Table(("adapter", "sha256 (start)", "modules", "ranks", "weight"), rows)


def calibration_table(report: Mapping[str, Any]) -> Table:
    """Source, digest and samples of the calibration sets."""
    rows = tuple(
        (c.get("name"), c.get("source"), _start(c.get("sha256")), c.get("samples"), c.get("available"))
        for c in report.get("calibration") or ()
    )
    return Table(("calibration set", "source", "sha256 (start)", "samples used", "available"), rows)


def kernels_table(kernels: Mapping[str, Any]) -> Table:
    """How often each operator ran, by implementation."""
    calls: Mapping[str, Mapping[str, Any]] = kernels.get("calls") or {}
    rows = tuple((name, how, count) for name, counts in calls.items() for how, count in counts.items())
    return Table(("operator", "implementation", "calls"), rows)


def layers_table(report: Mapping[str, Any]) -> Table:
    """A row a module: rank, kept energy, error, and whatever the calibrated methods report about it."""
    solved = {layer["module"]: layer for layer in calibrated_layers(report)}
    plain: tuple[tuple[str, str], ...] = (
        ("rank", "rank"), ("norm", "norm"), ("kept energy", "kept_energy"), ("relative error", "relative_error"),
    )  # fmt: skip
    extra = (
        ("tokens", "tokens"), ("λ", "lambda"), ("eff. samples", "ess"), ("σ", "sigma"), ("α", "alpha"), ("ρ", "rho"),
        ("held-out gain", "heldout_gain"), ("condition", "condition"), ("residual before", "residual_before"),
        ("residual after", "residual_after"), ("solver", "solver"),
    )  # fmt: skip
    used = [(title, key) for title, key in extra if any(present(layer.get(key)) for layer in solved.values())]
    rows = tuple(
        (
            layer["module"],
            *(layer.get(key) for _, key in plain),
            *(_span(solved.get(layer["module"], {}).get(key)) for _, key in used),
        )
        for layer in report.get("layers") or ()
    )
    return Table(("module", *(title for title, _ in plain), *(title for title, _ in used)), rows)


def iterations_table(report: Mapping[str, Any]) -> Table:
    """Relative change and residual by iteration."""
    rows = tuple((i.get("k"), i.get("relative_change"), i.get("residual")) for i in iterations(report))
    return Table(("iteration", "relative change", "residual"), rows)


def phases_table(phases: Mapping[str, Any]) -> Table:
    """Seconds by phase."""
    return Table(("phase", "seconds"), tuple((name, _rounded(value, 2)) for name, value in phases.items()))


def calibrated_layers(report: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """What a calibrated method says about each module; empty for the others."""
    return (report.get("iteris") or {}).get("layers") or ()


def iterations(report: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The iteration log of a calibrated method; empty for the others."""
    return (report.get("iteris") or {}).get("iterations") or ()


def present(value: object) -> bool:
    """Whether a value of a report says something: not None, not an empty list, not NaN, not a list of None."""
    if isinstance(value, list | tuple):
        return any(present(item) for item in value)
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _start(digest: object) -> str | None:
    return None if digest is None else str(digest)[:16]


def _span(value: object) -> object:
    """A list of numbers as its least and greatest, so that a row stays one line; anything else unchanged."""
    if not isinstance(value, list | tuple):
        return value
    numbers = [float(v) for v in value if isinstance(v, int | float) and present(v)]
    if len(numbers) < 2 or not numbers:
        return numbers[0] if numbers else None
    low, high = format_cell(min(numbers)), format_cell(max(numbers))
    return low if low == high else f"{low} to {high}"


def _percent(value: object) -> str | None:
    return None if value is None else f"{_number(value):.1f}"


def _rounded(value: object, digits: int) -> float | None:
    return None if value is None else round(_number(value), digits)


def _number(value: object) -> float:
    return float("-inf") if value is None else float(value)  # type: ignore[arg-type]
