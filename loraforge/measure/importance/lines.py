"""The line of a head: a mean over samples with its paired standard error and interval."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from loraforge.measure.files import json_number
from loraforge.measure.importance.choice import Unit
from loraforge.measure.importance.estimates import Z95
from loraforge.measure.importance.settings import ImportanceSettings


def importance_line(unit: Unit, values: Tensor, base: Tensor, method: str, asked: ImportanceSettings) -> dict[str, Any]:
    """The line of a unit, ready for JSON.

    Args:
        unit: What was gated.
        values: (N,) float64, sample by sample: differences of losses, or what estimates them.
        base: (N,) float64: the losses with all gates open.
        method: How the values were found; a mean of absolute values (michel) has no sign to be sure of.
        asked: Objective, ablation and unit.
    """
    n = len(values)
    mean = float(values.mean())
    se = float(values.std(correction=1)) / math.sqrt(n) if n > 1 else math.nan
    low, high = mean - Z95 * se, mean + Z95 * se
    line = {
        "layer": unit.key.layer, "head": unit.key.head, "I": mean, "loss_base": float(base.mean()),
        "loss_ablate": float((base + values).mean()) if method == "exact" else None, "n": n, "se": se, "ci_lo": low,
        "ci_hi": high, "significant": None if method == "michel" or n < 2 else low > 0.0 or high < 0.0,
        "stack": unit.key.stack, "kind": unit.key.kind, "method": method, "objective": asked.objective,
        "ablate": asked.ablate, "unit": asked.unit,
    }  # fmt: skip
    ready: dict[str, Any] = json_number(line)
    return ready
