"""The classes of a task: their names, their order, their rows in the head. The same in every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraforge.errors import LoraforgeError, did_you_mean
from loraforge.tasks.fields import label_name, take
from loraforge.tasks.rows import read_rows
from loraforge.tasks.spec import TaskSpec

SPACES = ("shared", "per-task")
_SHOWN = 20


def task_labels(spec: TaskSpec) -> tuple[str, ...]:
    """The names of a task's classes in the order of its own head.

    They are the task's `labels`, or the distinct values of its training rows: sorted as numbers where all of them are
    numbers, as text otherwise.

    Raises:
        LoraforgeError: There are neither `labels` nor training rows; a row without a label; fewer than two classes.
    """
    if spec.labels is not None:
        listed = spec.labels.values() if isinstance(spec.labels, Mapping) else spec.labels
        names = tuple(dict.fromkeys(label_name(name) for name in listed))
    else:
        rows = read_rows(spec, "train")
        names = sorted_labels(rows.each(lambda item, where: raw_label(item, spec, where)))
    if len(names) < 2:
        got = ", ".join(names) or "none"
        raise LoraforgeError("a task needs two classes or more", where=f"task '{spec.id}'", got=got)
    return names


def sorted_labels(values: Sequence[str]) -> tuple[str, ...]:
    """Distinct names, sorted as numbers where all of them are, as text otherwise."""
    names = set(values)
    try:
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    except ValueError:
        return tuple(sorted(names))


def raw_label(item: Mapping[str, Any], spec: TaskSpec, where: str) -> str:
    """What the file calls the class of a row.

    Raises:
        LoraforgeError: The row has no label, or one that is no class.
    """
    field = spec.label or "label"
    value = take(item, field, where, "label")
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not value.is_integer()):
        expected = "a name or a whole number"
        raise LoraforgeError("the label is no class", where=f"{where}, {field}", got=repr(value), expected=expected)
    return label_name(value)


def known_values(spec: TaskSpec, names: Sequence[str]) -> dict[str, int]:
    """The values that a row's label may have -> index into `names`.

    A value is the name of a class, a key of the task's `labels` where these are {value: name}, or, where no name is a
    number, the index of a class.
    """
    index = {name: i for i, name in enumerate(names)}
    known: dict[str, int] = {}
    if isinstance(spec.labels, Mapping):
        known = {label_name(value): index[label_name(name)] for value, name in spec.labels.items()}
    elif spec.labels is not None and not any(name.lstrip("-").isdigit() for name in names):
        known = {str(i): i for i in range(len(names))}
    return known | index


def class_of(item: Mapping[str, Any], spec: TaskSpec, where: str, known: Mapping[str, int]) -> int:
    """The class of a row.

    Args:
        item: The row.
        spec: The task.
        where: The row, for messages.
        known: Of `known_values`.

    Raises:
        LoraforgeError: The row has no label, or an unknown one.
    """
    value = raw_label(item, spec, where)
    if value not in known:
        source = "the task's 'labels'" if spec.labels is not None else "the training rows"
        raise LoraforgeError(
            f"unknown label: {source} have no such class",
            where=f"{where}, {spec.label or 'label'}",
            got=repr(value),
            hint=did_you_mean(value, _shown(spec, known)[:_SHOWN]),
        )
    return known[value]


def _shown(spec: TaskSpec, known: Mapping[str, int]) -> list[str]:
    """The values to name in a message: without the indices that stand for names."""
    if isinstance(spec.labels, Mapping):
        return list(known)
    return [value for value in known if not value.lstrip("-").isdigit()] or list(known)


def head_positions(
    spec: TaskSpec, names: Sequence[str], head_labels: Sequence[str] | None, label_space: str
) -> tuple[int, ...]:
    """Where the task's classes are in the head.

    Args:
        spec: The task.
        names: Its classes.
        head_labels: The names of all rows of the head; None for the task's own head.
        label_space: `shared`: equal names of different tasks are one row; `per-task`: the head calls them `id:name`.

    Raises:
        LoraforgeError: Classes that the head does not have.
    """
    if label_space not in SPACES:
        raise LoraforgeError("unknown label space", got=repr(label_space), expected=" or ".join(SPACES))
    if head_labels is None:
        return tuple(range(len(names)))
    rows = {name: i for i, name in enumerate(head_labels)}
    wanted = [f"{spec.id}:{name}" if label_space == "per-task" else name for name in names]
    missing = [name for name in wanted if name not in rows]
    if missing:
        raise LoraforgeError(
            "the head has no row for classes of the task",
            where=f"task '{spec.id}'",
            got=_listed(missing),
            expected=_listed(head_labels),
        )
    return tuple(rows[name] for name in wanted)


def own_names(spec: TaskSpec, head_labels: Sequence[str] | None, label_space: str) -> tuple[str, ...]:
    """The task's classes: its own, or, where it has neither `labels` nor training rows, those of the head."""
    if head_labels is None or spec.labels is not None or spec.train is not None:
        return task_labels(spec)
    prefix = f"{spec.id}:" if label_space == "per-task" else ""
    return tuple(name.removeprefix(prefix) for name in head_labels if name.startswith(prefix))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
