"""Fine-tuning on one task: a LoRA adapter, or all weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraforge.tasks import TaskSpec, parse_task
from loraforge.training.job import Request
from loraforge.training.log import Progress
from loraforge.training.options import LoraOptions
from loraforge.training.recipes import find_recipe
from loraforge.training.run import run_training
from loraforge.training.task_file import read_task

Task = TaskSpec | Mapping[str, Any] | str | Path


def train_lora(
    base: str | Path,
    task: Task,
    out: str | Path,
    *,
    lora: Mapping[str, Any] | LoraOptions | None = None,
    train: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    snapshots: int | Sequence[int] | None = None,
    early_stopping: int | None = None,
    tensorboard: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains a LoRA adapter on one task.

    Works in one process, and in several that a launcher started (`torchrun -m loraforge ...`, `accelerate launch -m
    loraforge ...`, with `--lora-r` for `--r`, which torchrun takes for its own); rank 0 alone writes. Data parallelism
    is tested with two processes on a CPU. FSDP and DeepSpeed come with the engine by the launcher's or the training
    arguments' settings; this project does not test them, and metrics and snapshots, which need whole weights, are
    refused or left out there.

    Args:
        base: Folder, or id in the local cache.
        task: The task, its mapping, or a YAML or JSON file of one.
        out: Folder to make: adapter, task.json, run.json, train_log.jsonl, report.html, README.md.
        lora: LoRA options.
        train: Training arguments, by the names of transformers.TrainingArguments.
        recipe: Name of settings that come with the program; what is given here overrides them.
        seed: Of the new weights, the order of the rows and dropout.
        resume: Go on from the last whole checkpoint of an interrupted run of the same command.
        overwrite: Replace an earlier output.
        snapshots: How many adapters are kept along the way, or at which steps (0 is the start).
        early_stopping: End after so many evaluations without a better one, and take the best.
        tensorboard: Write event files into `tensorboard/` too.
        device: `auto`, `cpu` or `cuda`.
        dtype: Of the base's weights; those that are trained stay float32.
        dry_run: Report what would be done; write nothing.
        progress: Called with (stage, detail, done, total).

    Returns:
        The content of run.json; without measurements on all ranks but the first.

    Raises:
        UsageError: Unknown or contradicting settings.
        LoraforgeError: Data, base or targets that cannot be used, a loss that is not finite, a full disk.
    """
    found = find_recipe(recipe, "lora")
    spec = _with_length(_as_task(task), found.max_length)
    options = LoraOptions.read({**found.lora, **(lora or {})}) if not isinstance(lora, LoraOptions) else lora
    request = Request(
        base, spec, Path(out), options, {**found.train, **(train or {})}, seed, resume, overwrite, snapshots,
        early_stopping, tensorboard, device, dtype, dry_run, progress, recipe,
    )  # fmt: skip
    return run_training(request)


def train_full(
    base: str | Path,
    task: Task,
    out: str | Path,
    *,
    train: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    snapshots: int | Sequence[int] | None = None,
    early_stopping: int | None = None,
    tensorboard: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains all weights of a base on one task; the output is a model folder. Otherwise as `train_lora`.

    Raises:
        UsageError: Unknown or contradicting settings.
        LoraforgeError: Data or base that cannot be used, a loss that is not finite, a full disk.
    """
    found = find_recipe(recipe, "full")
    spec = _with_length(_as_task(task), found.max_length)
    request = Request(
        base, spec, Path(out), None, {**found.train, **(train or {})}, seed, resume, overwrite, snapshots,
        early_stopping, tensorboard, device, dtype, dry_run, progress, recipe,
    )  # fmt: skip
    return run_training(request)


def _as_task(task: Task) -> TaskSpec:
    if isinstance(task, TaskSpec):
        return task
    if isinstance(task, Mapping):
        return parse_task(task, "task")
    return read_task(task)


def _with_length(spec: TaskSpec, length: int | None) -> TaskSpec:
    return spec if length is None or spec.max_length is not None else replace(spec, max_length=length)
