"""What changed: the update of every module of a layout; here between two full models, streamed tensor by tensor.

Both weights are widened to float64 before they are subtracted: a difference of merged or half-precision weights holds
their rounding, which `warnings` then says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from loraforge.checkpoints import Checkpoint, align
from loraforge.errors import LoraforgeError, raise_problems
from loraforge.measure.heads.layout import HeadLayout, Projection
from loraforge.measure.updates.norms import BaseWeights, read_checked
from loraforge.measure.updates.slices import Change, tensor_norm

# Relative rounding of a weight as stored: half a unit in the last place.
_HALF = {torch.bfloat16: "bfloat16 (2^-9)", torch.float16: "float16 (2^-12)"}


class Changes(Protocol):
    """Where updates come from.

    Attributes:
        source: "factors" or "dense".
        warnings: What limits the numbers, in sentences.
        weights: The base's weights, None where no base is known.
    """

    source: str
    warnings: list[str]
    weights: BaseWeights | None

    def change(self, projection: Projection) -> Change | None:
        """The update of a projection's module (out, in), None where it has none."""

    def bias(self, projection: Projection) -> Tensor | None:
        """The update of its bias (out,), None where it has none."""

    def others(self, *, every: bool) -> Iterator[dict[str, Any]]:
        """Updates outside the layout's projections as {name, U, Urel, r, what}; `every`: those that cost reading."""


class DenseChanges:
    """The difference of two full models, tensor by tensor; see `Changes`.

    Args:
        base: The start.
        final: The fine-tuned model: the same names and shapes, up to a prefix and the head.
        layout: Where the heads are.

    Raises:
        LoraforgeError: They are not of one architecture and size.
    """

    source = "dense"

    def __init__(self, base: Checkpoint, final: Checkpoint, layout: HeadLayout) -> None:
        self.base, self.final = base, final
        self.weights: BaseWeights | None = BaseWeights(base, layout)
        self._base = self.weights
        self.alignment = align(base, final)
        lacking = [n for n in self._base.names.values() if f"{n}.weight" not in self.alignment.names]
        problems = [
            LoraforgeError("a projection is not in the fine-tuned model in the same shape", where=final.path, got=name)
            for name in lacking[:5]
        ]
        raise_problems(problems)
        stored = {model.dtype(name) for model in (base, final) for name in model.names}
        self.warnings = [
            f"weights are stored in {text} of a weight: smaller changes are lost in, or made up by, that rounding"
            for dtype, text in _HALF.items()
            if dtype in stored
        ]

    def change(self, projection: Projection) -> Change | None:
        """The difference of a projection's weights, float64."""
        name = f"{self._base.names[projection.module]}.weight"
        new = read_checked(self.final, self.alignment.names[name]).to(torch.float64)
        old = read_checked(self.base, name).to(torch.float64)
        return (new - old).mT if projection.transposed else new - old

    def bias(self, projection: Projection) -> Tensor | None:
        """The difference of its biases."""
        name = f"{self._base.names[projection.module]}.bias"
        if name not in self.alignment.names:
            return None
        return read_checked(self.final, self.alignment.names[name]).to(torch.float64) - read_checked(self.base, name)

    def others(self, *, every: bool) -> Iterator[dict[str, Any]]:
        """Tensors that one side alone has, and with `every` all others that hold no head."""
        held = {f"{name}.weight" for name in self._base.names.values()}
        for name in self.base.names if every else ():
            if name in self.alignment.names and name not in held and self.base.is_float(name):
                new = read_checked(self.final, self.alignment.names[name])
                yield whole_row(name, new, self.base.read(name), "bias" if name.endswith(".bias") else "weight")
        for name in self.alignment.own:
            yield whole_row(name, self.final.read(name), None, "head")
        for name in self.alignment.missing:
            yield {"name": name, "U": None, "Urel": None, "r": None, "what": "only in the base"}


def whole_row(name: str, new: Tensor, old: Tensor | None, what: str) -> dict[str, Any]:
    """The row of a tensor that is there as a whole; without an equal one in the base U is unknown."""
    size = tensor_norm(new)
    row: dict[str, Any] = {"name": name, "U": None, "Urel": None, "r": None, "what": what, "norm": size}
    if old is not None and old.shape == new.shape:
        row["U"], before = tensor_norm(new, old), tensor_norm(old)
        row["Urel"] = row["U"] / before if before else None
    return row
