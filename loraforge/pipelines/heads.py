"""The stages of `how: compare`: every task and seed trained whole and as an adapter, measured head by head, compared.

Folders are the document's: OUT/FFT/TASK/seedS, OUT/LoRA/TASK/seedS_rR, OUT/COMPARE/TASK/seedS_rR; and OUT/summary over
seeds and tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, UsageError, raise_problems
from loraforge.measure.settings import MeasureSettings
from loraforge.pipelines.build import Build, base_inputs, named, task_inputs
from loraforge.pipelines.heads_recipe import Comparison
from loraforge.pipelines.recipe import Pipeline
from loraforge.pipelines.stages import Progress, Stage
from loraforge.pipelines.steps import prepare
from loraforge.tasks.spec import SPLITS, TaskSpec

FFT, LORA = "FFT", "LoRA"
METHODS = (FFT, LORA)
NORMS = "base_norms.json"


@dataclass(frozen=True)
class Run:
    """One training and its measurement.

    Attributes:
        method: FFT or LORA.
        task: The task.
        seed: Of the training.
        folder: Of the run, with `ckpt_final`.
    """

    method: str
    task: TaskSpec
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """What its stages are called."""
        return f"{self.task.id}-seed{self.seed}-{self.method}"


def prepare_comparison(pipeline: Pipeline, out: Path, given: Mapping[str, Any] | None) -> Build:
    """Everything that the stages read, found and digested, after a check of what they will be told.

    Raises:
        UsageError: Unknown LoRA options or training arguments; adapters that were trained elsewhere.
        LoraforgeError: A task without rows to train or to measure on, missing base or data.
    """
    from loraforge.training.arguments import read_arguments

    if given:
        hint = "loraforge measure run FOLDER measures it by itself"
        raise UsageError("a comparison trains its own adapters", where="--adapter", got=", ".join(given), hint=hint)
    rank_of(pipeline)
    for task in pipeline.tasks:
        for method in METHODS:
            read_arguments(_arguments(pipeline, task, method), where=f"{pipeline.name}, {method} on {task.id}")
    missing = [(task.id, "train") for task in pipeline.tasks if task.train is None]
    missing += [(task.id, "eval or test") for task in pipeline.tasks if task.eval is None and task.test is None]
    raise_problems([LoraforgeError(f"the task has no {name} rows", where=f"task '{task}'") for task, name in missing])
    return prepare(pipeline, out)


def comparison_of(pipeline: Pipeline) -> Comparison:
    """The comparison of a pipeline that is known to be one.

    Raises:
        UsageError: It is not.
    """
    if pipeline.comparison is None:
        raise UsageError("the pipeline compares nothing", where=pipeline.name, expected="how: compare")
    return pipeline.comparison


def rank_of(pipeline: Pipeline) -> int:
    """The rank of the adapters, which names their folders."""
    from loraforge.training.options import LoraOptions

    return LoraOptions.read(pipeline.lora).r


def runs_of(pipeline: Pipeline, out: Path, tasks: tuple[TaskSpec, ...]) -> list[Run]:
    """All trainings, task by task, seed by seed, FFT before LoRA."""
    rank = rank_of(pipeline)
    return [
        Run(method, task, seed, out / method / task.id / (f"seed{seed}" if method == FFT else f"seed{seed}_r{rank}"))
        for task in tasks
        for seed in comparison_of(pipeline).seeds
        for method in METHODS
    ]


def comparison_stages(build: Build) -> list[Stage]:
    """All stages of a comparison in the order in which they are done."""
    runs = runs_of(build.pipeline, build.out, build.tasks)
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    trains = [_train(build, run) for run in runs]
    measures = [_measure(build, run, other) for pair in pairs for run, other in (pair, pair[::-1])]
    compared = [_compare(build, *pair) for pair in pairs]
    return [*trains, *measures, *compared, _summary(build, runs)]


def comparison_names(pipeline: Pipeline) -> list[str]:
    """Names of the stages, where nothing of what they read is there yet."""
    runs = runs_of(pipeline, Path(), pipeline.tasks)
    named_runs = [f"{group}:{run.name}" for group in ("train", "measure") for run in runs]
    return [*named_runs, *(f"compare:{run.task.id}-seed{run.seed}" for run in runs[::2]), "summary"]


def comparison_folder(build: Build, run: Run) -> Path:
    """Where a task's methods with one seed are compared."""
    return build.out / "COMPARE" / run.task.id / f"seed{run.seed}_r{rank_of(build.pipeline)}"


def _arguments(pipeline: Pipeline, task: TaskSpec, method: str) -> dict[str, Any]:
    """Training arguments of a method on a task."""
    comparison = comparison_of(pipeline)
    own = comparison.full if method == FFT else comparison.lora_train
    return {**pipeline.train, **own, **(task.overrides or {})}


def _train(build: Build, run: Run) -> Stage:
    pipeline, out = build.pipeline, run.folder / "ckpt_final"
    values = _arguments(pipeline, run.task, run.method)
    inputs = base_inputs(build) | {"task": task_inputs(build, run.task, SPLITS[:2]), "train": values, "seed": run.seed}
    inputs |= {"lora": pipeline.lora} if run.method == LORA else {}

    def action(resume: bool, progress: Progress | None) -> Mapping[str, Any]:
        from loraforge.training.single import train_full, train_lora

        shared: dict[str, Any] = {
            "train": values, "seed": run.seed, "device": pipeline.device, "resume": resume, "overwrite": True,
            "progress": named(progress, f"train {run.name}"),
        }  # fmt: skip
        if run.method == FFT:
            return train_full(build.base, run.task, out, **shared)
        return train_lora(build.base, run.task, out, lora=pipeline.lora, **shared)

    return Stage(f"train:{run.name}", out, inputs, (), action)


def _measure(build: Build, run: Run, other: Run) -> Stage:
    """Measures a training; the other method's run starts from the same theta0, whose measurement serves both."""
    pipeline = build.pipeline
    settings = {"device": pipeline.device, **comparison_of(pipeline).measure}
    inputs = {"task": task_inputs(build, run.task, SPLITS)}
    inputs |= {"measure": {key: value for key, value in settings.items() if key != "device"}}

    def action(resume: bool, progress: Progress | None) -> Mapping[str, Any]:
        from loraforge.measure.run import measure_run

        found = measure_run(
            run.folder, task=run.task, norms=build.out / NORMS, others=[other.folder], overwrite="changed",
            command=f"loraforge run {pipeline.words}", progress=named(progress, f"measure {run.name}"), **settings,
        )  # fmt: skip
        return {"steps": found["steps"], "warnings": found["warnings"]}

    return Stage(f"measure:{run.name}", run.folder / "stats.json", inputs, (f"train:{run.name}",), action)


def _compare(build: Build, full: Run, lora: Run) -> Stage:
    out = comparison_folder(build, full)
    names = [FFT, f"{LORA}-r{rank_of(build.pipeline)}"]
    settings = MeasureSettings.read(comparison_of(build.pipeline).measure)

    def action(resume: bool, progress: Progress | None) -> Mapping[str, Any]:
        from loraforge.measure.analysis.compare import compare

        if progress is not None:
            progress(f"compare {full.task.id}-seed{full.seed}", "", 0, 1)
        compare(
            [full.folder, lora.folder], out, names=names, profile=settings.profile, topk=settings.topk, hi=settings.hi,
            lo=settings.lo, overwrite=True, report=settings.plots,
        )  # fmt: skip
        return {}

    after = (f"measure:{full.name}", f"measure:{lora.name}")
    return Stage(
        f"compare:{full.task.id}-seed{full.seed}", out / "compare_metrics.json", {"names": names}, after, action
    )


def _summary(build: Build, runs: list[Run]) -> Stage:
    out = build.out / "summary"

    def action(resume: bool, progress: Progress | None) -> Mapping[str, Any]:
        from loraforge.measure.analysis.seeds import summarise

        if progress is not None:
            progress("summary", "", 0, 1)
        settings = MeasureSettings.read(comparison_of(build.pipeline).measure)
        summarise([run.folder for run in runs], out, report=settings.plots)
        return {}

    return Stage("summary", out / "seeds.json", {}, tuple(f"measure:{run.name}" for run in runs), action)
