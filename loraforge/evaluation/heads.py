"""Which head a model answers a task with: its own, one that a merge kept apart, or a named adapter's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from loraforge.errors import LoraforgeError, did_you_mean, raise_problems
from loraforge.evaluation.subjects import Subject, open_subjects, read_heads
from loraforge.tasks import TaskSpec, task_labels

_FROM_CARD = ("text", "text_pair", "target", "max_length")


class NoHead(Exception):
    """A row has no head for a task; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The head of one row for one task.

    Attributes:
        source: Where it comes from, for the report.
        tensors: By name; None for the head that the loaded model has.
        labels: Names of its rows; None where nothing says so: then they are the task's classes in their order.
        space: How it names classes: "shared" or "per-task".
    """

    source: str
    tensors: Mapping[str, Tensor] | None
    labels: tuple[str, ...] | None = None
    space: str = "shared"


class Heads:
    """Finds heads, and the adapter that each task belongs to.

    Attributes:
        owners: Task -> name of the row that was trained for it, of those that have one.
    """

    def __init__(
        self, subjects: Sequence[Subject], tasks: Sequence[TaskSpec], own: Mapping[str, str], given: Mapping[str, str]
    ) -> None:
        """Matches adapters to tasks by --own, name or card.

        Args:
            subjects: The rows without the base.
            tasks: The columns.
            own: Task -> name of the row that was trained for it.
            given: Task -> row, head kept apart, or adapter folder whose head serves where a row has none.

        Raises:
            LoraforgeError: Names that are none; heads that do not fit their task.
        """
        self._subjects = {subject.name: subject for subject in subjects}
        self._tasks = {task.id: task for task in tasks}
        self._check_names(own, given)
        self.owners: dict[str, str] = {}
        for task in self._tasks:
            owner = own.get(task) or self._guess_owner(task)
            if owner is not None:
                self.owners[task] = owner
        self._learnt: dict[str, Head] = {}
        self._given = {task: self._named_head(task, name) for task, name in given.items()}

    def fill(self, spec: TaskSpec) -> TaskSpec:
        """The task with what its owner's card says where the task itself says nothing."""
        owner = self._subjects.get(self.owners.get(spec.id, ""))
        card = owner.card if owner is not None and owner.card is not None and owner.card["id"] == spec.id else None
        known: dict[str, Any] = {}
        if card is not None:
            known = {key: card.get(key) for key in _FROM_CARD if getattr(spec, key) is None}
            known["kind"] = card["kind"] if spec.kind == "auto" else spec.kind
        if spec.labels is None and spec.train is None:
            labels, space = _labels_of(card)
            if labels is None and spec.id in self._given:
                labels, space = self._given[spec.id].labels, self._given[spec.id].space
            known["labels"] = None if labels is None else _without_prefix(labels, space, spec.id)
        return replace(spec, **known)

    def of(self, subject: Subject, spec: TaskSpec, native: bool) -> Head:
        """The head that a row answers a task with.

        Args:
            subject: The row.
            spec: The task, filled.
            native: Whether the loaded model has weights of its own for this task's classes.

        Raises:
            NoHead: There is none.
            LoraforgeError: There is one, for other classes.
        """
        if subject.heads and self._fits(subject, spec):
            return _checked(_head_of(subject, "own"), spec, subject.path)
        if subject.kind == "model" and native and self._fits(subject, spec):
            return Head("own", None, *_labels_of(subject.card))
        for name in dict.fromkeys((spec.id, self.owners.get(spec.id, ""))):
            if name in subject.aside:
                return _checked(self._aside_head(subject, name), spec, subject.aside[name])
        if spec.id in self._given:
            return _checked(self._given[spec.id], spec, self._given[spec.id].source)
        if subject.heads or (subject.kind == "model" and subject.name in self.owners.values()):
            whose = f"of task '{subject.card['id']}'" if subject.card else "not known to be of this task"
            raise NoHead(f"its own head is {whose}, and no other was named")
        owner = self._subjects.get(self.owners.get(spec.id, ""))
        if spec.id in self._learnt:
            return self._learnt[spec.id]
        if owner is not None and owner.heads:
            return _checked(_head_of(owner, f"the head of {owner.name}"), spec, owner.path)
        if native and subject.kind != "model":
            return Head("the base's head", None)
        raise NoHead("it has no head for this task, and no row of this name has one")

    def learn(self, spec: TaskSpec, subject: Subject, head: Head, model: Any) -> None:
        """Keeps the head of a full model that a task belongs to, for rows without one."""
        if self.owners.get(spec.id) != subject.name or head.tensors is not None:
            return
        body = f"{model.base_model_prefix}."
        tensors = {key: t.detach().cpu() for key, t in model.state_dict().items() if not key.startswith(body)}
        self._learnt[spec.id] = Head(f"the head of {subject.name}", tensors, head.labels, head.space)

    def _check_names(self, own: Mapping[str, str], given: Mapping[str, str]) -> None:
        problems = []
        for option, pairs in (("--own", own), ("--heads", given)):
            for task in pairs:
                if task not in self._tasks:
                    hint = did_you_mean(task, self._tasks)
                    problems.append(LoraforgeError(f"{option} names a task that is not evaluated", got=task, hint=hint))
        for task, name in own.items():
            if name not in self._subjects:
                hint = did_you_mean(name, self._subjects)
                problems.append(LoraforgeError(f"--own {task}=... names no row", got=name, hint=hint))
        raise_problems(problems)

    def _guess_owner(self, task: str) -> str | None:
        """The row of the task's name, else the first adapter or model whose card is the task's."""
        if task in self._subjects:
            return task
        cards = (name for name, s in self._subjects.items() if s.card is not None and s.card["id"] == task)
        return next(cards, None)

    def _fits(self, subject: Subject, spec: TaskSpec) -> bool:
        """Whether a row's own head is of a task."""
        if self.owners.get(spec.id) == subject.name:
            return True
        card = subject.card
        if card is not None:
            if card["label_space"] == "per-task":
                return any(label.startswith(f"{spec.id}:") for label in card["labels"])
            return bool(card["id"] == spec.id)
        if subject.name in self.owners.values():
            return False
        # An adapter that says nothing of its task: the number of classes is all there is to go by.
        sizes = {tensor.shape[0] for tensor in subject.heads.values()}
        return subject.kind == "model" or len(task_labels(spec)) in sizes

    def _named_head(self, task: str, name: str) -> Head:
        """The head that --heads names."""
        subject = self._subjects.get(name)
        if subject is None:
            for holder in self._subjects.values():
                if name in holder.aside:
                    return self._aside_head(holder, name)
            if not Path(name).is_dir():
                known = [*self._subjects, *(aside for s in self._subjects.values() for aside in s.aside)]
                raise LoraforgeError(
                    f"--heads {task}=... names neither a row, a head kept apart, nor a folder", got=name,
                    hint=did_you_mean(name, known),
                )  # fmt: skip
            if (Path(name) / "heads.safetensors").is_file():
                tensors, card = read_heads(Path(name))
                return Head(f"the head in {name}", tensors, *_labels_of(card))
            subject = open_subjects([name], [])[0]
        if not subject.heads:
            raise LoraforgeError(f"--heads {task}=... names an adapter without a head", where=subject.path, got=name)
        return _head_of(subject, f"the head of {subject.name}")

    def _aside_head(self, subject: Subject, name: str) -> Head:
        """A head that a merge kept apart; what its rows are is in its card, or in that of the adapter it was of."""
        folder = subject.aside[name]
        origin = self._subjects.get(name)
        tensors, card = read_heads(folder)
        known = card or (origin.card if origin is not None else None)
        return Head(f"the head kept for {name}", tensors, *_labels_of(known))


def _head_of(subject: Subject, source: str) -> Head:
    return Head(source, subject.heads, *_labels_of(subject.card))


def _labels_of(card: Mapping[str, Any] | None) -> tuple[tuple[str, ...] | None, str]:
    if card is None or not card["labels"]:
        return None, "shared"
    return tuple(card["labels"]), str(card["label_space"])


def _without_prefix(labels: Sequence[str], space: str, task: str) -> tuple[str, ...]:
    """The task's own names of its classes."""
    prefix = "" if space == "shared" else f"{task}:"
    return tuple(label.removeprefix(prefix) for label in labels if label.startswith(prefix))


def _checked(head: Head, spec: TaskSpec, where: object) -> Head:
    """The head, if it has a row for each of its classes.

    Raises:
        LoraforgeError: It has not.
    """
    names = head.labels or task_labels(spec)
    rows = sorted({tensor.shape[0] for tensor in (head.tensors or {}).values()})
    if len(names) not in rows:
        raise LoraforgeError(
            f"the head is not one for the classes of task '{spec.id}'", where=where,
            got=f"tensors of {', '.join(map(str, rows))} rows", expected=f"{len(names)} rows: {', '.join(names)}",
            hint=f"--heads {spec.id}=ADAPTER names another head; the task's `labels` name its classes",
        )  # fmt: skip
    return head
