"""Unpadded examples into a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError

IGNORED = -100


class Collator:
    """Pads examples of any length, of one task or several, to one batch.

    Args:
        kind: Of the task; labels of `text-to-text` are padded on the right whatever the side of the inputs.
        pad_token_id: What fills `input_ids`.
        padding_side: `right`, or `left` as generation needs it.
        pad_to_multiple_of: Lengths are rounded up to a multiple of this.
    """

    def __init__(
        self, kind: str, pad_token_id: int | None, padding_side: str = "right", pad_to_multiple_of: int | None = None
    ) -> None:
        if padding_side not in ("right", "left"):
            raise LoraforgeError("unknown padding side", got=repr(padding_side), expected="right or left")
        self.kind = kind
        self.pad_token_id = pad_token_id or 0
        self.left = padding_side == "left"
        self.multiple = pad_to_multiple_of or 1

    def __call__(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One tensor a key: sequences padded to (B, L), ids by the padding token, labels by -100; others stacked."""
        return {key: self._join(key, [example[key] for example in examples]) for key in examples[0]}

    def _join(self, key: str, tensors: list[Tensor]) -> Tensor:
        if tensors[0].ndim != 1:
            return torch.stack(tensors)
        fill: dict[str, Any] = {"input_ids": self.pad_token_id, "labels": IGNORED}
        left = self.left and not (key == "labels" and self.kind == "text-to-text")
        longest = max(tensor.shape[0] for tensor in tensors)
        length = -(-longest // self.multiple) * self.multiple
        batch = tensors[0].new_full((len(tensors), length), fill.get(key, 0))
        for row, tensor in zip(batch, tensors, strict=True):
            start = length - tensor.shape[0] if left else 0
            row[start : start + tensor.shape[0]] = tensor
        return batch
