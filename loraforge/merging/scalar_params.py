"""Parameters of the methods that only re-weight the deltas: slerp, karcher, model-stock. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from loraforge.errors import UsageError

SCOPES = ("module", "global")


def _scope() -> Any:
    return field(
        default="module",
        metadata={"help": "angles between the deltas of each module, or between whole adapters", "choices": SCOPES},
    )


@dataclass(frozen=True)
class ModelStockParams:
    """What `model-stock` can be told."""

    scope: str = _scope()

    def __post_init__(self) -> None:
        """Checks the scope.

        Raises:
            UsageError: An unknown word.
        """
        if self.scope not in SCOPES:
            raise UsageError(
                "parameter 'scope' has an unknown value", got=repr(self.scope), expected=" | ".join(SCOPES)
            )


@dataclass(frozen=True)
class SlerpParams(ModelStockParams):
    """What `slerp` can be told."""

    t: float = field(default=0.5, metadata={"help": "share of the way from the first adapter to the second, 0 to 1"})

    def __post_init__(self) -> None:
        """Checks both fields.

        Raises:
            UsageError: Names the field.
        """
        super().__post_init__()
        _check("t", self.t, 0.0, 1.0)


@dataclass(frozen=True)
class KarcherParams(ModelStockParams):
    """What `karcher` can be told."""

    max_iter: int = field(default=100, metadata={"help": "largest number of steps of the fixed point"})
    tol: float = field(default=1e-12, metadata={"help": "length of a step (radians) that ends the iteration"})

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UsageError: Names the field.
        """
        super().__post_init__()
        if isinstance(self.max_iter, bool) or not isinstance(self.max_iter, int) or self.max_iter < 0:
            raise UsageError("parameter 'max_iter' is out of range", got=repr(self.max_iter), expected="0 or more")
        _check("tol", self.tol, 0.0, math.pi)


def _check(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UsageError(
            f"parameter '{name}' is out of range", got=repr(value), expected=f"a number from {low:g} to {high:.4g}"
        )
