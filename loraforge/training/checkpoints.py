"""Checkpoints of a run: which are whole, which stay, and what a disk that refuses means."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from loraforge.errors import LoraforgeError
from loraforge.storage.atomic import flush_file

# In a checkpoint folder once everything else is there.
WHOLE = "whole"
# What torch says in the RuntimeError of a write that was refused.
_SIGNS = ("PytorchStreamWriter", "inline_container", "iostream", os.strerror(errno.ENOSPC))


@contextmanager
def named_when_refused(where: Path, what: str) -> Iterator[None]:
    """Turns a full disk into an error that says what to do; safetensors and torch report it in words of their own.

    Args:
        where: File or folder that is written.
        what: What it is: "the checkpoint".

    Raises:
        LoraforgeError: The disk refused.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        told = str(error).split("\n")[0]
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _SIGNS):
            raise
        raise LoraforgeError(
            f"{what} could not be written",
            where=where,
            got=told,
            hint="free space; the same command (of one task: with --resume) goes on from the last whole checkpoint",
        ) from error


def mark_whole(checkpoint: Path) -> None:
    """Marks a checkpoint as whole once all of it has reached the disk."""
    for entry in sorted(checkpoint.rglob("*"), reverse=True):
        flush_file(entry)
    (checkpoint / WHOLE).touch()
    flush_file(checkpoint)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / WHOLE).is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def ended_state(checkpoint: Path) -> TrainerState | None:
    """The state in a checkpoint that was the end of its run (its last step, or stopped early); else None."""
    path = checkpoint / TRAINER_STATE_NAME
    if not path.is_file():
        return None
    state = TrainerState.load_from_json(str(path))
    control = (state.stateful_callbacks or {}).get("TrainerControl", {})
    return state if control.get("args", {}).get("should_training_stop") else None


def prune_checkpoints(folder: Path, keep: int, best: str | None) -> None:
    """Removes all but the last `keep` whole checkpoints and the best one."""
    for path in whole_checkpoints(folder)[:-keep]:
        if best is None or path.name != Path(best).name:
            # First the mark: what is left of a folder that is half removed must not look whole.
            (path / WHOLE).unlink()
            shutil.rmtree(path)


def drop_torn(folder: Path) -> None:
    """Removes checkpoints that were cut off while being written."""
    for path in folder.glob("checkpoint-*"):
        if not (path / WHOLE).is_file():
            shutil.rmtree(path)
