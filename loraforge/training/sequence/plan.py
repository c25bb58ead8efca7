"""The plan of a run: what would be read and written, how many steps, and what they cost. Nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from loraforge.errors import LoraforgeError
from loraforge.training.arguments import training_arguments
from loraforge.training.ilora.adapters import pair_adapters
from loraforge.training.ranks import world
from loraforge.training.sequence.layout import SEQUENCE, STATE, read_json, task_folder
from loraforge.training.sequence.state import JOINT, PENDING
from loraforge.training.sequence.work import Work, build_model, previous_of, unit_arguments

# A backward pass costs about two forward ones.
_FORWARD, _TRAINED = 1.0, 3.0


def plan(work: Work, chosen: Iterable[int]) -> dict[str, Any]:
    """What a run would do.

    Args:
        work: The run.
        chosen: Positions of the units to train.

    Returns:
        {dry_run, out, method, base, kind, head_labels, pairs, parameters, trainable_parameters, units, memory, steps}:
        a unit has its rows, steps, places read and written, and cost in passes of a plain run.

    Raises:
        LoraforgeError: As training would raise before its first step.
    """
    model = build_model(work)
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    stable = work.config.keeps_stable
    states = {entry["id"]: entry["state"] for entry in read_json(work.run / SEQUENCE).get("tasks", [])}
    units = [_unit(work, index, states) for index in chosen]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = {
        "weights_bytes": weights,
        # Two moments and a gradient, in float32.
        "optimiser_bytes": 3 * 4 * count,
        "buffer_bytes": _buffer_bytes(work),
    }
    return {
        "dry_run": True,
        "out": str(work.run),
        "method": work.spec.method,
        "base": work.spec.base_model,
        "kind": work.material.kind,
        "head_labels": list(work.material.head_labels),
        "pairs": len(pair_adapters(model)) if stable else 0,
        "adapter_tensors": len(trained),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": count,
        "units": units,
        "steps": sum(unit["steps"] for unit in units),
        "memory": {**memory, "total_bytes": sum(memory.values())},
        "processes": world(),
    }


def _unit(work: Work, index: int, states: dict[str, str]) -> dict[str, Any]:
    spec, unit = work.spec, work.units[index]
    data = work.material.train
    rows = sum(map(len, data)) if unit == JOINT else len(data[index])
    folder = task_folder(work.run, unit)
    return {
        "id": unit,
        "state": states.get(unit, PENDING),
        "rows": rows,
        "scored_rows": len(work.material.scored[index]) if unit != JOINT else sum(map(len, work.material.scored)),
        "steps": steps_of(work, index, rows),
        "starts_from": _starts_from(work, index),
        "writes": [str(folder / "default"), *([str(folder / "ema")] if work.config.keeps_stable else [])],
        "cost": cost_of(work, index),
        "scores": len(spec.adapters) * len(spec.tasks),
    }


def steps_of(work: Work, index: int, rows: int) -> int:
    """Optimiser steps of a unit."""
    args = training_arguments(unit_arguments(work.spec, index), work.run, device=work.device, seed=work.spec.seed)
    if args.max_steps > 0:
        return int(args.max_steps)
    batches = math.ceil(rows / (args.per_device_train_batch_size * world()))
    if args.dataloader_drop_last:
        batches = rows // (args.per_device_train_batch_size * world())
    a_pass = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return math.ceil(args.num_train_epochs * a_pass)


def cost_of(work: Work, index: int) -> float:
    """Cost of a step in steps of plain training at the same batch, by counting passes.

    A plain step is a forward and a backward pass; replay adds the same over its rows, consistency a forward pass.
    """
    config = work.config
    later = index > 0 or previous_named(work)
    if not config.replays or not later:
        return 1.0
    args = training_arguments(unit_arguments(work.spec, index), work.run, device=work.device, seed=work.spec.seed)
    share = (config.replay_batch_size or args.per_device_train_batch_size) / args.per_device_train_batch_size
    extra = share * (_TRAINED + (_FORWARD if config.pulls else 0.0)) / _TRAINED
    return round(1.0 + extra / config.replay_every, 2)


def previous_named(work: Work) -> bool:
    """Whether the settings name a task before the first one."""
    return bool(work.config.ema_adapter_path or work.config.previous_task_model or work.config.prev_task_id)


def _starts_from(work: Work, index: int) -> str:
    """Where the unit's first weights come from, in words."""
    if work.spec.method in ("joint", "single"):
        return "a new adapter"
    before = work.units[index - 1] if index else None
    if before is not None and not (task_folder(work.run, before) / STATE).is_file() and not previous_named(work):
        return f"{task_folder(work.run, before)} (not there yet)"
    previous = previous_of(work, index)
    if previous is None:
        return "a new adapter"
    found = previous.ema if work.config.handover != "default_to_both" else previous.default
    return f"{work.config.handover}: {found or previous.default}"


def _buffer_bytes(work: Work) -> int:
    """Bytes of a full buffer: rows of the mean size, whole numbers in 4 bytes."""
    config = work.config
    if not config.replays:
        return 0
    left_out = ("attention_mask", "task")
    sizes = [
        sum(value.numel() * min(value.element_size(), 4) for key, value in row.items() if key not in left_out)
        for data in work.material.train
        for row in data.examples
    ]  # fmt: skip
    if not sizes:
        raise LoraforgeError("no task has training rows")
    return round(sum(sizes) / len(sizes) * min(config.ilora_buffer_size, len(sizes)))
