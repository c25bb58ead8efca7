"""What the stages of one run share, and what their records keep of base and tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraforge.pipelines.recipe import Merge, Pipeline
from loraforge.pipelines.sources import base_place, digest_of
from loraforge.pipelines.stages import Progress
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


def base_inputs(build: Build) -> dict[str, Any]:
    """The base as a stage's record keeps it."""
    return {"base": build.digest(base_place(build.pipeline))}


def task_inputs(build: Build, task: TaskSpec, splits: Sequence[str]) -> dict[str, Any]:
    """The task as a record keeps it: what decides its rows and metrics, files of these splits by what they hold."""
    values = {key: value for key, value in dataclasses.asdict(task).items() if value is not None and key not in SPLITS}
    values |= {split: build.digest(task.source(split)) for split in splits}
    return _plain(values)


def named(progress: Progress | None, stage: str) -> Progress | None:
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
