"""What a training run tells while it runs: train_log.jsonl, TensorBoard, and progress."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraforge.errors import LoraforgeError
from loraforge.storage.atomic import write_whole

Progress = Callable[[str, str, int, int], None]
# Wall-clock figures and totals that a resumed run gets wrong; run.json has the time of the whole run.
_UNSTEADY = ("_runtime", "_per_second", "total_flos", "train_loss")


class JsonlLog(TrainerCallback):
    """Appends one JSON object a log event: step, epoch and whatever the trainer logs. Rank 0 alone writes.

    A resumed run first drops what was logged behind the step it goes on from; a log is forced before each checkpoint,
    so that the means it holds cover the same steps as in a run that was never interrupted.

    Args:
        path: The file.
        extra: Keys that go into every line.
    """

    def __init__(self, path: Path, extra: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.extra = dict(extra or {})

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drops lines behind the step that training goes on from."""
        if state.is_world_process_zero and self.path.is_file():
            truncate_log(self.path, state.global_step, self.extra)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Has the running means logged before a checkpoint, and at the last step."""
        last = state.global_step >= state.max_steps
        control.should_log = control.should_log or control.should_save or last

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As at the end of a step."""
        control.should_log = control.should_log or control.should_save

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes a line."""
        kept = {key: value for key, value in (logs or {}).items() if not key.endswith(_UNSTEADY)}
        if state.is_world_process_zero and kept.keys() - {"epoch"}:
            line = {"step": state.global_step, **self.extra, **{key: _plain(value) for key, value in kept.items()}}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")


class StepProgress(TrainerCallback):
    """Calls `progress(stage, detail, step, steps)` after every optimiser step; the detail is the last loss."""

    def __init__(self, progress: Progress | None, stage: str = "train") -> None:
        self.progress = progress
        self.stage = stage
        self.detail = ""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keeps the loss."""
        if logs and "loss" in logs:
            self.detail = f"loss {float(logs['loss']):.4f}"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tells the step."""
        if self.progress is not None and state.is_world_process_zero:
            self.progress(self.stage, self.detail, state.global_step, state.max_steps)


def truncate_log(path: Path, step: int, extra: Mapping[str, Any] | None = None) -> None:
    """Drops the lines of a log behind a step, and a last line that is torn; lines of other `extra` keys stay."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # torn by the end of the process that wrote it
        others = any(entry.get(key) != value for key, value in (extra or {}).items())
        if others or entry["step"] <= step:
            kept.append(line)
    write_whole(path, "".join(f"{line}\n" for line in kept))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tensorboard_callback(folder: Path) -> TrainerCallback:
    """transformers' TensorBoard callback writing to `folder`.

    Raises:
        LoraforgeError: Neither tensorboard nor tensorboardX is installed.
    """
    check_tensorboard()
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(_summary_writer(folder))


def check_tensorboard() -> None:
    """Refuses TensorBoard where nothing can write its files.

    Raises:
        LoraforgeError: Neither tensorboard nor tensorboardX is installed.
    """
    if not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
        raise LoraforgeError(
            "TensorBoard is not installed",
            where="--tensorboard",
            expected="the package tensorboard or tensorboardX",
            hint="pip install tensorboardX, or leave --tensorboard out: train_log.jsonl and report.html hold the same",
        )


def _summary_writer(folder: Path) -> Any:
    home = "torch.utils.tensorboard" if importlib.util.find_spec("tensorboard") else "tensorboardX"
    return importlib.import_module(home).SummaryWriter(str(folder))


def _plain(value: Any) -> Any:
    """A logged value as JSON knows it; numbers that are not finite become null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
