"""Merged heads in a model: under the base's names, with what config.json has to say of them, or kept aside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loraforge.adapters import HeadsPlan
from loraforge.checkpoints import Checkpoint
from loraforge.errors import LoraforgeError
from loraforge.merging.models.placing import match_tensors
from loraforge.merging.models.skeleton import Skeleton

# Last parts of a head's name whose rows are labels.
_LABELS = re.compile(r"(^|\.)(classifier|score|classification_head\.out_proj|qa_outputs)\.weight$")


def head_names(heads: HeadsPlan, base: Checkpoint, skeleton: Skeleton | None) -> tuple[dict[str, Tensor], list[str]]:
    """Merged heads and whole weights by the base's names, and what there is to say of them.

    Raises:
        LoraforgeError: Trained token rows, which are no whole tensor; a name that fits several tensors.
    """
    found: dict[str, Tensor] = {}
    notes: list[str] = []
    names = match_tensors(heads.merged, base, skeleton)
    for key, tensor in heads.merged.items():
        if "trainable_tokens" in key or len(names[key]) > 1:
            raise LoraforgeError(
                "A whole weight of the adapters cannot be put into the base",
                where=key,
                got=", ".join(names[key]) or "rows of an embedding",
                hint="merge into an adapter (--output-kind adapter)",
            )
        name = names[key][0] if names[key] else key
        if name not in base:
            notes.append(f"{name}: a head that the base does not have was added")
        elif base.shape(name) != tuple(tensor.shape):
            notes.append(
                f"{name}: replaced, {list(base.shape(name))} in the base, {list(tensor.shape)} in the adapters"
            )
        found[name] = tensor
    return found, notes


def label_changes(heads: Mapping[str, Tensor], base: Checkpoint) -> dict[str, Any]:
    """Changes of config.json that a head or embedding of another size asks for."""
    changes: dict[str, Any] = {}
    for name, tensor in heads.items():
        rows = int(tensor.shape[0]) if tensor.ndim else 0
        labels = base.config.get("id2label")
        if _LABELS.search(name) and rows != (len(labels) if isinstance(labels, dict) else 2):
            changes["id2label"] = {str(i): f"LABEL_{i}" for i in range(rows)}
            changes["label2id"] = {f"LABEL_{i}": i for i in range(rows)}
        elif name in base and tensor.ndim == 2 and base.shape(name)[0] == base.config.get("vocab_size") != rows:
            changes["vocab_size"] = rows
    return changes
