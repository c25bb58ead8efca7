"""The rows of a measurement in batches, the same in every pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ORDERS = ("length", "given")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of one forward pass.

    Attributes:
        indices: Row numbers in the split, one a row.
        inputs: Padded tensors by name, (B, ...), with `labels`, where the model is.
    """

    indices: tuple[int, ...]
    inputs: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.indices)

    def repeat(self, n: int) -> Batch:
        """The batch n times along dimension 0: row b of copy i is row i * B + b."""
        inputs = {name: torch.cat([tensor] * n) for name, tensor in self.inputs.items()}
        return Batch(self.indices * n, inputs)


def deal_rows(examples: Sequence[Mapping[str, Tensor]], rows: Sequence[int], size: int, order: str) -> list[list[int]]:
    """Rows by batch.

    Args:
        examples: Of the split.
        rows: Those wanted, in the subset's order.
        size: Rows a batch.
        order: `given`, or `length`: longest first, so that little is padded and memory is known at once.
    """
    if order == "length":
        lengths = {row: _length(examples[row]) for row in rows}
        rows = sorted(rows, key=lambda row: ([-n for n in lengths[row]], row))
    return [list(rows[at : at + size]) for at in range(0, len(rows), size)]


def _length(example: Mapping[str, Tensor]) -> tuple[int, int]:
    """Tokens of a row's input and of its labels."""
    sizes = [example[name].numel() if name in example else 0 for name in ("input_ids", "labels")]
    return sizes[0], sizes[1]
