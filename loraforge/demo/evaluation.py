"""Accuracy of the base and of saved adapters: what a user gets who loads the folder with PEFT."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import ViTForImageClassification

from loraforge.demo.digits import Split
from loraforge.demo.training import known_warnings


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Share of rightly classified images, in percent."""
    model.eval()
    right = 0
    for images, labels in zip(split.images.split(256), split.labels.split(256), strict=True):
        right += int((model(pixel_values=images).logits.argmax(-1) == labels).sum())
    return 100.0 * right / len(split)


def adapter_accuracies(base: ViTForImageClassification, folder: Path, splits: Mapping[str, Split]) -> dict[str, float]:
    """Accuracy by task of a saved adapter, loaded by PEFT on a copy of the base."""
    from peft import PeftModel

    # A copy: PEFT puts its layers into the model that it is given.
    with known_warnings():
        model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    return {name: accuracy(model, split) for name, split in splits.items()}


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in an adapter folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
