"""task.json: what an adapter was trained for, kept beside its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError
from loraforge.storage.atomic import flush_file
from loraforge.storage.names import TASK_CARD
from loraforge.tasks.spec import TaskSpec

_SPEC_KEYS = ("text", "text_pair", "target", "max_length")


def write_task_card(
    folder: Path, spec: TaskSpec, kind: str, head_labels: Sequence[str], base: object, label_space: str = "shared"
) -> Path:
    """Writes the card of an adapter.

    Args:
        folder: Of the adapter.
        spec: The task.
        kind: What the task is (never `auto`).
        head_labels: Names of all rows of the head, in its order; empty where there is none.
        base: Folder or id of the base.
        label_space: How the head names classes: `shared` or `per-task`.

    Returns:
        The file.
    """
    card: dict[str, Any] = {"id": spec.id, "kind": kind, "labels": list(head_labels), "label_space": label_space}
    card |= {key: getattr(spec, key) for key in _SPEC_KEYS} | {"base": None if base is None else str(base)}
    path = Path(folder) / TASK_CARD
    path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    flush_file(path)
    return path


def read_task_card(folder: Path) -> dict[str, Any] | None:
    """The card of an adapter (id, kind, labels, label_space, text, text_pair, target, max_length, base), or None.

    Raises:
        LoraforgeError: It is there but cannot be read.
    """
    path = Path(folder) / TASK_CARD
    if not path.is_file():
        return None
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoraforgeError("the adapter's task.json cannot be read", where=path, got=str(error)) from error
    labels = card.get("labels") if isinstance(card, dict) else None
    whole = isinstance(labels, list) and isinstance(card.get("id"), str) and isinstance(card.get("kind"), str)
    if not whole:
        expected = "an object with id, kind and labels"
        raise LoraforgeError("the adapter's task.json is not one of ours", where=path, expected=expected)
    return {"label_space": "shared", **dict.fromkeys((*_SPEC_KEYS, "base")), **card}
