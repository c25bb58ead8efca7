"""Copies of what is trained, kept at some steps of a run; and the end of a run that stopped getting better."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraforge.errors import UsageError


class Snapshots(TrainerCallback):
    """Saves the trained weights at some steps into `folder/step-N`, each whole or not at all.

    Args:
        folder: Where to.
        wanted: A number of snapshots, at steps that grow by a factor up to the last; or the steps (0 is the start).
        save: Writes what is trained of a model into a folder.
    """

    def __init__(self, folder: Path, wanted: int | Sequence[int], save: Callable[[Any, Path], None]) -> None:
        self.folder = folder
        self.wanted = wanted
        self.save = save
        self.steps: set[int] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Settles the steps; saves the start where it is wanted."""
        self.steps = set(snapshot_steps(self.wanted, state.max_steps))
        if state.global_step == 0:
            self._keep(state, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves where the step is one of those."""
        self._keep(state, kwargs["model"])

    def _keep(self, state: TrainerState, model: Any) -> None:
        if state.global_step not in self.steps or not state.is_world_process_zero:
            return
        place, part = self.folder / f"step-{state.global_step}", self.folder / f".step-{state.global_step}.part"
        for old in (place, part):
            if old.exists():
                # Of the same run before it was broken off: it is written again, as it was.
                shutil.rmtree(old)
        part.mkdir(parents=True)
        self.save(model, part)
        part.rename(place)


def snapshot_steps(wanted: int | Sequence[int], last: int) -> list[int]:
    """The steps at which snapshots are taken.

    Raises:
        UsageError: No such number, or steps that the run does not reach.
    """
    if isinstance(wanted, int):
        if wanted < 1:
            raise UsageError("--snapshots", got=wanted, expected="a number above 0, or steps")
        # Most of an update happens early: equal factors between steps, not equal distances.
        found = {max(1, round(last ** (i / wanted))) for i in range(1, wanted + 1)}
        found |= set([step for step in range(1, last + 1) if step not in found][: wanted - len(found)])
        return sorted(found)
    beyond = sorted(step for step in wanted if not 0 <= step <= last)
    if beyond:
        got = ", ".join(map(str, beyond))
        raise UsageError("snapshots at steps that the run does not reach", got=got, expected=f"0 to {last}")
    return sorted(set(wanted))


def kept_snapshots(folder: Path) -> list[dict[str, Any]]:
    """The snapshots of a finished run: step, and folder relative to the run's."""
    found = sorted((int(path.name.rpartition("-")[2]), path) for path in folder.glob("step-*"))
    return [{"step": step, "path": f"{folder.name}/{path.name}"} for step, path in found]


class EarlyStop(TrainerCallback):
    """Ends a run whose metric has not improved for some evaluations.

    It counts in the trainer's own history, which a checkpoint keeps, so that a resumed run stops at the same step.

    Args:
        metric: Key of the logs, as `eval_accuracy`.
        patience: Evaluations without a new best.
        greater_is_better: Direction.
    """

    def __init__(self, metric: str, patience: int, greater_is_better: bool) -> None:
        self.metric = metric
        self.patience = patience
        self.sign = 1.0 if greater_is_better else -1.0

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Looks at the history."""
        values = [self.sign * entry[self.metric] for entry in state.log_history if self.metric in entry]
        if values and len(values) - 1 - values.index(max(values)) >= self.patience:
            control.should_training_stop = True
