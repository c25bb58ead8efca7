"""One unit of a run: a task (or, jointly, all of them) trained on the base from what the task before left."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from loraforge.errors import LoraforgeError
from loraforge.training.arguments import training_arguments
from loraforge.training.checkpoints import drop_torn, named_when_refused, whole_checkpoints
from loraforge.training.ilora.adapters import load_adapter
from loraforge.training.ilora.buffer import ReplayBuffer
from loraforge.training.ilora.trainer import ILoraTrainer
from loraforge.training.log import JsonlLog, StepProgress
from loraforge.training.ranks import is_first, rank, wait, world
from loraforge.training.saving import check_weights
from loraforge.training.sequence.handover import check_previous, sources
from loraforge.training.sequence.layout import LOG, STATE, Previous, read_json, task_folder
from loraforge.training.sequence.matrix import SCORES
from loraforge.training.sequence.saved import save_unit
from loraforge.training.sequence.state import JOINT
from loraforge.training.sequence.work import Work, build_model, previous_of, unit_arguments

# A broken task goes on from its last checkpoint; twenty a task cost little and lose little.
_SAVED = {"save_strategy": "steps", "save_steps": 0.05}


def train_unit(work: Work, index: int, checkpoint: Path | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Trains one unit and writes its folder; the model stays for scoring.

    Args:
        work: The run.
        index: Position of the unit.
        checkpoint: Where to continue; default the last whole checkpoint of the unit, if there is one.

    Returns:
        The model with its adapters, and what sequence.json says about the unit.

    Raises:
        LoraforgeError: Contradicting settings, a missing or unfitting previous adapter, a full disk.
    """
    started = time.perf_counter()
    unit = work.units[index]
    folder = task_folder(work.run, unit)
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        # What an interrupted end of this task left.
        (folder / STATE).unlink(missing_ok=True)
        (folder / SCORES).unlink(missing_ok=True)
        drop_torn(folder)
        if checkpoint is not None:
            # What comes after it is made anew, and must not look whole meanwhile.
            for later in whole_checkpoints(folder)[_place(folder, checkpoint) + 1 :]:
                shutil.rmtree(later)
    wait()
    whole = whole_checkpoints(folder)
    checkpoint = checkpoint or (whole[-1] if whole else None)
    model = build_model(work)
    previous = previous_of(work, index)
    if previous is not None:
        _hand_over(work, model, previous)
    buffer, foreign = _start_buffer(work, previous)
    trainer = _trainer(work, index, model, folder, buffer)
    with named_when_refused(folder, "the run"):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        adapted = trainer.accelerator.unwrap_model(trainer.model)
        check_weights(adapted)
        entry = save_unit(work, index, trainer, adapted, folder, previous, foreign)
    entry |= {"seconds": round(time.perf_counter() - started, 2), "resumed_from": checkpoint and checkpoint.name}
    return adapted, entry


def _hand_over(work: Work, model: Any, previous: Previous) -> None:
    config = work.config
    found = sources(previous, config, config.keeps_stable)
    for folder in dict.fromkeys(found.values()):
        check_previous(folder, model, work.base, work.material.head_labels)
    for adapter, folder in found.items():
        load_adapter(model, folder, adapter)


def _place(folder: Path, checkpoint: Path) -> int:
    """Which of the whole checkpoints of a unit this is.

    Raises:
        LoraforgeError: None of them.
    """
    whole = whole_checkpoints(folder)
    if checkpoint not in whole:
        expected = ", ".join(path.name for path in whole) or "no whole checkpoint is there"
        raise LoraforgeError("the checkpoint is not whole", where=checkpoint, expected=expected)
    return whole.index(checkpoint)


def _start_buffer(work: Work, previous: Previous | None) -> tuple[ReplayBuffer | None, dict[str, int]]:
    """The buffer of the task before (this process's part of it) or an empty one; numbers of tasks of another run."""
    config = work.config
    if not config.replays:
        return None, {}
    if previous is not None and previous.buffer is not None:
        buffer = ReplayBuffer.load(previous.buffer, rank=rank(), world=world(), capacity=config.ilora_buffer_size)
        # Another run's buffer may have been filled in another way.
        buffer.policy, buffer.dedup = config.buffer_policy, config.buffer_dedup
        return buffer, _renumber(buffer, work, previous.buffer)
    if previous is not None:
        work.notify("warning: the task before left no buffer, so none of its rows are replayed")
    return ReplayBuffer(
        config.ilora_buffer_size, seed=work.spec.seed, policy=config.buffer_policy, dedup=config.buffer_dedup
    ), {}


def _renumber(buffer: ReplayBuffer, work: Work, path: Path) -> dict[str, int]:
    """Gives rows the numbers that their tasks have here; tasks that this sequence does not list count from -1 down.

    Returns:
        Those tasks and their numbers.
    """
    told: dict[str, int] = read_json(path.parent / STATE).get("task_numbers", {})
    mine = {name: number for number, name in enumerate(work.units)}
    others = [name for name in told if name not in mine]
    foreign = {name: -1 - place for place, name in enumerate(others)}
    numbers = {number: (mine | foreign)[name] for name, number in told.items()}
    if any(old != new for old, new in numbers.items()):
        buffer.tasks = [numbers.get(task, task) for task in buffer.tasks]
        buffer.seen_by_task = Counter({numbers.get(task, task): n for task, n in buffer.seen_by_task.items()})
    return foreign


def _trainer(work: Work, index: int, model: Any, folder: Path, buffer: ReplayBuffer | None) -> ILoraTrainer:
    spec, material = work.spec, work.material
    unit = work.units[index]
    joint = unit == JOINT
    rows = [row for data in material.train for row in data.examples] if joint else material.train[index].examples
    held_out = None if joint else material.held_out[index]
    values = unit_arguments(spec, index)
    keep = int(values.pop("save_total_limit", None) or 1)
    args = training_arguments(
        values, folder, device=work.device, seed=spec.seed + index, defaults=_SAVED, where=f"train, task '{unit}'"
    )
    if args.do_eval and held_out is None:
        what, hint = "there are no rows to evaluate on while training", "name them as eval, or leave eval_strategy out"
        raise LoraforgeError(what, where=f"train, task '{unit}': eval_strategy", got=str(args.eval_strategy), hint=hint)
    if args.load_best_model_at_end:
        raise LoraforgeError(
            "a sequence ends each task with its last step", where="train: load_best_model_at_end", got="true",
            expected="false: the best step of one task is not the best of the sequence, and the buffer is later",
        )  # fmt: skip
    return ILoraTrainer(
        model,
        args,
        kind=material.kind,
        collate=material.collator(),
        train_rows=rows,
        eval_rows=held_out.examples if held_out is not None and args.do_eval else None,
        callbacks=[JsonlLog(work.run / LOG, extra={"task": unit}), StepProgress(work.progress, f"train {unit}")],
        ilora=work.config,
        buffer=buffer,
        task_index=index,
        label_ids=material.label_ids,
        keep=keep,
    )
