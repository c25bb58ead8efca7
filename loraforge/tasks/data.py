"""A split of a task as examples that a trainer or a metric takes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraforge.calibrate.base import load_config
from loraforge.calibrate.encode import own_folder
from loraforge.errors import LoraforgeError
from loraforge.tasks.encode import Example
from loraforge.tasks.examples import Job, make_examples
from loraforge.tasks.kinds import resolve_kind
from loraforge.tasks.pictures import Pictures
from loraforge.tasks.rows import read_rows
from loraforge.tasks.spec import SPLITS, TaskSpec


@dataclass(frozen=True, slots=True, eq=False)
class TaskData:
    """A split of a task.

    Attributes:
        spec: The task.
        split: `train`, `eval` or `test`.
        kind: What the task is (never `auto`).
        examples: One a row, without a batch dimension, unpadded, on the CPU. Every one has `task` (), the task's index.
            classification: input_ids, attention_mask (L,), token_type_ids where the model has types, labels () the row
            of the head. images: pixel_values (C, H, W), labels (). causal: input_ids, attention_mask, labels (L,), -100
            where nothing is learnt; with pixel_values for captions. text-to-text: input_ids, attention_mask (L,),
            labels (Lt,). choice: the right choice, as causal (as text-to-text for an encoder-decoder). Images are
            decoded when an example is asked for, and kept up to 1 GiB.
        references: What is right: the row of the head, the answer's text, or the index of the right choice.
        choices: One list of examples a row, one example a choice (without an end token), or None.
        prompts: What a causal model is asked, without the answer (of captions without a prompt the image alone); None
            for other kinds.
        labels: Names of the task's classes; empty where it has none.
        label_ids: The head's row of each.
        texts: The (first) text of each row, or None for images.
        source: Where the rows came from.
        sha256: Of the source.
        available: Rows of the source; `len()` are those that were taken.
    """

    spec: TaskSpec
    split: str
    kind: str
    examples: Sequence[Example]
    references: list[Any]
    choices: list[list[Example]] | None
    prompts: Sequence[Example] | None
    labels: tuple[str, ...]
    label_ids: tuple[int, ...]
    texts: list[str] | None
    source: str
    sha256: str
    available: int

    def __len__(self) -> int:
        return len(self.examples)


def load_task(
    spec: TaskSpec,
    split: str,
    *,
    tokenizer: Any = None,
    config: Any = None,
    processor: Any = None,
    base: object = None,
    head_labels: Sequence[str] | None = None,
    label_space: str = "shared",
    task_index: int = 0,
    limit: int | None = None,
    seed: int = 0,
) -> TaskData:
    """Reads a split of a task and tokenises it.

    Args:
        spec: The task.
        split: `train`, `eval` or `test`.
        tokenizer: The base's; default: looked up in `base`.
        config: The base's configuration.
        processor: The base's image processor; default: looked up in `base`.
        base: Folder or id of the base, or the model itself; never fetched.
        head_labels: Names of all rows of the head, for a head that several tasks share; None for the task's own.
        label_space: `shared`: the head names classes as the task does; `per-task`: as `id:class`.
        task_index: Kept in every example as `task`.
        limit: Largest number of rows: the first of a shuffle by `seed`, in the order of the file. The training split
            is bound by the task's `rows` as well.
        seed: Of that shuffle.

    Raises:
        LoraforgeError: A split that is missing or empty; rows with missing fields, unknown labels or unreadable images,
            each named; a text that the base cannot read. The first problems are shown at once.
    """
    if split not in SPLITS:
        raise LoraforgeError("unknown split of a task", got=repr(split), expected=", ".join(SPLITS))
    if config is None:
        config = getattr(base, "config", None)
    if not isinstance(base, str | Path):
        base = own_folder(config)
    rows = read_rows(spec, split)
    if config is None and base is not None:
        config = load_config(base)
    kind = resolve_kind(spec, config=config, item=rows.items[0])
    chosen = _choose(len(rows), spec, split, limit, seed)
    job = Job(spec, kind, rows, chosen, tokenizer, config, processor, base)
    parts = make_examples(job, head_labels, label_space)
    for example in parts.examples:
        example["task"] = torch.tensor(task_index)
    pixels, prompts = parts.pixels, parts.prompts
    return TaskData(
        spec,
        split,
        kind,
        parts.examples if pixels is None else Pictures(pixels, parts.examples),
        parts.references,
        parts.choices,
        prompts if prompts is None or pixels is None else Pictures(pixels, prompts),
        parts.labels,
        parts.label_ids,
        parts.texts,
        rows.where,
        rows.sha256,
        len(rows),
    )


def _choose(count: int, spec: TaskSpec, split: str, limit: int | None, seed: int) -> list[int]:
    """The rows to take: the first of a shuffle by (seed, task, split), in the order of the file."""
    bounds = [count, limit, spec.rows if split == "train" else None]
    wanted = min(bound for bound in bounds if bound is not None)
    if wanted == count:
        return list(range(count))
    key = hashlib.sha256(f"{seed} {spec.id} {split}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return sorted(torch.randperm(count, generator=generator)[:wanted].tolist())
