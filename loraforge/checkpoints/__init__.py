"""Full models as named tensors that are read and written one at a time."""

from __future__ import annotations

from loraforge.checkpoints.alignment import Alignment, align
from loraforge.checkpoints.card import full_model_card
from loraforge.checkpoints.checkpoint import Checkpoint
from loraforge.checkpoints.opening import looks_like_checkpoint, open_checkpoint
from loraforge.checkpoints.writer import SHARD_BYTES, ModelReport, ModelWriter, copy_config, dtype_change

__all__ = [
    "SHARD_BYTES",
    "Alignment",
    "Checkpoint",
    "ModelReport",
    "ModelWriter",
    "align",
    "copy_config",
    "dtype_change",
    "full_model_card",
    "looks_like_checkpoint",
    "open_checkpoint",
]
