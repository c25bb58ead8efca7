"""The table of a comparison: task by task and method by method, means over seeds beside what chance gives."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraforge.pipelines.build import Build
from loraforge.pipelines.heads import Run, comparison_folder, runs_of

SUMMARY = "summary"
# Of stats.json: what the table shows, by what it calls it.
SHOWN = {
    "rho(I_pre, U)": "spearman_rho_Ipre_U",
    "rho(I_post, U)": "spearman_rho_Ipost_U",
    "overlap": "topk_overlap_Ipre_U",
    "important, static": "n_important_but_static",
    "plastic, unimportant": "n_plastic_but_unimportant",
}
# What chance gives, of its block `null`.
CHANCE = ("rho95", "overlap_expected", "cases_expected")


def comparison_results(build: Build, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a finished comparison found.

    Args:
        build: What was run.
        records: Records by stage.

    Returns:
        comparison: [{task, method, metric, score, statistics: {key: {mean, sd, n}}, null}], one a task and method, with
        means over the seeds; score of the training's own metric, null where it has none; seeds; warnings.
    """
    runs = runs_of(build.pipeline, build.out, build.tasks)
    found = json.loads((build.out / SUMMARY / "seeds.json").read_text(encoding="utf-8"))
    named = {entry["folder"]: entry["name"] for entry in found["runs"]}
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.task.id, named[str(run.folder)]), []).append(run)
    rows = []
    for (task, method), group in groups.items():
        spread = found["statistics"][method][task]
        null = _read(group[0].folder / "stats.json").get("null") or {}
        rows.append(
            {
                "task": task,
                "method": method,
                **_score(group),
                "statistics": {
                    key: {part: spread[key][part] for part in ("mean", "sd", "n")} for key in SHOWN.values()
                },
                "null": {key: null.get(key) for key in CHANCE},
            }
        )
    told = [warning for record in records.values() for warning in record["result"].get("warnings") or ()]
    seeds = [run.seed for run in groups[next(iter(groups))]]
    return {"comparison": rows, "seeds": seeds, "warnings": list(dict.fromkeys(told))}


def comparison_paths(build: Build) -> dict[str, str]:
    """Where the results are."""
    first = runs_of(build.pipeline, build.out, build.tasks)[0]
    report = build.out / SUMMARY / "report.html"
    return {
        "summary": str(report if report.is_file() else report.with_name("seeds.md")),
        "comparisons": str(comparison_folder(build, first).parents[1]),
        "numbers": str(build.out / "results.json"),
    }


def _score(group: Sequence[Run]) -> dict[str, Any]:
    """The main metric of the rows that are measured, over the seeds."""
    metrics = [_read(run.folder / "run_config.json") for run in group]
    split = metrics[0]["data"]["split"]
    scores = [_read(run.folder / "ckpt_final" / "run.json").get("metrics", {}).get(split) for run in group]
    values = [score["metrics"][score["main"]] for score in scores if score]
    known = [value for value in values if value is not None]
    name = next((score["main"] for score in scores if score), None)
    return {"metric": name, "score": statistics.fmean(known) if known else None,
            "score_sd": statistics.stdev(known) if len(known) > 1 else None}  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
