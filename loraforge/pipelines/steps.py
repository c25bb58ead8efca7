"""The stages of a pipeline, built from its recipe: train each task, collect statistics, merge, evaluate."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, UsageError, did_you_mean, raise_problems
from loraforge.pipelines.recipe import Merge, Pipeline
from loraforge.pipelines.sources import base_place, digest_of, local_task
from loraforge.pipelines.stages import Progress, Stage
from loraforge.report.page import whole_file
from loraforge.tasks.spec import SPLITS, TaskSpec


@dataclass(frozen=True)
class Build:
    """What the stages of one run share.

    Attributes:
        pipeline: The recipe.
        out: Folder of the run.
        base: Folder (or id in the cache) of the base.
        tasks: The tasks, with local files.
        given: Task to the folder of an adapter that is used instead of one trained here.
        digests: Digest by source.
    """

    pipeline: Pipeline
    out: Path
    base: str
    tasks: tuple[TaskSpec, ...]
    given: Mapping[str, Path]
    digests: Mapping[str, str | None]

    @property
    def inputs_kind(self) -> str:
        """What is trained: adapters, or whole models."""
        return "adapters" if self.pipeline.how == "lora" else "models"

    def trained(self, task: TaskSpec) -> Path:
        """The folder of a task's adapter (or model)."""
        return self.given.get(task.id, self.out / self.inputs_kind / task.id)

    def merged(self, merge: Merge) -> Path:
        """The folder of a merge."""
        return self.out / "merged" / merge.name

    def statistics(self, task: TaskSpec) -> Path:
        """The file of a task's input statistics."""
        return self.out / "stats" / f"{task.id}.safetensors"

    @property
    def evaluation(self) -> Path:
        """The folder of the evaluation."""
        return self.out / "evaluation"

    def digest(self, source: Any) -> str | None:
        """Digest of a source, taken once."""
        return self.digests.get(str(source)) or digest_of(source)


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
    inputs = _base(build) | {"task": _record(build, task, ("train", "eval")), "train": values, "seed": pipeline.seed}
    inputs |= {} if full else {"lora": pipeline.lora}

    def action(resume: bool, progress: Progress | None) -> Mapping[str, Any]:
        from loraforge.training.single import train_full, train_lora

        shared: dict[str, Any] = {
            "train": values, "seed": pipeline.seed, "device": pipeline.device, "resume": resume, "overwrite": True,
            "progress": _named(progress, f"train {task.id}"),
        }  # fmt: skip
        if full:
            return train_full(build.base, task, out, **shared)
        return train_lora(build.base, task, out, lora=pipeline.lora, **shared)

    return Stage(f"train:{task.id}", out, inputs, (), action)


def _stats(build: Build, task: TaskSpec, trains: Mapping[str, Stage]) -> Stage:
    """Input statistics of the base on a task's training data, for the modules that its adapter changes."""
    pipeline, out = build.pipeline, build.statistics(task)
    after = (f"train:{task.id}",) if task.id in trains and pipeline.how == "lora" else ()
    inputs = _base(build) | {"data": build.digest(task.train), "fields": pipeline.calibration[task.id]}
    inputs |= {"given": build.digest(build.given.get(task.id)), "seed": pipeline.seed}

    def action(resume: bool, progress: Progress | None) -> Mapping[str, Any]:
        from loraforge.input_stats import collect_stats

        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)
        adapter = str(build.trained(task)) if pipeline.how == "lora" else None
        return collect_stats(
            build.base, _calibration(build, task), out, adapter=adapter, seed=pipeline.seed, device=pipeline.device,
            resume=resume, overwrite=not resume, progress=_named(progress, f"stats {task.id}"),
        )  # fmt: skip

    return Stage(f"stats:{task.id}", out, inputs, after, action)


def _merge(build: Build, merge: Merge, before: tuple[str, ...]) -> Stage:
    pipeline, out = build.pipeline, build.merged(merge)
    calibrated = merge.row.needs == "calibration"
    inputs = _base(build) | {"method": merge.row.name, "arguments": dict(merge.arguments)}
    inputs |= {"given": {name: build.digest(folder) for name, folder in build.given.items()}}
    if calibrated:
        inputs |= {"calibration": {t.id: [build.digest(t.train), pipeline.calibration[t.id]] for t in build.tasks}}
    # Only a method that reads statistics waits for them.
    after = tuple(name for name in before if merge.row.stats or not name.startswith("stats:"))

    def action(resume: bool, progress: Progress | None) -> Mapping[str, Any]:
        from loraforge.merging.runner import merge as run_merge

        arguments: dict[str, Any] = {**merge.arguments, "device": pipeline.device, "out": out, "overwrite": True}
        # A calibrated merge is solved in one piece.
        arguments |= {"resume": resume and not calibrated, "progress": _named(progress, f"merge {merge.name}")}
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
    tasks = [_record(build, task, SPLITS) for task in build.tasks]
    inputs = _base(build) | {"tasks": tasks, "eval": pipeline.evaluate, "seed": pipeline.seed}
    inputs |= {"given": {name: build.digest(folder) for name, folder in build.given.items()}}

    def action(resume: bool, progress: Progress | None) -> Mapping[str, Any]:
        from loraforge.evaluation import evaluate

        places = {task.id: build.trained(task) for task in build.tasks}
        places |= {merge.name: build.merged(merge) for merge in pipeline.merges}
        full = pipeline.how == "full"
        own = {task.id: task.id for task in build.tasks}
        found = evaluate(
            build.base, {} if full else places, build.tasks, models=places if full else {}, own=own, out=out,
            overwrite=True, device=pipeline.device, seed=pipeline.seed, progress=_named(progress, "evaluate"),
            **pipeline.evaluate,
        )  # fmt: skip
        return {"seconds": found["seconds"]}

    return Stage("evaluate", out, inputs, before, action)


def _base(build: Build) -> dict[str, Any]:
    return {"base": build.digest(base_place(build.pipeline))}


def _record(build: Build, task: TaskSpec, splits: Sequence[str]) -> dict[str, Any]:
    """The task as a record keeps it: what decides its rows and metrics, files of these splits by what they hold."""
    values = {key: value for key, value in dataclasses.asdict(task).items() if value is not None and key not in SPLITS}
    values |= {split: build.digest(task.source(split)) for split in splits}
    return _plain(values)


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


def _named(progress: Progress | None, stage: str) -> Progress | None:
    """Progress under the stage's name."""
    if progress is None:
        return None
    return lambda inner, detail, done, total: progress(stage, f"{inner} {detail}".strip(), done, total)


def _plain(value: Any) -> Any:
    """A value as JSON gives it back: texts as keys, lists for tuples."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
