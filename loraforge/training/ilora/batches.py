"""Batches taken apart into the rows they were made of, and two batches as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loraforge.training.ilora.buffer import MASK

Batch = dict[str, Tensor]
_IGNORED = -100
# What a key is filled up with; pad tokens are not looked at, as the mask is 0 there.
_FILL = {"labels": _IGNORED}
WASTE = 0.25


def rows_of(batch: Mapping[str, Tensor], shifted: bool) -> list[dict[str, Tensor]]:
    """The rows of a batch on the CPU, without padding.

    Args:
        batch: What a collator made.
        shifted: Labels run along the inputs, as a causal model's do; otherwise they have padding of their own.
    """
    host = {key: value.detach().to("cpu") for key, value in batch.items()}
    mask = host.pop(MASK, None)
    along = [key for key, value in host.items() if mask is not None and value.shape == mask.shape]
    if not shifted and "labels" in along:  # of the inputs' length by chance
        along.remove("labels")
    rows = []
    for at in range(next(iter(host.values())).shape[0]):
        row = {key: value[at] for key, value in host.items()}
        if mask is not None:
            real = mask[at].bool()
            row |= {key: row[key][real] for key in along}
        if "labels" in row and row["labels"].dim() and "labels" not in along:
            targets = (row["labels"] != _IGNORED).nonzero()
            row["labels"] = row["labels"][int(targets[0]) : int(targets[-1]) + 1] if len(targets) else targets[:, 0]
        rows.append(row)
    return rows


def has_targets(row: Mapping[str, Any], shifted: bool) -> bool:
    """Whether a row has anything to learn; a causal model predicts no first token."""
    labels = row["labels"]
    return bool((labels[1:] if shifted and labels.dim() else labels).ne(_IGNORED).any())


def wasted(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Share of the tokens of both batches as one that only fill it up; 1 where their keys differ."""
    if first.keys() != second.keys():
        return 1.0
    apart = together = 0
    for key in ("input_ids", "labels"):
        if key in first and first[key].dim() == 2:
            (rows, length), (more, other) = first[key].shape, second[key].shape
            apart += rows * length + more * other
            together += (rows + more) * max(length, other)
    return 1.0 - apart / together if together else 0.0


def joined(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Batch:
    """Both batches as one, the rows of the first first, filled up on the right."""
    together = {}
    for key, value in first.items():
        other = second[key].to(value.device)
        if value.dim() == 2 and value.shape[1] != other.shape[1]:
            length = max(value.shape[1], other.shape[1])
            value, other = (
                torch.nn.functional.pad(t, (0, length - t.shape[1]), value=_FILL.get(key, 0)) for t in (value, other)
            )
        together[key] = torch.cat([value, other])
    return together
