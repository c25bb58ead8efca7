"""Tiny models ready to be measured in float64, for comparisons with the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraforge.measure.subjects.subject import Subject, open_subject
from loraforge.tasks import TaskSpec
from tests.tasks.tiny import WORDS, tiny_base, write_rows

LABELS = ("no", "yes")
# float64 on both sides; losses of order 1 through some thousand operations.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}
# Central differences with 1e-5: 1e-10 of truncation and 1e-11 of rounding, times third derivatives of order 10.
SLOPE = {"rtol": 0.0, "atol": 2e-8}


def rows(n: int = 7, seed: int = 0) -> list[dict[str, str]]:
    """Texts of 3 or 6 words, with a class and an answer: batches are padded, and rows of one length can go together."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        size = int(rng.integers(1, 3))
        words = [str(word) for word in rng.choice(WORDS, 3 * size)]
        answer = " ".join(str(word) for word in rng.choice(WORDS, size))
        found.append({"text": " ".join(words), "label": str(rng.choice(LABELS)), "target": answer})
    found[0]["label"], found[1]["label"] = LABELS
    return found


def make_task(folder: Path, kind: str) -> TaskSpec:
    path = write_rows(folder / "rows.jsonl", rows())
    if kind == "classification":
        return TaskSpec(id="t", train=path, test=path, kind=kind, text="text", label="label", labels=LABELS)
    return TaskSpec(id="t", train=path, test=path, kind=kind, text="text", target="target")


def open_tiny(folder: Path, family: str, kind: str, **options: Any) -> Subject:
    """A tiny base in float64; its spread of weights is large, so that heads matter."""
    tiny_base(folder / "base", family)
    return open_subject(folder / "base", task=make_task(folder, kind), dtype="float64", device="cpu", **options)


def losses(subject: Subject, model: torch.nn.Module) -> np.ndarray:
    """Cross-entropy of each row, without padding: of tokens the mean over those of the answer."""
    found = {}
    with torch.no_grad():
        for group in alike(subject):
            examples = [subject.data.examples[i] for i in group]
            batch = {key: torch.stack([x[key] for x in examples]) for key in examples[0] if key != "task"}
            labels = batch.pop("labels")
            if subject.kind == "text-to-text":
                logits = model(**batch, labels=labels).logits
            else:
                logits = model(**batch).logits
                if subject.kind == "causal":
                    logits, labels = logits[:, :-1], labels[:, 1:]
            for i, z, label in zip(group, logits.log_softmax(-1), labels, strict=True):
                z, label = z.reshape(-1, z.shape[-1]), label.reshape(-1)
                kept = label != -100
                found[i] = float(-z[kept].gather(1, label[kept, None]).mean())
    return np.array([found[i] for i in subject.indices])


def alike(subject: Subject) -> list[list[int]]:
    """Rows by shape, so that none is padded."""
    groups: dict[Any, list[int]] = {}
    for i in subject.indices:
        shape = tuple((key, tuple(x.shape)) for key, x in subject.data.examples[i].items())
        groups.setdefault(shape, []).append(i)
    return list(groups.values())
