"""Methods beside each other, head by head: what differs, and whether by more than chance. Torch-free.

The document compares the importance before training, which two runs from one start share by construction; here it is
the importance after training, unless the starts differ.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loraforge.errors import LoraforgeError, UsageError
from loraforge.measure.analysis.aggregate import (
    HIGH,
    LOW,
    TOP_K,
    cases_content,
    cases_of,
    document_stats,
    expected_counts,
)
from loraforge.measure.analysis.checks import check_runs, same_digest
from loraforge.measure.analysis.joined import DOCUMENT, Heads, cell, join_heads
from loraforge.measure.analysis.null import DRAWS, rho_band
from loraforge.measure.analysis.runs import Run, name_runs, open_run
from loraforge.measure.analysis.statistics import bootstrap_rho_difference, correlation, top_overlap
from loraforge.measure.analysis.summary import find_differences, summary_markdown, summary_text
from loraforge.measure.files import write_json
from loraforge.storage.atomic import new_folder, write_whole

METRICS, SUMMARY, JOINED, RECORD = "compare_metrics.json", "compare_summary", "heads_joined.csv", "run.json"
# The document's keys of compare_metrics.json.
_DOCUMENT_KEYS = (
    "spearman_rho_Ipre_U", "spearman_rho_Ipre_Urel", "topk_overlap_Ipre_U", "n_important_but_static",
    "n_plastic_but_unimportant",
)  # fmt: skip
_RHOS = {
    "spearman_rho_Ipre_U": ("I_pre", "U"), "spearman_rho_Ipre_Urel": ("I_pre", "Urel"),
    "spearman_rho_Ipost_U": ("I_post", "U"), "spearman_rho_Ipost_Urel": ("I_post", "Urel"),
    "spearman_rho_Ipost_G": ("I_post", "G"),
}  # fmt: skip
_PLAIN = ("topk_overlap_Ipre_U", "topk_overlap_Ipre_Urel", "topk_overlap_Ipre_Ipost", *_DOCUMENT_KEYS[3:])
_JOINED = (*DOCUMENT, "Urel_l2", "I_post_lo", "I_post_hi")


@dataclass(frozen=True)
class Settings:
    """How two methods are compared: K of the overlaps, percentiles of the cases, permutations and their seed."""

    topk: int = TOP_K
    hi: float = HIGH
    lo: float = LOW
    draws: int = DRAWS
    seed: int = 0


def compare(
    run_dirs: Sequence[str | Path],
    out: str | Path,
    *,
    names: Sequence[str] | None = None,
    allow_different_base: bool = False,
    allow_different_subset: bool = False,
    topk: int = TOP_K,
    hi: float = HIGH,
    lo: float = LOW,
    draws: int = DRAWS,
    seed: int = 0,
    profile: Literal["default", "document", "seed"] = "default",
    overwrite: bool = False,
    report: bool = True,
) -> dict[str, Any]:
    """Compares measured runs over the heads that all of them have, and writes a folder.

    It holds compare_metrics.json (the document's keys by method, and `comparison`), compare_summary.txt and .md,
    heads_joined.csv and, with `report`, the pictures compare_*.png and report.html.

    Args:
        run_dirs: Two or more folders of runs.
        out: Folder to make.
        names: What to call the methods; default FFT, LoRA-r8 and so on from the records, else the folders' names.
        allow_different_base: Compare runs that started from different weights; a warning says what that spoils.
        allow_different_subset: The same for runs that were measured on different rows.
        topk: K of the overlaps.
        hi: Percentile from which a value is high in the counterexamples.
        lo: Percentile up to which it is low.
        draws: Permutations of each p.
        seed: Of permutations and resamples.
        profile: `document` writes the document's five keys by method alone into compare_metrics.json.
        overwrite: Replace an earlier comparison.
        report: Also write report.html and pictures.

    Returns:
        The content of compare_metrics.json (that of the default profile) and `out`.

    Raises:
        LoraforgeError: A run lacks its measurements, no head is common, bases or rows differ.
        UsageError: Fewer than two runs, or names that do not fit.
    """
    if len(run_dirs) < 2:
        raise UsageError("a comparison needs two runs or more", got=len(run_dirs))
    runs = [open_run(folder) for folder in run_dirs]
    labels = name_runs(runs, names)
    if "comparison" in labels:
        raise UsageError("'comparison' is the name of another key", expected="another name")
    warnings = check_runs(runs, labels, allow_different_base, allow_different_subset)
    tables = _common([join_heads(run.folder) for run in runs], labels, warnings)
    content = _content(runs, labels, tables, warnings, Settings(topk, hi, lo, draws, seed))
    content["comparison"]["findings"] = find_differences(content)
    with new_folder(out, overwrite) as folder:
        write_json(folder / METRICS, content)
        write_whole(folder / f"{SUMMARY}.txt", summary_text(content))
        write_whole(folder / f"{SUMMARY}.md", summary_markdown(content))
        write_whole(folder / JOINED, joined_csv(labels, tables))
        write_json(folder / RECORD, {"command": "compare", "names": labels, "runs": [str(run.folder) for run in runs]})
        if report:
            from loraforge.measure.analysis.content import compare_content
            from loraforge.report.heads_compare import write_compare_report

            write_compare_report(folder, compare_content(folder))
        if profile != "default":
            kept = {name: {key: content[name][key] for key in _DOCUMENT_KEYS} for name in labels}
            write_json(folder / METRICS, kept)
    return content | {"out": str(out)}


def joined_csv(names: Sequence[str], tables: Sequence[Heads]) -> str:
    """heads_joined.csv: layer, head, stack, kind, then COLUMN_NAME for every method."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["layer", "head", "stack", "kind", *(f"{column}_{name}" for name in names for column in _JOINED)])
    for i, key in enumerate(tables[0].keys):
        values = [cell(heads, column, i) for heads in tables for column in _JOINED]
        writer.writerow([key.layer, key.head, key.stack, key.kind, *values])
    return out.getvalue()


def _common(tables: Sequence[Heads], names: Sequence[str], warnings: list[str]) -> list[Heads]:
    """The tables over the heads that all of them have."""
    shared = set(tables[0].keys).intersection(*(heads.keys for heads in tables[1:]))
    if not shared:
        raise LoraforgeError(
            "the runs have no head in common", where=", ".join(names),
            got=", ".join(f"{len(heads)} heads" for heads in tables), expected="runs of one model",
        )  # fmt: skip
    for name, heads in zip(names, tables, strict=True):
        warnings += [f"{name}: {note}" for note in heads.notes]
        if len(heads) > len(shared):
            warnings.append(f"{name}: {len(heads) - len(shared)} heads that another run lacks are left out")
    return [heads.only([i for i, key in enumerate(heads.keys) if key in shared]) for heads in tables]


def _content(
    runs: Sequence[Run], names: Sequence[str], tables: Sequence[Heads], warnings: list[str], settings: Settings
) -> dict[str, Any]:
    """What compare_metrics.json holds."""
    content: dict[str, Any] = {}
    cases: dict[str, Any] = {}
    for name, heads in zip(names, tables, strict=True):
        chosen = cases_of(heads, settings.hi, settings.lo)
        content[name] = document_stats(heads, chosen, settings.topk)
        overlap = top_overlap(heads.columns["I_pre"], heads.columns["U"], settings.topk)
        content[name]["null"] = {
            "rho95": rho_band(len(heads)), "overlap_expected": overlap["expected"],
            "overlap_range95": overlap["range95"], "cases_expected": expected_counts(chosen),
        }  # fmt: skip
        cases[name] = cases_content(heads, chosen, settings.hi, settings.lo)
    by_name = dict(zip(names, tables, strict=True))
    starts = {name: run.digest("theta0_sha256") for name, run in zip(names, runs, strict=True)}
    bases = {name: run.digest("base_sha256") for name, run in zip(names, runs, strict=True)}
    pairs = []
    for a, b in combinations(names, 2):
        same = same_digest([starts[a], starts[b]])
        if same is None:
            # No record: importance that agrees to the last bit is one measurement.
            same = bool(np.array_equal(by_name[a].columns["I_pre"], by_name[b].columns["I_pre"], equal_nan=True))
        pairs.append(
            {
                "a": a,
                "b": b,
                "same_start": same,
                **_pair(by_name[a], by_name[b], content[a], content[b], same, settings),
            }
        )
    content["comparison"] = {
        "names": list(names),
        "n_heads": len(tables[0]),
        "topk": min(settings.topk, len(tables[0])),
        "percentiles": {"hi": settings.hi, "lo": settings.lo},
        "rho95": rho_band(len(tables[0])),
        "pairs": pairs,
        "cases": cases,
        "folders": {name: str(run.folder) for name, run in zip(names, runs, strict=True)},
        "hashes": {name: {"base_sha256": bases[name], "theta0_sha256": starts[name]} for name in names},
        "same_base": same_digest(list(bases.values())),
        "same_start": same_digest(list(starts.values())),
        "warnings": warnings,
        "draws": settings.draws,
        "seed": settings.seed,
    }
    return content


def _pair(
    a: Heads, b: Heads, stats_a: dict[str, Any], stats_b: dict[str, Any], same_start: bool, settings: Settings
) -> dict[str, Any]:
    """One method against another: differences of their statistics, and the same column of both."""
    deltas: dict[str, Any] = {}
    for key in (*_RHOS, *_PLAIN):
        x, y = stats_a[key], stats_b[key]
        deltas[key] = {"a": x, "b": y, "difference": None if x is None or y is None else x - y}
        if key in _RHOS:
            pair = [(heads.columns[_RHOS[key][0]], heads.columns[_RHOS[key][1]]) for heads in (a, b)]
            known = deltas[key]["difference"] is not None
            ci, sizes = bootstrap_rho_difference(*pair, seed=settings.seed) if known else (None, None)
            deltas[key] |= {
                "ci": ci, "size_difference": abs(x) - abs(y) if known else None, "size_ci": sizes,
                "beyond_chance": None if ci is None else bool(ci[0] > 0 or ci[1] < 0),
            }  # fmt: skip
    columns = ["U", "Urel", "I_post", *(() if same_start else ("I_pre",))]
    columns = [name for name in columns if a.has(name) and b.has(name)]
    layers = a.layers
    return {
        "deltas": deltas,
        "between": {
            name: correlation(a.columns[name], b.columns[name], layers, draws=settings.draws, seed=settings.seed)
            for name in columns
        },
        "overlap": {name: top_overlap(a.columns[name], b.columns[name], settings.topk) for name in columns},
        "sign_changes": _sign_changes(a, b),
    }


def _sign_changes(a: Heads, b: Heads) -> dict[str, Any]:
    """Heads that help under one method and harm under the other, by their importance after training."""
    x, y = a.columns["I_post"], b.columns["I_post"]
    places = np.flatnonzero(x * y < 0)
    sure = [
        bool(all((h.columns["I_post_lo"][i] > 0) or (h.columns["I_post_hi"][i] < 0) for h in (a, b))) for i in places
    ]
    heads = [
        {**a.keys[i]._asdict(), "a": float(x[i]), "b": float(y[i]), "both_significant": known}
        for i, known in zip(places, sure, strict=True)
    ]
    both = int((np.isfinite(x) & np.isfinite(y)).sum())
    return {"n": len(heads), "of": both, "both_significant": sum(sure), "heads": heads}
