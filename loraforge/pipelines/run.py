"""`loraforge.run_pipeline`: a preset or recipe from its data to the table of base, own adapters and merges."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraforge.pipelines.build import Build
from loraforge.pipelines.fetching import Tell, check_present, fetch
from loraforge.pipelines.heads import comparison_names, comparison_stages, prepare_comparison
from loraforge.pipelines.heads_results import comparison_paths, comparison_results
from loraforge.pipelines.recipe import Pipeline, open_pipeline
from loraforge.pipelines.results import table_rows
from loraforge.pipelines.sources import needs_of
from loraforge.pipelines.stages import (
    DONE,
    Progress,
    Stage,
    Status,
    check_run_folder,
    choose,
    run_folder,
    run_stages,
    survey,
)  # fmt: skip
from loraforge.pipelines.steps import prepare, stages_of
from loraforge.provenance import versions
from loraforge.report.page import whole_file
from loraforge.report.pipeline import write_pipeline_report

RESULTS, REPORT = "results.json", "report.html"
DOWNLOAD = "download"


def run_pipeline(
    source: str | Path,
    *,
    out: str | Path | None = None,
    data: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    start: str | None = None,
    only: str | None = None,
    fetch_missing: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    tell: Tell | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs a pipeline: downloads, trains an adapter (or model) a task, merges, evaluates and reports.

    One of `how: compare` trains both ways instead, measures what happened to each head, and compares.

    Every stage is recorded below `out`. The same call goes on where an earlier one ended or was killed; what was done
    with other inputs is not replaced without `overwrite`.

    Args:
        source: Preset, or a recipe file with a section `pipeline`.
        out: Folder of the run; default runs/NAME.
        data: Folder that relative paths are counted from; default the recipe's own folder, for presets the current one.
        settings: Dotted key to value over the recipe, see `open_pipeline`.
        adapters: Task to the folder of an adapter that takes the place of training one.
        start: Stage (or group of stages) from which on everything is done anew.
        only: The one stage (or group) that is done, anew.
        fetch_missing: Fetch base and data sets that are missing from the hub; else they are an error.
        overwrite: Redo stages that were done with other inputs.
        dry_run: Say which stages would run and what is missing; nothing is computed, fetched or written.
        tell: Called with lines for people: what is fetched.
        progress: Called with (stage, detail, done, total).

    Returns:
        {name, out, stages: [{name, state, seconds}], missing} and, unless the evaluation was left out, {tasks, rows,
        seconds, paths, ...} as in results.json; of a comparison {comparison, seeds, seconds, paths, ...}.

    Raises:
        UsageError: Unknown preset, key, stage or task.
        LoraforgeError: Missing base or data, another run's folder, or whatever a stage refuses.
    """
    began = time.perf_counter()
    pipeline = open_pipeline(source, data=data, settings=settings)
    folder = Path(out) if out is not None else Path("runs") / pipeline.name
    if dry_run:
        return _plan(pipeline, folder, adapters, start, only, overwrite=overwrite)
    # Refused before anything is fetched.
    check_run_folder(folder)
    if only == DOWNLOAD or fetch_missing:
        fetch(pipeline, tell=tell, progress=progress)
    check_present(pipeline)
    if only == DOWNLOAD:
        return {"name": pipeline.name, "out": str(folder), "stages": [], "missing": []}
    with run_folder(folder):
        build, stages = _stages(pipeline, folder, adapters)
        todo = choose(survey(stages, folder), start=_behind(start), only=only, overwrite=overwrite)
        run_stages(todo, folder, progress)
        after = survey(stages, folder)
        found: dict[str, Any] = {"name": pipeline.name, "out": str(folder), "stages": _told(after, todo), "missing": []}
        if after[-1].state != DONE:
            return found
        found |= _results(build, after)
        found |= {"command": f"loraforge run {pipeline.words}", "seconds": time.perf_counter() - began}
        found |= {"paths": _paths(build) if pipeline.comparison is None else comparison_paths(build)}
        with whole_file(folder / RESULTS) as draft:
            draft.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if pipeline.comparison is None:
            write_pipeline_report(folder / REPORT, found)
    return found


def _stages(pipeline: Pipeline, folder: Path, adapters: Mapping[str, str | Path] | None) -> tuple[Build, list[Stage]]:
    """What the stages read, and the stages, of either kind of pipeline."""
    if pipeline.comparison is not None:
        build = prepare_comparison(pipeline, folder, adapters)
        return build, comparison_stages(build)
    build = prepare(pipeline, folder, adapters)
    return build, stages_of(build)


def _plan(
    pipeline: Pipeline,
    folder: Path,
    adapters: Mapping[str, str | Path] | None,
    start: str | None,
    only: str | None,
    *,
    overwrite: bool,
) -> dict[str, Any]:
    """What a run would do."""
    missing = [
        {"name": need.name, "kind": need.kind, **{key: need.known.get(key) for key in ("size", "licence", "from")}}
        for need in needs_of(pipeline)
        if need.place is None
    ]
    found = {"name": pipeline.name, "words": pipeline.words, "out": str(folder), "dry_run": True, "missing": missing}
    if missing:
        # Without the files there are no digests, so nothing can be told of earlier runs.
        names = comparison_names(pipeline) if pipeline.comparison is not None else [
                 *(f"train:{t.id}" for t in pipeline.tasks if t.id not in (adapters or {})),
                 *(f"merge:{merge.name}" for merge in pipeline.merges), "evaluate"]  # fmt: skip
        return found | {"stages": [{"name": name, "state": "to do", "seconds": None} for name in (DOWNLOAD, *names)]}
    check_run_folder(folder)
    statuses = survey(_stages(pipeline, folder, adapters)[1], folder)
    todo = choose(statuses, start=_behind(start), only=only, overwrite=overwrite)
    chosen = {status.stage.name for status in todo}
    return found | {
        "stages": [
            {"name": s.stage.name, "state": ("to resume" if s.state == "started" else "to do") if s.stage.name in chosen
             else s.state, "seconds": s.record.get("seconds")}
            for s in statuses
        ]
    }  # fmt: skip


def _behind(start: str | None) -> str | None:
    """The first recorded stage that is done anew: the download keeps no record, because what is there stays."""
    return "train" if start == DOWNLOAD else start


def _told(statuses: Sequence[Status], ran: Sequence[Status]) -> list[dict[str, Any]]:
    """Stages with what this run did: "done" now, or "skipped" because it was done before."""
    names = {status.stage.name for status in ran}
    return [
        {
            "name": status.stage.name,
            "state": "skipped" if status.state == DONE and status.stage.name not in names else status.state,
            "seconds": status.record.get("seconds"),
        }
        for status in statuses
    ]


def _results(build: Build, statuses: Sequence[Status]) -> dict[str, Any]:
    pipeline = build.pipeline
    shared = {
        "description": pipeline.description,
        "base": pipeline.base,
        "versions": versions("torch", "transformers", "peft"),
    }
    records = {status.stage.name: status.record for status in statuses}
    if pipeline.comparison is not None:
        return shared | comparison_results(build, records)
    return shared | {"seed": pipeline.seed, "inputs": build.inputs_kind, **table_rows(build, records)}


def _paths(build: Build) -> dict[str, str]:
    """Where the results are."""
    out = build.out
    merges = build.pipeline.merges
    result = build.merged(merges[0]) if merges else out / build.inputs_kind
    return {"result": str(result), "numbers": str(out / RESULTS), "report": str(out / REPORT)}
