"""Parameters of the methods that work on the rank-one units of adapters: robust-merge, lora-lego. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from loraforge.errors import UsageError


def _param(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class RobustMergeParams:
    """What `robust-merge` can be told."""

    density: float = _param(0.8, "share of the entries of each factor that is kept, the largest ones")
    scale: float = _param(2.0, "factor on the merged update (the paper's lambda)")

    def __post_init__(self) -> None:
        """Checks both fields.

        Raises:
            UsageError: Names the field.
        """
        for name, high in (("density", 1.0), ("scale", math.inf)):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or not 0.0 < value <= high:
                expected = "0 < density <= 1" if name == "density" else "a number above 0"
                raise UsageError(f"parameter '{name}' is out of range", got=repr(value), expected=expected)


@dataclass(frozen=True)
class LoraLegoParams:
    """What `lora-lego` can be told."""

    clusters: int | None = _param(None, "rank of the result; the largest rank of the module where not given")
    iterations: int = _param(10, "steps of k-means")
    reweight_units: bool = _param(True, "give a mean unit the mean largest entry of its members")
    reweight_output: bool = _param(True, "factor sqrt(r / k) on the result")
    seed: int = _param(0, "seed of the first centres; draws are keyed by seed and module")

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UsageError: Names the field.
        """
        for name, least in (("clusters", 1), ("iterations", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name == "clusters":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(
                    f"parameter '{name}' is out of range", got=repr(value), expected=f"a whole number >= {least}"
                )
        for name in ("reweight_units", "reweight_output"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"parameter '{name}' must be true or false", got=repr(getattr(self, name)))
