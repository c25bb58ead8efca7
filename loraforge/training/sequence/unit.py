"""One unit of a run: a task (or, jointly, all of them) trained on the base from what the task before left."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from loraforge.errors import LoraforgeError
from loraforge.storage.files import sha256_of
from loraforge.tasks import load_model
from loraforge.tasks.card import write_task_card
from loraforge.training.arguments import training_arguments
from loraforge.training.ilora.adapters import add_stable, load_adapter, save_pair
from loraforge.training.ilora.buffer import ReplayBuffer
from loraforge.training.ilora.config import ILoraConfig
from loraforge.training.ilora.trainer import ILoraTrainer
from loraforge.training.log import JsonlLog, StepProgress
from loraforge.training.options import adapt
from loraforge.training.saving import check_weights
from loraforge.training.sequence.disk import refusals
from loraforge.training.sequence.handover import check_previous, sources
from loraforge.training.sequence.layout import (
    BUFFER,
    LOG,
    STATE,
    WEIGHTS,
    Previous,
    find_previous,
    read_json,
    task_folder,
    write_json,
)
from loraforge.training.sequence.material import Material
from loraforge.training.sequence.matrix import SCORES
from loraforge.training.sequence.ranks import gather, is_first, rank, wait, world
from loraforge.training.sequence.spec import SequenceSpec
from loraforge.training.sequence.state import JOINT
from loraforge.training.trainer import drop_torn, whole_checkpoints

Progress = Callable[[str, str, int, int], None]
Notify = Callable[[str], None]
# A broken task goes on from its last checkpoint; twenty a task cost little and lose little.
_SAVED = {"save_strategy": "steps", "save_steps": 0.05}


@dataclass(frozen=True, slots=True)
class Work:
    """What every unit of a run shares.

    Attributes:
        spec: The sequence.
        run: Folder of the run.
        material: Rows, labels, tokenizer.
        base: Of `base_identity`.
        device: Name of the device.
        progress: Called with (stage, detail, done, total).
        notify: Called with lines for people.
    """

    spec: SequenceSpec
    run: Path
    material: Material
    base: Mapping[str, Any]
    device: str
    progress: Progress | None
    notify: Notify

    @property
    def config(self) -> ILoraConfig:
        """The method's settings."""
        return self.spec.ilora_config()

    @property
    def units(self) -> tuple[str, ...]:
        """What is trained one after another."""
        return (JOINT,) if self.spec.method == "joint" else self.spec.task_ids


def build_model(work: Work) -> Any:
    """The base with a new adapter `default`, and `ema` where the method has one."""
    spec, material = work.spec, work.material
    model, _, fresh = load_model(
        spec.base_model, material.kind, head_labels=material.head_labels, dtype=spec.dtype, seed=spec.seed
    )
    adapted = adapt(model, spec.lora_options(), material.kind, fresh, seed=spec.seed)
    if work.config.keeps_stable:
        add_stable(adapted)
    return adapted


def previous_of(work: Work, index: int) -> Previous | None:
    """What a unit starts from; None for a new adapter."""
    if work.spec.method in ("joint", "single"):
        return None
    config, unit = work.config, work.units[index]
    before = work.units[index - 1] if index else None
    here = before is not None and (task_folder(work.run, before) / STATE).is_file()
    if here and config.current_task_id != unit:
        # What the settings say about a task before concerns the first one trained here.
        config = replace(config, ema_adapter_path=None, previous_task_model=None, prev_task_id=None)
    return find_previous(config, work.run, before)


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
    wait()
    whole = whole_checkpoints(folder)
    checkpoint = checkpoint or (whole[-1] if whole else None)
    model = build_model(work)
    previous = previous_of(work, index)
    if previous is not None:
        _hand_over(work, model, previous)
    trainer = _trainer(work, index, model, folder, _start_buffer(work, previous))
    with refusals(folder):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        adapted = trainer.accelerator.unwrap_model(trainer.model)
        check_weights(adapted)
        entry = _save_unit(work, index, trainer, adapted, folder, previous)
    entry |= {"seconds": round(time.perf_counter() - started, 2), "resumed_from": checkpoint and checkpoint.name}
    return adapted, entry


def _hand_over(work: Work, model: Any, previous: Previous) -> None:
    config = work.config
    found = sources(previous, config, config.keeps_stable)
    for folder in dict.fromkeys(found.values()):
        check_previous(folder, model, work.base)
    for adapter, folder in found.items():
        load_adapter(model, folder, adapter)


def _start_buffer(work: Work, previous: Previous | None) -> ReplayBuffer | None:
    """The buffer of the task before (this process's part of it), or an empty one."""
    config = work.config
    if not config.replays:
        return None
    if previous is not None and previous.buffer is not None:
        _check_buffer(work, previous.buffer)
        return ReplayBuffer.load(previous.buffer, rank=rank(), world=world(), capacity=config.ilora_buffer_size)
    if previous is not None:
        work.notify("warning: the task before left no buffer, so none of its rows are replayed")
    return ReplayBuffer(
        config.ilora_buffer_size, seed=work.spec.seed, policy=config.buffer_policy, dedup=config.buffer_dedup
    )


def _check_buffer(work: Work, buffer: Path) -> None:
    """Refuses a buffer whose rows are numbered by the tasks of another sequence."""
    told = read_json(buffer.parent / STATE).get("task_ids")
    mine = list(work.units)
    if told is not None and told[: len(mine)] != mine[: len(told)]:
        raise LoraforgeError(
            "the replay buffer of the task before belongs to another sequence of tasks", where=buffer,
            got=", ".join(told), expected=", ".join(mine),
            hint="list the same tasks in the same order and name the one to train as ilora: {current_task_id: ID}",
        )  # fmt: skip


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


def unit_arguments(spec: SequenceSpec, index: int) -> dict[str, Any]:
    """The training arguments of a unit as they were set: a task's own over the sequence's, never the seed.

    Jointly, `max_steps` counts for every task, so that all methods take equally many steps.
    """
    values = {key: value for key, value in spec.train.items() if key != "seed"}
    if spec.method == "joint":
        steps = values.get("max_steps")
        return {**values, "max_steps": steps * len(spec.tasks)} if isinstance(steps, int) and steps > 0 else values
    return {**values, **(spec.tasks[index].overrides or {})}


def _save_unit(
    work: Work, index: int, trainer: ILoraTrainer, model: Any, folder: Path, previous: Previous | None
) -> dict[str, Any]:
    """Writes adapters, buffer and, last, the file that says that the folder is whole."""
    config, unit = work.config, work.units[index]
    stable = config.keeps_stable and config.save_ema_adapter
    adapters = ["default", "ema"] if stable else ["default"]
    keeps = config.replays and config.persist_buffer
    if keeps:
        trainer.save_buffer(folder / BUFFER)
    held: Counter[int] = Counter()
    for part in gather(trainer.buffer.histogram() if trainer.buffer is not None else {}):
        held.update(part)
    if is_first():
        for name in ("default", "ema"):
            shutil.rmtree(folder / name, ignore_errors=True)
        save_pair(model, folder, trainer.pairs, stable=stable)
        state: dict[str, Any] = {
            "task": unit,
            "task_ids": list(work.units),
            "step": trainer.state.global_step,
            "previous": None if previous is None else str(previous.ema or previous.default),
            "handover": config.handover,
            "ema_convention": config.ema_convention,
            "ema_alpha": config.ema_alpha,
            "base": dict(work.base),
            "adapters": {name: sha256_of(folder / name / WEIGHTS) for name in adapters},
            "buffer": {"file": BUFFER if keeps else None, "histogram": _by_id(work, held)},
        }
        for name in adapters:
            _write_about(work, index, folder / name, name, state)
        write_json(folder / STATE, state)
    wait()
    rows = work.material.train
    return {
        "steps": trainer.state.global_step,
        "rows": sum(map(len, rows)) if unit == JOINT else len(rows[index]),
        "buffer": _by_id(work, held),
    }


def _write_about(work: Work, index: int, folder: Path, name: str, state: Mapping[str, Any]) -> None:
    """What lies beside an adapter's weights: its role, its task, and words for people."""
    spec, material = work.spec, work.material
    write_json(folder / STATE, {"role": name, "task": state["task"], "step": state["step"], "base": state["base"]})
    task = spec.tasks[index]
    write_task_card(folder, task, material.kind, material.head_labels, spec.base_model, spec.label_space)
    trained = ", ".join(spec.task_ids if spec.method == "joint" else _learnt(spec, index))
    (folder / "README.md").write_text(
        f"---\nbase_model: {spec.base_model}\nlibrary_name: peft\n---\n\n# {name} after {state['task']}\n\n"
        f"Trained by `loraforge train-ilora --method {spec.method}` on: {trained}. Scores: `../../cl_matrix.json`.\n",
        encoding="utf-8",
    )


def _learnt(spec: SequenceSpec, index: int) -> tuple[str, ...]:
    return spec.task_ids[index : index + 1] if spec.method == "single" else spec.task_ids[: index + 1]


def _by_id(work: Work, histogram: Mapping[int, int]) -> dict[str, int]:
    return {work.spec.task_ids[task]: count for task, count in sorted(histogram.items())}
