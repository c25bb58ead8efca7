"""What a task is: its rows, labels and examples, and the model that it needs. Names are imported when they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraforge.tasks.card import read_task_card, write_task_card
    from loraforge.tasks.collator import Collator
    from loraforge.tasks.data import TaskData, load_task
    from loraforge.tasks.encode import pad_token_id_of
    from loraforge.tasks.kinds import resolve_kind, task_type_of
    from loraforge.tasks.labels import task_labels
    from loraforge.tasks.model import load_model
    from loraforge.tasks.spec import TaskSpec, parse_task

_HOMES = {
    "Collator": "collator",
    "TaskData": "data",
    "TaskSpec": "spec",
    "load_model": "model",
    "load_task": "data",
    "pad_token_id_of": "encode",
    "parse_task": "spec",
    "read_task_card": "card",
    "resolve_kind": "kinds",
    "task_labels": "labels",
    "task_type_of": "kinds",
    "write_task_card": "card",
}

__all__ = [
    "Collator",
    "TaskData",
    "TaskSpec",
    "load_model",
    "load_task",
    "pad_token_id_of",
    "parse_task",
    "read_task_card",
    "resolve_kind",
    "task_labels",
    "task_type_of",
    "write_task_card",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is asked for: reading a task's description needs no torch."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
