"""Subjects of three layers, so that a pass can begin in the middle, and plain forward passes to compare with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from loraforge.measure.heads.gates import HeadGates
from loraforge.measure.subjects.subject import Subject, open_subject
from loraforge.tasks import TaskSpec
from tests.tasks.tiny import WORDS, tiny_base

LABELS = ("no", "yes")
KINDS = {"llama": "causal", "gpt2": "causal", "qwen3": "causal", "t5": "text-to-text", "bart": "text-to-text"}


def texts(count: int = 7) -> list[dict[str, str]]:
    """Rows of two to six words with a class and an answer of one to three words."""
    draw = random.Random(5)
    found = []
    for i in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(2, 6))]
        found.append({"text": " ".join(words), "label": LABELS[i % 2], "target": " ".join(words[: 1 + i % 3])})
    return found


def pictures(folder: Path, count: int = 7) -> list[dict[str, str]]:
    """Grey pictures with a gradient, and a class."""
    rows = []
    for i in range(count):
        path = folder / f"picture{i}.png"
        picture = Image.new("RGB", (8, 8))
        picture.putdata([((37 * i + 11 * at) % 256, (53 * i + at) % 256, (7 * at) % 256) for at in range(64)])
        picture.save(path)
        rows.append({"image": str(path), "label": LABELS[i % 2]})
    return rows


def deep(folder: Path, family: str, **asked: Any) -> Subject:
    """A subject of three layers (encoder-decoders: of each) on seven rows in batches of three."""
    base = folder / family
    if not base.is_dir():
        tiny_base(base, family, layers=3)
    kind = KINDS.get(family, "images" if family == "vit" else "classification")
    rows: Sequence[Any] = pictures(folder) if kind == "images" else texts()
    spec = TaskSpec("t", test=rows, train=rows, kind=kind, labels=LABELS if kind not in KINDS.values() else None)
    return open_subject(base, task=spec, **{"device": "cpu", "batch_size": 3, **asked})


def naive(subject: Subject, objective: Any) -> Tensor:
    """(heads, N) differences of losses, a whole pass for each head and batch."""
    found = []
    with torch.no_grad(), HeadGates(subject.model, subject.layout) as gates:
        base = [objective.losses(subject.model, batch).double() for batch in subject.batches()]
        for index, attention in enumerate(subject.layout.attentions):
            for head in range(attention.n_q):
                gates.set(index, torch.tensor([float(h != head) for h in range(attention.n_q)]))
                losses = [objective.losses(subject.model, batch).double() for batch in subject.batches()]
                found.append(torch.cat([a - b for a, b in zip(losses, base, strict=True)]))
            gates.clear()
    return torch.stack(found)
