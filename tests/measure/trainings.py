"""Tiny trainings whose folders the tests of whole measurements read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraforge.training.single import train_full, train_lora
from tests.tasks.tiny import WORDS, tiny_base, write_rows

SEED = 7
ARGUMENTS = {"max_steps": 4, "per_device_train_batch_size": 6, "learning_rate": 2e-2, "save_strategy": "no"}
LORA = {"r": 2, "targets": ["query", "key", "value", "attention.output.dense"]}


def write_task(folder: Path, count: int = 10) -> dict[str, Any]:
    """Rows of a classification by their first word, in two splits."""
    words = ("good", "bad", "fine")
    rows = [{"text": f"{words[i % 3]} {WORDS[i % 20]} {WORDS[(7 * i) % 20]}", "label": words[i % 3]} for i in range(30)]
    train, test = write_rows(folder / "train.jsonl", rows), write_rows(folder / "test.jsonl", rows[:count])
    return {"id": "first-word", "train": str(train), "test": str(test)}


def train_both(folder: Path) -> dict[str, Path]:
    """Method -> run folder with `ckpt_final`, trained with the same seed; the adapter keeps snapshots."""
    tiny_base(folder / "base", "bert")
    task = write_task(folder)
    found = {"FFT": folder / "FFT", "LoRA": folder / "LoRA"}
    train_full(folder / "base", task, found["FFT"] / "ckpt_final", train=ARGUMENTS, seed=SEED)
    train_lora(folder / "base", task, found["LoRA"] / "ckpt_final", lora=LORA, train=ARGUMENTS, seed=SEED, snapshots=2)
    return found
