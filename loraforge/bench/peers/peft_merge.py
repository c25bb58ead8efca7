"""PEFT's `add_weighted_adapter`: the merge that a user of PEFT calls."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from loraforge.types import LowRank


class _Layers(nn.Module):
    """Linear layers by name, as PEFT looks for them."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        super().__init__()
        for name, (m, n) in shapes.items():
            linear = nn.Linear(1, 1, bias=False)
            linear.weight = nn.Parameter(torch.zeros(m, n, device=device), requires_grad=False)
            linear.in_features, linear.out_features = n, m
            setattr(self, name, linear)


class PeftMerge:
    """Adapters in a PEFT model, and their merges.

    Args:
        adapters: One mapping an adapter, module -> factors with scaling 1 and one rank.
    """

    def __init__(self, adapters: Sequence[Mapping[str, LowRank]]) -> None:
        from peft import LoraConfig, get_peft_model

        first = next(iter(adapters[0].values()))
        config = LoraConfig(r=first.rank, lora_alpha=first.rank, target_modules=list(adapters[0]))
        layers: Any = _Layers({name: pair.shape for name, pair in adapters[0].items()}, first.B.device)
        self.names = [f"a{index}" for index in range(len(adapters))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each adapter that is added beside another
            self._model: Any = get_peft_model(layers, config, adapter_name=self.names[0])
            for name in self.names[1:]:
                self._model.add_adapter(name, config)
        self._modules = {name: getattr(self._model.base_model.model, name) for name in adapters[0]}
        with torch.no_grad():
            for index, adapter in enumerate(adapters):
                for name, pair in adapter.items():
                    self._modules[name].lora_A[self.names[index]].weight.copy_(pair.A)
                    self._modules[name].lora_B[self.names[index]].weight.copy_(pair.B)

    def merge(self, kind: str, weights: Sequence[float], **options: Any) -> dict[str, LowRank]:
        """`add_weighted_adapter` with `combination_type=kind`; the adapter is taken out again.

        Returns:
            module -> factors, scaling 1.
        """
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model.add_weighted_adapter(self.names, list(weights), "merged", combination_type=kind, **options)
            found = {
                name: LowRank(
                    module.lora_B["merged"].weight.detach() * module.scaling["merged"],
                    module.lora_A["merged"].weight.detach(),
                )
                for name, module in self._modules.items()
            }
            self._model.delete_adapter("merged")
        return found
