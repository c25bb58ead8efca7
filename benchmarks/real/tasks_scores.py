"""Normalised averages, paired intervals over test rows, and intervals over seeds."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from tasks_data import keyed_random

DRAWS = 4000
Correct = Mapping[str, str]  # task -> "0110..." a character a test row
# Quantile .975 of Student's t by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@functools.cache
def as_array(rows: str) -> np.ndarray:
    """(rows,) 0 or 1."""
    return (np.frombuffer(rows.encode(), dtype=np.uint8) == ord("1")).astype(np.float32)


def accuracies(correct: Correct) -> dict[str, float]:
    """Share of correct rows a task."""
    return {task: rows.count("1") / len(rows) for task, rows in correct.items()}


def normalised(merges: Sequence[Correct], owns: Sequence[Correct]) -> float:
    """Mean over seeds and tasks of accuracy / own adapter's accuracy; one entry a seed in both lists."""
    ratios = [
        as_array(m[t]).mean() / as_array(o[t]).mean() for m, o in zip(merges, owns, strict=True) for t in sorted(m)
    ]
    return float(np.mean(ratios))


@functools.cache
def row_counts(task: str, rows: int) -> np.ndarray:
    """(DRAWS, rows) how often a row enters a draw; the same for all merges, so differences are paired."""
    generator = np.random.default_rng(keyed_random("bootstrap", task).getrandbits(63))
    return generator.multinomial(rows, np.full(rows, 1 / rows), size=DRAWS).astype(np.float32)


def bootstrap(merges: Sequence[Correct], owns: Sequence[Correct]) -> np.ndarray:
    """(DRAWS,) normalised averages over resampled test rows.

    Rows are drawn within each task (stratified). All seeds share the test rows, hence the draws: the spread says what
    other test rows would have given, with these adapters. Own accuracies are redrawn too.
    """
    total = np.zeros(DRAWS)
    tasks = sorted(merges[0])
    for task in tasks:
        hits = np.stack([as_array(m[task]) for m in merges], axis=1)
        own = np.stack([as_array(o[task]) for o in owns], axis=1)
        counts = row_counts(task, len(hits))
        total += ((counts @ hits) / (counts @ own)).mean(axis=1) / len(tasks)
    return total


def paired_interval(
    merges: Sequence[Correct], others: Sequence[Correct], owns: Sequence[Correct]
) -> tuple[float, float]:
    """95 % bootstrap interval of normalised(merges) - normalised(others) on the same test rows."""
    difference = bootstrap(merges, owns) - bootstrap(others, owns)
    low, high = np.quantile(difference, [0.025, 0.975])
    return float(low), float(high)


def over_seeds(values: Sequence[float]) -> dict[str, float | list[float] | None]:
    """Mean over seeds with Student's 95 % interval; no interval for one seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None, "values": list(values)}
    half = _T[len(values) - 1] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": list(values)}
