"""The rows that a measurement is taken on, as the measured model reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from loraforge.calibrate.base import load_config
from loraforge.calibrate.encode import load_tokenizer, own_folder
from loraforge.errors import LoraforgeError
from loraforge.measure.subjects.subset import choose_subset, read_subset
from loraforge.tasks import TaskData, TaskSpec, load_task, read_task_card, resolve_kind, task_labels

HEADED = ("classification", "images")
_FROM_CARD = ("text", "text_pair", "target", "max_length")


@dataclass(frozen=True)
class TaskRows:
    """The split of a task as a model reads it.

    Attributes:
        data: The split.
        named: Classes that the model's head is known to have, in its order; None where the task has to say them.
        space: How the head names them.
        tokenizer: The base's; None for images.
        folder: Of the model; None for one in memory that came from none.
    """

    data: TaskData
    named: tuple[str, ...] | None
    space: str
    tokenizer: Any
    folder: str | Path | None


def read_rows_of(
    model: str | Path | nn.Module,
    card: Mapping[str, Any] | None,
    task: TaskSpec,
    split: str,
    labels: Sequence[str] | None,
    seed: int,
    tokenizer: Any,
) -> TaskRows:
    """Reads a split of a task for a model.

    Args:
        model: Folder, id, or a model in memory.
        card: task.json of the adapter, where there is one; default the model's.
        task: Of which a trained model's card says what it does not say itself.
        split: Of the task.
        labels: Classes in the head's order, if the user names them.
        seed: Of the choice of training rows, where the task bounds them.
        tokenizer: Default: looked up beside the model.

    Raises:
        LoraforgeError: Model or rows cannot be read.
    """
    if isinstance(model, nn.Module):
        config: Any = getattr(model, "config", None)
        folder: str | Path | None = own_folder(config)
    else:
        config, folder = load_config(model), model
        card = card or read_task_card(Path(model))
    spec = _filled(task, card)
    kind = resolve_kind(spec, config=config)
    named, space = None, "shared"
    if kind in HEADED:
        known = any("Classification" in name for name in getattr(config, "architectures", None) or ())
        named, space = _classes(labels, card, spec, config, known or isinstance(model, nn.Module))
    if tokenizer is None and kind != "images":
        tokenizer = load_tokenizer(folder, f"task '{spec.id}'")
    data = load_task(spec, split, tokenizer=tokenizer, config=config, base=folder, head_labels=named, label_space=space,
                     seed=seed)  # fmt: skip
    return TaskRows(data, named, space, tokenizer, folder)


def _filled(task: TaskSpec, card: Mapping[str, Any] | None) -> TaskSpec:
    """The task with what its trained model's card says where it says nothing itself."""
    if card is None or card["id"] != task.id:
        return task
    known: dict[str, Any] = {key: card.get(key) for key in _FROM_CARD if getattr(task, key) is None}
    return replace(task, **known | {"kind": card["kind"] if task.kind == "auto" else task.kind})


def _classes(
    labels: Sequence[str] | None, card: Mapping[str, Any] | None, spec: TaskSpec, config: Any, headed: bool
) -> tuple[tuple[str, ...] | None, str]:
    """Names of the head's rows, or None where the task has to say them, and how they are made."""
    if labels is not None:
        return tuple(labels), "shared"
    if card is not None and card["labels"]:
        return tuple(card["labels"]), card["label_space"]
    names = [name for _, name in sorted((getattr(config, "id2label", None) or {}).items(), key=lambda i: int(i[0]))]
    made_up = names == [f"LABEL_{i}" for i in range(len(names))]
    if made_up or not headed:
        return None, "shared"
    # A head of another task is replaced by a new one, as training would.
    known = spec.labels is not None or spec.train is not None
    return (None if known and not set(task_labels(spec)) <= set(names) else tuple(names)), "shared"


def choose_rows(
    subset: int | Sequence[int] | str | Path | None, data: TaskData, seed: int
) -> tuple[list[int], dict[str, Any]]:
    """The rows of a subset and what is recorded of it.

    Raises:
        LoraforgeError: Rows that the data does not have; none.
    """
    size = len(data)
    about: dict[str, Any] = {"size": size, "asked": subset if isinstance(subset, int) else None}
    if subset is None:
        return list(range(size)), about
    if isinstance(subset, int):
        if subset < 1:
            raise LoraforgeError("the subset is empty", got=subset, expected="a number above 0")
        return choose_subset(size, subset, seed), about | {"seed": seed}
    if isinstance(subset, str | Path):
        return read_subset(Path(subset), size=size, data_sha256=data.sha256), about | {"file": str(subset)}
    counts = Counter(subset)
    twice = [row for row, count in counts.items() if count > 1]
    if twice:
        raise LoraforgeError("the subset has rows twice", where=data.source, got=f"row {twice[0]}")
    wrong = [row for row in subset if not 0 <= row < size]
    if wrong or not subset:
        got, expected = f"row {wrong[0]}" if wrong else "no row", f"rows 0 to {size - 1}"
        raise LoraforgeError("the subset does not fit the data", where=data.source, got=got, expected=expected)
    return list(subset), about
