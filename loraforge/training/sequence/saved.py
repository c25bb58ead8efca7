"""What a unit leaves: its adapters, its buffer, and last the file that says that the folder is whole."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraforge.storage.files import sha256_of
from loraforge.tasks.card import write_task_card
from loraforge.training.ilora.adapters import save_pair
from loraforge.training.ilora.trainer import ILoraTrainer
from loraforge.training.ranks import gather, is_first, wait
from loraforge.training.sequence.layout import BUFFER, STATE, WEIGHTS, Previous, write_json
from loraforge.training.sequence.spec import SequenceSpec
from loraforge.training.sequence.state import JOINT
from loraforge.training.sequence.work import Work


def save_unit(
    work: Work,
    index: int,
    trainer: ILoraTrainer,
    model: Any,
    folder: Path,
    previous: Previous | None,
    foreign: Mapping[str, int],
) -> dict[str, Any]:
    """Writes the folder of a unit; every process calls it, one writes.

    Args:
        work: The run.
        index: Position of the unit.
        trainer: That has trained it.
        model: With its adapters.
        folder: Of the unit.
        previous: What it started from.
        foreign: Numbers, in the buffer, of tasks that this sequence does not list.

    Returns:
        What sequence.json says about the unit: steps, rows, and rows in the buffer by task.

    Raises:
        OSError: The disk refuses.
    """
    config, unit = work.config, work.units[index]
    stable = config.keeps_stable and config.save_ema_adapter
    adapters = ["default", "ema"] if stable else ["default"]
    keeps = config.replays and config.persist_buffer
    if keeps:
        trainer.save_buffer(folder / BUFFER)
    numbers = {name: number for number, name in enumerate(work.units)} | dict(foreign)
    held: Counter[int] = Counter()
    for part in gather(trainer.buffer.histogram() if trainer.buffer is not None else {}):
        held.update(part)
    by_task = {name: held[number] for name, number in numbers.items() if held[number]}
    if is_first():
        for name in ("default", "ema"):
            shutil.rmtree(folder / name, ignore_errors=True)
        save_pair(model, folder, trainer.pairs, stable=stable)
        state: dict[str, Any] = {
            "task": unit,
            "task_numbers": numbers,
            "step": trainer.state.global_step,
            "previous": None if previous is None else str(previous.ema or previous.default),
            "handover": config.handover,
            "ema_convention": config.ema_convention,
            "ema_alpha": config.ema_alpha,
            "base": dict(work.base),
            "adapters": {name: sha256_of(folder / name / WEIGHTS) for name in adapters},
            "buffer": {"file": BUFFER if keeps else None, "histogram": by_task},
        }
        for name in adapters:
            _write_about(work, index, folder / name, name, state)
        write_json(folder / STATE, state)
    wait()
    rows = work.material.train
    return {
        "steps": trainer.state.global_step,
        "rows": sum(map(len, rows)) if unit == JOINT else len(rows[index]),
        "buffer": by_task,
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
