"""A tiny torch model with every kind of layer that PEFT adapts, and its adapters with random factors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn


class Experts(nn.Module):
    """Two stacks of weights (experts, out, in), registered in this order."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(3, 10, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("eoi,bi->ebo", self.gate_up, x).chunk(2, -1)
        return torch.einsum("eoi,ebi->bo", self.down, torch.tanh(gate) * up)


class Tiny(nn.Module):
    """Never run as a whole: the layers only carry weights and names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 8)
        self.conv1 = nn.Conv1d(9, 24, 3)
        self.conv2 = nn.Conv2d(16, 32, (3, 2))
        self.point = nn.Conv2d(8, 6, 1)
        self.conv3 = nn.Conv3d(2, 4, (1, 2, 2))
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": Experts()}) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["experts"](x)
        return x


def adapted(path: Path, config: Any, seed: int = 1) -> nn.Module:
    """Saves an adapter of random factors through PEFT and gives the model."""
    model = get_peft_model(copy.deepcopy(Tiny()), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "hada_", "lokr_")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    model.save_pretrained(path)
    return model


def deltas(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Module name and the update that PEFT computes, in the shape of the weight."""
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight") and not hasattr(module, "parameter_name"):
            yield name, module.get_delta_weight("default").detach()
