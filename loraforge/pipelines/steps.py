"""The stages of a pipeline, built from its recipe: train each task, collect statistics, merge, evaluate."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, UsageError, did_you_mean, raise_problems
from loraforge.pipelines.build import Build, base_inputs, named, task_inputs
from loraforge.pipelines.recipe import Merge, Pipeline
from loraforge.pipelines.sources import base_place, digest_of, local_task
from loraforge.pipelines.stages import Progress, Stage
from loraforge.report.page import whole_file
from loraforge.tasks.spec import SPLITS, TaskSpec


def prepare(pipeline: Pipeline, out: Path, given: Mapping[str, str | Path] | None = None) -> Build:
    """Everything that the stages read, found and digested.

    Raises:
        UsageError: An adapter for a task that the recipe does not have.
        LoraforgeError: An adapter's folder, the base or a data set is not there.
    """
    names = [task.id for task in pipeline.tasks]
    for name, folder in (given or {}).items():
        if name not in names:
            raise UsageError(f"an adapter for a task that the recipe does not have: '{name}'", where="--adapter",
                             hint=did_you_mean(name, names))  # fmt: skip
        if not Path(folder).is_dir():
            raise LoraforgeError("the adapter's folder does not exist", where=folder, hint="check --adapter TASK=DIR")
    if pipeline.comparison is None:
        _check_training(pipeline, [task for task in pipeline.tasks if task.id not in (given or {})])
    base = base_place(pipeline)
    if base is None:
        raise LoraforgeError("the base is not there", where=pipeline.base, hint=f"loraforge download {pipeline.words}")
    tasks = tuple(local_task(task, pipeline) for task in pipeline.tasks)
    # An id stays an id: adapters then name a base that others find too.
    name = str(base) if os.path.isdir(pipeline.base) or (pipeline.data / pipeline.base).is_dir() else pipeline.base
    places = {task: Path(folder) for task, folder in (given or {}).items()}
    read = [base, *places.values(), *(task.source(split) for task in tasks for split in SPLITS)]
    return Build(pipeline, out, name, tasks, places, {str(source): digest_of(source) for source in read})


def _check_training(pipeline: Pipeline, tasks: Sequence[TaskSpec]) -> None:
    """Refuses at once what the last of the trainings, or the evaluation behind them, would refuse.

    Raises:
        UsageError: Unknown LoRA options or training arguments.
        LoraforgeError: A task without training rows, or without rows to measure it on.
    """
    from loraforge.training.arguments import read_arguments
    from loraforge.training.options import LoraOptions

    if pipeline.how == "lora":
        LoraOptions.read(pipeline.lora)
    for task in tasks:
        read_arguments({**pipeline.train, **(task.overrides or {})}, where=f"{pipeline.name}, training of {task.id}")
    split = str(pipeline.evaluate.get("split", "test"))
    missing = [(task.id, "train") for task in tasks if task.train is None]
    missing += [(task.id, split) for task in pipeline.tasks if split in SPLITS and task.source(split) is None]
    raise_problems([LoraforgeError(f"the task has no {name} rows", where=f"task '{task}'") for task, name in missing])


def stages_of(build: Build) -> list[Stage]:
    """All stages of a run in the order in which they are done."""
    trains = {task.id: _train(build, task) for task in build.tasks if task.id not in build.given}
    merges = build.pipeline.merges
    stats = [_stats(build, task, trains) for task in build.tasks] if any(m.row.stats for m in merges) else []
    before = tuple(stage.name for stage in (*trains.values(), *stats))
    joined = [_merge(build, merge, before) for merge in merges]
    return [*trains.values(), *stats, *joined, _evaluate(build, (*before, *(stage.name for stage in joined)))]


def _train(build: Build, task: TaskSpec) -> Stage:
    pipeline, out = build.pipeline, build.trained(task)
    full = pipeline.how == "full"
    values = {**pipeline.train, **(task.overrides or {})}
    # Rows of the test are no reason to train again.
    inputs = base_inputs(build) | {
        "task": task_inputs(build, task, ("train", "eval")),
        "train": values,
        "seed": pipeline.seed,
    }
    inputs |= {} if full else {"lora": pipeline.lora}

    def action(resume: bool, progress: Progress | None) -> Mapping[str, Any]:
        from loraforge.training.single import train_full, train_lora

        shared: dict[str, Any] = {
            "train": values, "seed": pipeline.seed, "device": pipeline.device, "resume": resume, "overwrite": True,
            "progress": named(progress, f"train {task.id}"),
        }  # fmt: skip
        if full:
            return train_full(build.base, task, out, **shared)
        return train_lora(build.base, task, out, lora=pipeline.lora, **shared)

    return Stage(f"train:{task.id}", out, inputs, (), action)


def _stats(build: Build, task: TaskSpec, trains: Mapping[str, Stage]) -> Stage:
    """Input statistics of the base on a task's training data, for the modules that its adapter changes."""
    pipeline, out = build.pipeline, build.statistics(task)
    after = (f"train:{task.id}",) if task.id in trains and pipeline.how == "lora" else ()
    inputs = base_inputs(build) | {"data": build.digest(task.train), "fields": pipeline.calibration[task.id]}
    inputs |= {"given": build.digest(build.given.get(task.id)), "seed": pipeline.seed}

    def action(resume: bool, progress: Progress | None) -> Mapping[str, Any]:
        from loraforge.input_stats import collect_stats

        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)
        adapter = str(build.trained(task)) if pipeline.how == "lora" else None
        return collect_stats(
            build.base, _calibration(build, task), out, adapter=adapter, seed=pipeline.seed, device=pipeline.device,
            resume=resume, overwrite=not resume, progress=named(progress, f"stats {task.id}"),
        )  # fmt: skip

    return Stage(f"stats:{task.id}", out, inputs, after, action)


def _merge(build: Build, merge: Merge, before: tuple[str, ...]) -> Stage:
    pipeline, out = build.pipeline, build.merged(merge)
    calibrated = merge.row.needs == "calibration"
    inputs = base_inputs(build) | {"method": merge.row.name, "arguments": dict(merge.arguments)}
    inputs |= {"given": {name: build.digest(folder) for name, folder in build.given.items()}}
    if calibrated:
        inputs |= {"calibration": {t.id: [build.digest(t.train), pipeline.calibration[t.id]] for t in build.tasks}}
    # Only a method that reads statistics waits for them.
    after = tuple(name for name in before if merge.row.stats or not name.startswith("stats:"))

    def action(resume: bool, progress: Progress | None) -> Mapping[str, Any]:
        from loraforge.merging.runner import merge as run_merge

        arguments: dict[str, Any] = {**merge.arguments, "device": pipeline.device, "out": out, "overwrite": True}
        # A calibrated merge is solved in one piece.
        arguments |= {"resume": resume and not calibrated, "progress": named(progress, f"merge {merge.name}")}
        if calibrated or pipeline.how == "full" or merge.arguments.get("output_kind") == "model":
            arguments["base"] = build.base
        if calibrated:
            arguments["calibration"] = {task.id: _calibration(build, task) for task in build.tasks}
        if merge.row.stats:
            arguments["stats"] = {task.id: str(build.statistics(task)) for task in build.tasks}
        result = run_merge([str(build.trained(task)) for task in build.tasks], merge.row.name, **arguments)
        keys = ("modules", "rank_max", "parameters", "relative_error", "kept_energy", "seconds", "warnings")
        return {key: result.report.get(key) for key in keys}

    return Stage(f"merge:{merge.name}", out, inputs, after, action)


def _evaluate(build: Build, before: tuple[str, ...]) -> Stage:
    pipeline, out = build.pipeline, build.evaluation
    tasks = [task_inputs(build, task, SPLITS) for task in build.tasks]
    inputs = base_inputs(build) | {"tasks": tasks, "eval": pipeline.evaluate, "seed": pipeline.seed}
    inputs |= {"given": {name: build.digest(folder) for name, folder in build.given.items()}}

    def action(resume: bool, progress: Progress | None) -> Mapping[str, Any]:
        from loraforge.evaluation import evaluate

        places = {task.id: build.trained(task) for task in build.tasks}
        places |= {merge.name: build.merged(merge) for merge in pipeline.merges}
        full = pipeline.how == "full"
        own = {task.id: task.id for task in build.tasks}
        found = evaluate(
            build.base, {} if full else places, build.tasks, models=places if full else {}, own=own, out=out,
            overwrite=True, device=pipeline.device, seed=pipeline.seed, progress=named(progress, "evaluate"),
            **pipeline.evaluate,
        )  # fmt: skip
        return {"seconds": found["seconds"]}

    return Stage("evaluate", out, inputs, before, action)


def _calibration(build: Build, task: TaskSpec) -> dict[str, Any]:
    """The training rows of a task as calibration data; what is no JSON is written as such, below the run's folder."""
    source, fields = task.train, dict(build.pipeline.calibration[task.id])
    is_path = isinstance(source, str | Path)
    if is_path and (Path(source).is_dir() or Path(source).suffix in (".json", ".jsonl")):
        return {"source": str(source), **fields}
    from loraforge.tasks.rows import read_rows

    path = build.out / "calibration" / f"{task.id}.jsonl"
    with whole_file(path) as draft, draft.open("w", encoding="utf-8") as file:
        for row in read_rows(task, "train").items:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {"source": str(path), **fields}
