"""What a loss moves by though nothing was changed: the size below which no effect means anything."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import torch

from loraforge.measure.subjects.objectives import Objective
from loraforge.measure.subjects.subject import Subject


def noise_floor(
    subject: Subject, objective: Objective, losses: Mapping[int, float], seed: int = 0
) -> dict[str, float] | None:
    """How far the plain losses move when the same rows are batched in another order: rounding and padding alone.

    Args:
        subject: Model and rows.
        objective: Gives the losses.
        losses: Loss by row of the split, in the usual batches.
        seed: Of the other order.

    Returns:
        `mean`: of the mean loss; `largest`: of a row's. None where a loss is a comparison with the batch's own pass.
    """
    rows = list(subject.indices)
    random.Random(seed).shuffle(rows)
    away: list[float] = []
    with torch.no_grad():
        for at in range(0, len(rows), subject.batch_size):
            batch = subject.batch(subject.data, rows[at : at + subject.batch_size])
            if at == 0 and objective.reference(subject.model, batch) is not None:
                return None
            found = objective.losses(subject.model, batch, None).double().tolist()
            away += [loss - losses[row] for loss, row in zip(found, batch.indices, strict=True)]
    return {"mean": abs(math.fsum(away)) / len(away), "largest": max(map(abs, away))}
