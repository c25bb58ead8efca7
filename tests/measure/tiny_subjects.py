"""Tiny models on tiny tasks, opened to be measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraforge.measure.subjects.objectives import Objective
from loraforge.measure.subjects.subject import Subject, open_subject
from loraforge.tasks import TaskSpec, load_model, parse_task, write_task_card
from loraforge.training.options import LoraOptions, adapt
from loraforge.training.saving import save_adapter
from tests.tasks.tiny import WORDS, tiny_base, write_rows

LABELS = ("no", "yes")


def rows_of(count: int = 12, *, target: bool = False, like: int = 0) -> list[dict[str, Any]]:
    """Rows of one to three words, or all of `like` words; the label is whether the first word is 'good'."""
    found: list[dict[str, Any]] = []
    for i in range(count):
        first = "good" if i % 3 else "bad"
        rest = [WORDS[(5 * i + j) % len(WORDS)] for j in range((like or 1 + i % 3) - 1)]
        row: dict[str, Any] = {"text": " ".join([first, *rest])}
        row |= {"target": "yes" if i % 3 else "no two"} if target else {"label": LABELS[int(first == "good")]}
        found.append(row)
    return found


def spec_of(folder: Path, *, kind: str = "classification", count: int = 12, like: int = 0, **more: Any) -> TaskSpec:
    """A task with test and training rows of one manner."""
    target = kind not in ("classification", "images")
    test = write_rows(folder / f"{kind}-test-{count}-{like}.jsonl", rows_of(count, target=target, like=like))
    train = write_rows(folder / f"{kind}-train.jsonl", rows_of(30, target=target))
    entry = {"id": "words", "test": str(test), "train": str(train), "kind": kind, **more}
    if not target:
        entry["labels"] = list(LABELS)
    return parse_task(entry, "test")


def opened(folder: Path, family: str, *, kind: str = "classification", like: int = 0, **asked: Any) -> Subject:
    """A tiny base of a family on the task, in float64 unless told otherwise."""
    base = folder / family
    if not base.is_dir():
        tiny_base(base, family)
    return open_subject(base, task=spec_of(folder, kind=kind, like=like), **{"dtype": "float64"} | asked)


def write_adapter(folder: Path, base: Path, out: Path, *, seed: int = 1) -> nn.Module:
    """A LoRA adapter with random weights and a head, as training leaves it; returns the merged model, in float64."""
    model, _, fresh = load_model(base, "classification", head_labels=LABELS, seed=0)
    options = LoraOptions.read({"r": 2, "alpha": 8, "targets": ["query", "value"]})
    wrapped: Any = adapt(model, options, "classification", fresh, seed=0)
    torch.manual_seed(seed)
    for name, p in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(p, std=0.3)
    save_adapter(wrapped, out)
    write_task_card(out, spec_of(folder), "classification", LABELS, base)
    merged: nn.Module = wrapped.double().merge_and_unload().eval()
    return merged


def losses_of(objective: Objective, subject: Subject) -> list[Tensor]:
    """The losses of every batch, nothing gated."""
    with torch.no_grad():
        return [
            objective.losses(subject.model, batch, objective.reference(subject.model, batch))
            for batch in subject.batches()
        ]
