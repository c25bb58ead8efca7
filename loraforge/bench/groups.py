"""The groups of measurements: a plain table, torch-free."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from loraforge.errors import UsageError, did_you_mean

SIZES = ("default", "full", "tiny")
# Name -> (module with `measure(session)`, what it measures).
GROUPS = {
    "kernels": ("loraforge.bench.operators", "every operator: PyTorch reference, best library calls, compiled"),
    "merge": ("loraforge.bench.merge", "merge methods beside PEFT, dense PyTorch and the document's rSVD"),
    "iteris": ("loraforge.bench.iteris", "sweep and iteration beside the document's loop: time, memory, objective"),
    "train": ("loraforge.bench.training", "I-LORA: moving average, adapter switch, replay buffer, step beside replay"),
    "heads": ("loraforge.bench.heads", "exact ablation from saved layers, gradients, updates from factors"),
    "scale": ("loraforge.bench.scale", "time and memory against adapters, rank, width, depth and tokens"),
}


def check_groups(names: Sequence[str]) -> list[str]:
    """The groups asked for, in the table's order; all of them for none.

    Raises:
        UsageError: There is no group of that name.
    """
    for name in names:
        if name not in GROUPS:
            raise UsageError("unknown group", got=repr(name), hint=did_you_mean(name, GROUPS))
    return [name for name in GROUPS if not names or name in names]


def measurer(name: str) -> Callable[[Any], None]:
    """The function that measures a group into a session."""
    measure: Callable[[Any], None] = importlib.import_module(GROUPS[name][0]).measure
    return measure
