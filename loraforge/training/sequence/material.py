"""What a run works on: rows of every task, the labels of the shared head, tokenizer and configuration of the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loraforge.calibrate.base import load_config
from loraforge.calibrate.encode import load_tokenizer
from loraforge.errors import LoraforgeError, raise_problems
from loraforge.tasks import Collator, TaskData, load_task, pad_token_id_of, resolve_kind, task_labels
from loraforge.training.sequence.spec import SequenceSpec

LABELLED = ("classification", "images")
_ANSWERS = ("causal", "choice")


@dataclass(frozen=True, slots=True)
class Material:
    """Everything that is read before a run starts.

    Attributes:
        kind: Kind of all tasks, as the model needs it.
        config: The base's configuration.
        tokenizer: The base's; None for images.
        head_labels: Names of the rows of the shared head; empty without one.
        train: Training rows of each task.
        held_out: Development rows of each task, None where it has none.
        scored: The rows that each task is scored on.
    """

    kind: str
    config: Any
    tokenizer: Any
    head_labels: tuple[str, ...]
    train: tuple[TaskData, ...]
    held_out: tuple[TaskData | None, ...]
    scored: tuple[TaskData, ...]

    @property
    def label_ids(self) -> dict[int, tuple[int, ...]] | None:
        """Rows of the head by task; None without labels."""
        return {i: rows.label_ids for i, rows in enumerate(self.train)} if self.head_labels else None

    def collator(self) -> Collator:
        """Rows to a batch."""
        return Collator(self.kind, pad_token_id_of(self.tokenizer, self.config))


def read_material(spec: SequenceSpec) -> Material:
    """Reads and tokenises the rows of every task.

    Raises:
        LoraforgeError: Missing or empty splits, missing fields, unknown labels, tasks that no single model can do; the
            problems of all tasks at once.
    """
    config = load_config(spec.base_model)
    kinds = _kinds(spec, config)
    kind = kinds[0] if len(set(kinds)) == 1 else "causal"
    tokenizer = None if kind == "images" else load_tokenizer(spec.base_model, spec.source or "the sequence")
    head = head_labels(spec) if kind in LABELLED else ()
    problems: list[LoraforgeError] = []
    read: dict[str, list[TaskData | None]] = {"train": [], "eval": [], "scored": []}
    limit = spec.eval.get("limit")
    for index, task in enumerate(spec.tasks):
        scored = spec.eval_split(task)
        for part, split in (("train", "train"), ("scored", scored), ("eval", "eval")):
            if part == "eval" and (task.eval is None or scored == "eval"):
                read[part].append(None if task.eval is None else read["scored"][index])
                continue
            try:
                found = load_task(
                    task, split, tokenizer=tokenizer, config=config, base=spec.base_model, head_labels=head or None,
                    label_space=spec.label_space, task_index=index, seed=spec.seed,
                    limit=limit if part == "scored" else None,
                )  # fmt: skip
            except LoraforgeError as problem:
                problems += getattr(problem, "problems", [problem])
                read[part].append(None)
                continue
            read[part].append(found)
            if part == "scored" and found.kind == "causal" and found.prompts is None and not task.metrics:
                problems.append(
                    LoraforgeError(
                        "the score of a sequence must rise when it gets better, and perplexity falls",
                        where=f"task '{task.id}'",
                        hint="give the rows a target, or name a metric",
                    )
                )
    raise_problems(problems)
    whole = {part: tuple(rows for rows in found if rows is not None) for part, found in read.items()}
    return Material(kind, config, tokenizer, head, whole["train"], tuple(read["eval"]), whole["scored"])


def _kinds(spec: SequenceSpec, config: Any) -> list[str]:
    """The kind of each task.

    Raises:
        LoraforgeError: They need different models; unreadable files.
    """
    kinds: list[str] = []
    problems: list[LoraforgeError] = []
    for task in spec.tasks:
        try:
            kinds.append(resolve_kind(task, config=config))
        except LoraforgeError as problem:
            problems += getattr(problem, "problems", [problem])
    raise_problems(problems)
    if len(set(kinds)) > 1 and not set(kinds) <= set(_ANSWERS):
        raise LoraforgeError(
            "the tasks of a sequence need one model, and these need several",
            where=spec.source,
            got=", ".join(f"{task.id}: {kind}" for task, kind in zip(spec.tasks, kinds, strict=True)),
            expected="tasks of one kind (causal and choice go together)",
            hint="name the kind in each task, or make a sequence of each kind",
        )
    return kinds


def head_labels(spec: SequenceSpec) -> tuple[str, ...]:
    """Names of the rows of the head that all tasks share, in the order of the tasks.

    With `per-task`, every task has rows of its own, `id:label`; with `shared`, equal labels are one row.
    """
    names: Sequence[str] = [
        f"{task.id}:{label}" if spec.label_space == "per-task" else label
        for task in spec.tasks
        for label in task_labels(task)
    ]
    return tuple(dict.fromkeys(names))
