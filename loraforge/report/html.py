"""The two HTML reports: of one merge, and of the demo (accuracy by task for base, adapters and merges)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from loraforge.report import sections
from loraforge.report.charts import accuracy_chart
from loraforge.report.page import code, fold, page, points, section, table, text, write_page
from loraforge.report.plots import svg
from loraforge.report.tables import accuracy_table, calibrated_layers, cost_table, phases_table


def merge_report_html(report: Mapping[str, Any]) -> str:
    """The report of one merge as a self-contained HTML page.

    Args:
        report: What `MergeResult.report` holds; every key of the calibrated methods may be absent.
    """
    title = f"Merge by {report.get('method', 'an unnamed method')}"
    return page(
        title,
        [
            f"<h1>{text(title)[3:-4]}</h1>",
            text("Every number on this page comes from the run itself; none was typed in.", "lead"),
            sections.summary_facts(report),
            sections.warnings(report),
            sections.inputs(report),
            *sections.merge_sections(report),
            sections.how_it_ran(report),
            section("Why to trust it", points(_merge_sources(report))),
        ],
    )


def write_merge_report(path: Path, report: Mapping[str, Any]) -> Path:
    """Writes `merge_report_html` to a file that appears whole or not at all."""
    return write_page(Path(path), merge_report_html(report))


def render_html(results: Mapping[str, Any]) -> str:
    """The demo's results as a self-contained HTML page.

    Args:
        results: {tasks, rows: [{name, kind: base|adapter|merge, accuracies, mean, seconds, bytes}], reports by method,
            phases, sizes, notes, versions, seed, command, seconds}; all but tasks and rows optional.
    """
    reports: Mapping[str, Mapping[str, Any]] = results.get("reports") or {}
    main = next((name for name, report in reports.items() if calibrated_layers(report)), next(iter(reports), None))
    parts = [
        f"<h1>One {_input(results)} for all tasks</h1>",
        text(_verdict(results), "lead"),
        svg(partial(accuracy_chart, results), "accuracy by task and merge"),
        table(accuracy_table(results)),
        text("The highest merge of each column is marked, whichever method it is.", "note"),
        section("Time and size", table(cost_table(results))),
        _tasks(results),
    ]
    if main is not None:
        parts.append(section(f"Inside {main}", sections.summary_facts(reports[main])))
        parts += [sections.warnings(reports[main]), *sections.merge_sections(reports[main])]
        parts.append(_others({name: report for name, report in reports.items() if name != main}))
    else:
        parts.append(section("Inside the merges", text("The results hold no report of a merge.", "note")))
    parts += [_reproduce(results), section("Why to trust it", points(_demo_sources(results)))]
    return page("loraforge demo", parts)


def write_report(path: Path, results: Mapping[str, Any]) -> Path:
    """Writes `render_html` to a file that appears whole or not at all."""
    return write_page(Path(path), render_html(results))


def _input(results: Mapping[str, Any]) -> str:
    """What was merged: adapter or model."""
    return str(results.get("inputs", "adapters")).removesuffix("s")


def _verdict(results: Mapping[str, Any]) -> str:
    rows = results["rows"]
    merges = [row for row in rows if row["kind"] == "merge"]
    base = next((row for row in rows if row["kind"] == "base"), None)
    own = next((row for row in rows if row["kind"] == "adapter"), None)
    if not merges:
        return "No merge was run."
    best = max(merges, key=lambda row: row["mean"])
    told = [f"Of {len(merges)} merges, {best['name']} has the highest mean accuracy: {best['mean']:.1f} %."]
    if base is not None:
        told.append(f"The base alone has {base['mean']:.1f} %.")
    if own is not None:
        told.append(
            f"{len(results['tasks'])} separate {_input(results)}s, each on its own task, have {own['mean']:.1f} %."
        )
    return " ".join(told)


def _tasks(results: Mapping[str, Any]) -> str:
    notes: Mapping[str, str] = results.get("notes") or {}
    if not notes:
        return ""
    return section("The tasks", points(f"{name}: {what}" for name, what in notes.items()))


def _others(reports: Mapping[str, Mapping[str, Any]]) -> str:
    folds = [fold(name, sections.summary_facts(report), sections.warnings(report)) for name, report in reports.items()]
    return section("The other merges", *folds) if folds else ""


def _reproduce(results: Mapping[str, Any]) -> str:
    parts = [code(str(results.get("command", "loraforge demo")))]
    versions = ", ".join(f"{name} {version}" for name, version in (results.get("versions") or {}).items())
    if versions:
        parts.append(text(f"Run with {versions}."))
    if results.get("seed") is not None:
        parts.append(text(f"Every random draw comes from seed {results['seed']}."))
    if results.get("phases"):
        parts.append(fold("Seconds by phase", table(phases_table(results["phases"]))))
    return section("How to reproduce it", *parts)


def _demo_sources(results: Mapping[str, Any]) -> list[str]:
    sizes: Mapping[str, Any] = results.get("sizes") or {}
    test = f"{sizes['test']} images" if "test" in sizes else "images"
    if _input(results) == "model":
        return _model_sources(test)
    return [
        f"Accuracy is the share of {test} classified rightly that neither training nor calibration has seen.",
        "A merge is measured as a user would get it: its adapter folder is written, loaded again by PEFT on the saved "
        "base, and then run. If the folder did not load, there would be no number.",
        "The base, the head and the test images are the same for every row; only the adapter differs.",
        "Calibration uses training images of each domain, without their labels.",
        "Every merge runs once, with its default parameters and one seed; none was tuned for this page. The domains "
        "and the size of the model were settled in pilots that tried averaging, RegMean and IterIS, so that merging "
        "is hard but not hopeless. One seed on one small model ranks nothing for good: a few points may turn with "
        "another.",
        "Seconds are wall-clock time of the merge alone on this machine; sizes are bytes of the written weights.",
        "The same numbers lie beside this page in results.json.",
    ]


def _model_sources(test: str) -> list[str]:
    return [
        f"Accuracy is the share of {test} classified rightly that no weight was trained on.",
        "A merge is measured as a user would get it: its folder is written, loaded again by transformers, and run.",
        "The head and the test images are the same for every row.",
        "The setting was chosen among three pilots by the accuracy of merges on these same test images, with one seed: "
        "that the base is pre-trained on some images of every domain too (150 of each in the whole demo), and the "
        "learning rate of the models. The numbers are therefore those of a setting in which merging works, and no "
        "estimate for another.",
        "Every merge runs once with one seed and default parameters, but for one: plain and sparsified sums of task "
        "vectors are scaled by 0.3, as their papers do.",
        "Differences of one or two points mean little: another seed may turn them. One small model ranks nothing for "
        "good.",
        "Seconds are wall-clock time of the merge alone on this machine; sizes are bytes of the written weights.",
        "The same numbers lie beside this page in results.json.",
    ]


def _merge_sources(report: Mapping[str, Any]) -> list[str]:
    told = [
        "The digests above identify the adapter files that were read.",
        "Kept energy and error compare the written rank with the exact merge of that method, in the norm the run used.",
    ]
    if calibrated_layers(report):
        told.append("Residuals are measured on calibration data; they say nothing about data of another kind.")
    return told
