"""The sections about one merge, from the dictionary that `loraforge.merge` reports.

Every key of the calibrated methods is optional: where one is absent, the section says why instead of showing nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from loraforge.report import charts
from loraforge.report.page import code, facts, fold, section, table, text
from loraforge.report.plots import svg
from loraforge.report.tables import (
    adapters_table,
    calibrated_layers,
    calibration_table,
    format_bytes,
    format_cell,
    iterations,
    iterations_table,
    kernels_table,
    layers_table,
    phases_table,
    present,
)

Report = Mapping[str, Any]


def summary_facts(report: Report) -> str:
    """The merge in cards: size, error, time."""
    values: dict[str, object] = {
        "method": report.get("method"),
        "adapters": len(report.get("adapters") or ()),
        "modules": report.get("modules"),
        "largest rank": report.get("rank_max"),
        "parameters": _grouped(report.get("parameters")),
        "kept energy": report.get("kept_energy"),
        "error of the rank rule": report.get("relative_error"),
        "seconds": report.get("seconds"),
    }
    if present(report.get("peak_rss_bytes")):
        values["peak memory"] = format_bytes(float(report["peak_rss_bytes"]))
    return facts({key: value for key, value in values.items() if present(value)})


def warnings(report: Report) -> str:
    """What the run warned of; nothing where it was silent."""
    return "".join(text(str(message), "warn") for message in report.get("warnings") or ())


def inputs(report: Report) -> str:
    """The adapters and calibration sets that went in."""
    sets = table(calibration_table(report)) if report.get("calibration") else ""
    return section("What went in", table(adapters_table(report)), sets)


def residuals(report: Report) -> str:
    """How well each module's outputs match the task models', before and after solving."""
    if not any(present(layer.get("residual_after")) for layer in calibrated_layers(report)):
        return section("Residual by module", text(_absent(report, "residuals"), "note"))
    return section(
        "Residual by module",
        text(
            "How far the merged module's outputs are from the task models' on the calibration data, before and after "
            "the module was solved. Lower is better; small numbers here do not by themselves mean high accuracy."
        ),
        svg(partial(charts.residual_chart, report), "residual by module"),
    )


def sample_sizes(report: Report) -> str:
    """How many samples the weighting left in effect."""
    if not any(present(layer.get("ess")) for layer in calibrated_layers(report)):
        return section("Effective sample size", text(_absent(report, "sample weights"), "note"))
    return section(
        "Effective sample size",
        text(
            "Samples that the adapters disagree on weigh less. The effective sample size says how many equally "
            "weighted samples the weighted ones are worth, as a share of all where it is at most 1; a small one means "
            "that few samples decided a module."
        ),
        svg(partial(charts.sample_size_chart, report), "effective sample size by module"),
    )


def spectra(report: Report) -> str:
    """Singular values of the merged modules."""
    kept = [layer.get("spectrum") or () for layer in report.get("layers") or ()]
    if not any(present(value) and value > 0 for values in kept for value in values):
        return section("Spectra", text("This run kept no singular values, so there is no spectrum to show.", "note"))
    return section(
        "Spectra",
        text("Singular values of every merged module. A steep fall means that a lower rank would lose little."),
        svg(partial(charts.spectra_chart, report), "singular values by module"),
    )


def iteration_log(report: Report) -> str:
    """Relative change and residual by iteration."""
    log = iterations(report)
    if not log:
        return section("Iterations", text(_absent(report, "iterations"), "note"))
    converged = (report.get("iteris") or {}).get("converged")
    endings: dict[object, str] = {
        True: "The iteration converged.",
        False: "The iteration stopped at its limit before it converged: the result is its last iterate.",
    }
    ending = endings.get(converged, "The run did not say whether it converged.")
    verified = (report.get("iteris") or {}).get("verified")
    if present(verified):
        ending += f" One more ordinary iteration on the result changes it by {format_cell(verified)} (relative)."
    drawn = svg(partial(charts.iterations_chart, report), "relative change and residual by iteration")
    # One point makes no curve; the table says it all.
    return section("Iterations", text(ending), drawn if len(log) > 1 else "", table(iterations_table(report)))


def modules(report: Report) -> str:
    """The table of all modules, folded away."""
    count = len(report.get("layers") or ())
    if not count:
        return section("Module by module", text("This run reported no numbers by module.", "note"))
    return section("Module by module", fold(f"{count} modules", table(layers_table(report))))


def how_it_ran(report: Report) -> str:
    """Parameters, phases, device and kernels."""
    parameters = {str(key): value for key, value in (report.get("params") or {}).items()}
    rows = [f"{key} = {value}" for key, value in parameters.items()]
    kernels: Mapping[str, Any] = report.get("kernels") or {}
    told = [("mode", kernels.get("mode")), ("native", {True: "yes", False: "no"}.get(kernels.get("native", "")))]
    state = ", ".join(f"{key} {value}" for key, value in told if value is not None)
    state += f" ({kernels['why']})" if state and kernels.get("why") else ""
    parts = [text(f"Device: {report.get('device') or 'not reported'}. Kernels: {state or 'not reported'}.")]
    if kernels.get("calls"):
        parts.append(table(kernels_table(kernels)))
    if report.get("phases"):
        parts.append(table(phases_table(report["phases"])))
    parts.append(
        fold(f"{len(rows)} parameters", code("\n".join(rows)))
        if rows
        else text("The method has no parameters.", "note")
    )
    return section("How it ran", *parts)


def merge_sections(report: Report) -> list[str]:
    """The measured sections of one merge, in reading order."""
    return [residuals(report), sample_sizes(report), spectra(report), iteration_log(report), modules(report)]


def _absent(report: Report, what: str) -> str:
    if report.get("iteris"):
        return f"This run reported no {what}: the option that makes them was off."
    return f"{report.get('method') or 'This method'} uses no calibration data, so it has no {what} to report."


def _grouped(value: object) -> object:
    return f"{value:,}" if isinstance(value, int) else value
