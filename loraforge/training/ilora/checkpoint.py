"""What a checkpoint of I-LORA holds beside the plain one: `ema/`, the buffer, and a record that says what it is of.

    checkpoint-N/  adapter_config.json, adapter_model.safetensors   the adapter `default`
                   ema/                                             the adapter `ema`, in the precision of the average
                   buffer.safetensors                               rows, what was offered, generators, of all processes
                   ilora_state.json                                 step, task, parameters, sha256 of both adapters
                   optimizer.pt, scheduler.pt, rng_state*.pth, trainer_state.json
                   whole                                            the mark, written when all of this is on the disk

A run that was broken at any step goes on from the last marked one to the bytes of a run that was not.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraforge.errors import LoraforgeError
from loraforge.storage.atomic import write_whole
from loraforge.storage.files import sha256_of
from loraforge.training import ranks
from loraforge.training.checkpoints import WHOLE
from loraforge.training.ilora.adapters import PLASTIC, STABLE, WEIGHTS, load_adapter, load_pair, save_stable
from loraforge.training.ilora.buffer import ReplayBuffer
from loraforge.training.ilora.config import ILoraConfig
from loraforge.training.ilora.packing import write_states

if TYPE_CHECKING:
    from loraforge.training.ilora.trainer import ILoraTrainer

STATE = "ilora_state.json"
BUFFER = "buffer.safetensors"
# Where things lie may change between a run and its continuation; what they are may not.
_PLACES = ("ema_adapter_path", "previous_task_model")


def save_more(trainer: ILoraTrainer, folder: Path) -> None:
    """Adds to a checkpoint that holds the plain parts; every process calls it, one writes."""
    if not trainer.ilora.use_ilora:
        return
    writes = trainer.args.should_save
    if trainer.ilora.replays:
        save_buffer(trainer.buffer, folder / BUFFER, writes=writes)
    if not writes:
        return
    adapters = {PLASTIC: folder}
    if trainer.pairs is not None:
        save_stable(trainer.model, folder, trainer.pairs)
        adapters[STABLE] = folder / STABLE
    record = state_record(
        trainer.ilora, step=trainer.state.global_step, task_index=trainer.task_index, adapters=adapters
    )
    write_whole(folder / STATE, json.dumps(record, indent=2, sort_keys=True) + "\n")


def load(trainer: ILoraTrainer, folder: Path) -> None:
    """Restores both adapters and the buffer; the optimiser, scheduler and random states are transformers'.

    Raises:
        LoraforgeError: The checkpoint is not whole, of another task or other parameters, damaged, or lacks a part.
    """
    if not (folder / WHOLE).is_file():
        raise LoraforgeError("the checkpoint is not whole", where=folder, hint="continue from an earlier one")
    if not trainer.ilora.use_ilora:
        load_adapter(trainer.model, folder, PLASTIC)
        return
    record = read_state(folder / STATE)
    _check_record(record, trainer, folder)
    plastic = _intact(record, PLASTIC, folder)
    if trainer.pairs is None:
        load_adapter(trainer.model, plastic, PLASTIC)
    else:
        load_pair(trainer.model, plastic, _intact(record, STABLE, folder / STABLE), trainer.pairs)
    if trainer.ilora.replays:
        args = trainer.args
        trainer.buffer = ReplayBuffer.load(folder / BUFFER, rank=args.process_index, world=args.world_size)


def save_buffer(buffer: ReplayBuffer, path: Path, *, writes: bool = True) -> None:
    """Writes the parts of all processes to one file; every process calls it.

    Args:
        buffer: This process's part.
        path: The file.
        writes: Whether this process writes.
    """
    states = ranks.gather(buffer.state_dict())
    if writes:
        write_states(path, states)


def state_record(
    config: ILoraConfig, *, step: int, task_index: int, adapters: dict[str, Path], role: str = "checkpoint"
) -> dict[str, Any]:
    """What ilora_state.json says: the parameters, the step, and which bytes belong to them.

    Args:
        config: The parameters.
        step: Optimiser steps done in this task, which is also that of the last one of the average if that was due.
        task_index: Number of the task.
        adapters: Folders of the adapters, by name.
        role: What the folder is: `checkpoint`, or `task`.
    """
    values = config.as_dict()
    return {
        "version": 1,
        "role": role,
        "step": step,
        "ema_step": step - step % config.ema_every if config.keeps_stable else None,
        "task_index": task_index,
        "current_task_id": config.current_task_id,
        "prev_task_id": config.prev_task_id,
        "config": values,
        "config_sha256": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest(),
        "adapters": {name: sha256_of(folder / WEIGHTS) for name, folder in adapters.items()},
    }


def read_state(path: Path) -> dict[str, Any]:
    """An ilora_state.json.

    Raises:
        LoraforgeError: It is missing or no such record.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoraforgeError(f"there is no {STATE}", where=path.parent, hint="this is no folder of I-LORA") from error
    except (OSError, ValueError) as error:
        raise LoraforgeError(f"{STATE} cannot be read", where=path, got=error) from error
    if not isinstance(record, dict) or record.get("version") != 1:
        raise LoraforgeError(f"{STATE} is of no known version", where=path, expected="version 1")
    return record


def _check_record(record: dict[str, Any], trainer: ILoraTrainer, folder: Path) -> None:
    """Refuses a checkpoint of another task or with other parameters, naming them."""
    now = json.loads(json.dumps(trainer.ilora.as_dict()))
    then = record["config"]
    differing = [name for name in now if name not in _PLACES and then.get(name) != now[name]]
    if record["task_index"] != trainer.task_index:
        raise LoraforgeError(
            "the checkpoint is of another task", where=folder, got=record["task_index"], expected=trainer.task_index
        )
    if differing:
        raise LoraforgeError(
            "the checkpoint was written under other parameters",
            where=folder,
            got=", ".join(f"{name}={then.get(name)!r}" for name in differing),
            expected=", ".join(f"{name}={now[name]!r}" for name in differing),
        )


def _intact(record: dict[str, Any], adapter: str, folder: Path) -> Path:
    """The folder of an adapter whose bytes are those that were written."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise LoraforgeError(f"the checkpoint lacks the adapter {adapter}", where=path)
    if sha256_of(path) != record["adapters"].get(adapter):
        raise LoraforgeError(f"the adapter {adapter} of the checkpoint was changed or damaged", where=path)
    return folder
