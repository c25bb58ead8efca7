"""Tiny adapters with heads, and rows, for the tests of evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from loraforge.tasks import TaskSpec, load_model, write_task_card
from tests.tasks.tiny import WORDS, write_rows


def rows_of(labels: Sequence[str], count: int, seed: int) -> list[dict[str, Any]]:
    """Random texts of one to six words with random labels, every label at least once."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        words = [WORDS[j] for j in torch.randint(len(WORDS), (1 + i % 6,), generator=draw)]
        label = labels[i] if i < len(labels) else labels[int(torch.randint(len(labels), (1,), generator=draw))]
        rows.append({"text": " ".join(words), "label": label})
    return rows


def task_of(folder: Path, name: str, labels: Sequence[str], count: int = 24, seed: int = 0) -> TaskSpec:
    """A classification task with its labels named and a test split."""
    path = write_rows(folder / f"{name}.jsonl", rows_of(labels, count, seed))
    return TaskSpec(id=name, test=str(path), labels=tuple(labels))


def adapter_of(
    folder: Path,
    base: Path,
    spec: TaskSpec,
    *,
    kind: str = "classification",
    seed: int = 1,
    card: bool = True,
    targets: Sequence[str] = ("query", "value"),
    save: Sequence[str] = ("classifier",),
) -> Path:
    """An adapter that really changes the base (B drawn, not zero), with a head of its own."""
    labels = tuple(spec.labels or ()) if kind == "classification" else ()
    model, _, _ = load_model(base, kind, head_labels=labels, seed=seed)
    torch.manual_seed(seed)
    task_type = {"classification": "SEQ_CLS", "text-to-text": "SEQ_2_SEQ_LM"}.get(kind, "CAUSAL_LM")
    config = LoraConfig(
        task_type=task_type, r=2, lora_alpha=8, target_modules=list(targets), modules_to_save=list(save) or None
    )
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_()
    wrapped.save_pretrained(folder)
    if card:
        write_task_card(folder, spec, kind, labels, base)
    return folder
