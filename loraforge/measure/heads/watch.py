"""Hooks that isolate every attention of a model: noise for its projections, nothing of it into the residual stream."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loraforge.measure.heads.layout import HeadLayout, Projection

# Latent attention has rows a head in these, beside projections to the latent space.
_LATENT_QUERY, _LATENT_KEYS = "q_b_proj", "kv_b_proj"


class Watch:
    """Watches the inputs of the output projections of a model while rows of other projections are negated.

    Args:
        modules: The model's, by name.
        layout: To watch.
        seed: Of the noise.

    Attributes:
        inputs: Attention -> its output projection's input in the last pass.
        calls: Attention -> how often its output projection ran in the last pass.
    """

    def __init__(self, modules: Mapping[str, nn.Module], layout: HeadLayout, seed: int) -> None:
        self.layout, self.seed = layout, seed
        self.inputs: dict[int, Tensor] = {}
        self.calls: dict[int, int] = {}
        self._modules = modules
        self._parts: dict[tuple[int, str], Projection] = {}
        self._noisy: dict[str, list[tuple[int, str]]] = {}
        for index, attention in enumerate(layout.attentions):
            parts = {part: attention.part(part) for part in ("q", "k", "v")}
            container = attention.o.module.rpartition(".")[0]
            query = modules.get(f"{container}.{_LATENT_QUERY}")
            if parts["q"] is None and query is not None:
                rows = int(getattr(query, "out_features", 0)) // attention.n_q
                parts["q"] = Projection(f"{container}.{_LATENT_QUERY}", attention.n_q, rows)
            for part, projection in parts.items():
                if projection is not None and projection.module in modules:
                    self._parts[index, part] = projection
                    self._noisy.setdefault(projection.module, []).append((index, part))
            if (keys := f"{container}.{_LATENT_KEYS}") in modules:
                self._noisy.setdefault(keys, [])

    def part(self, index: int, name: str) -> Projection | None:
        """The projection of a part of an attention that has rows a head."""
        return self._parts.get((index, name))

    def within(self, model: nn.Module) -> bool:
        """Whether all output projections are in a part of the model."""
        there = set(model.modules())
        return all(self._modules[a.o.module] in there for a in self.layout.attentions)

    @contextmanager
    def session(self, negated: Mapping[tuple[int, str], slice]) -> Iterator[None]:
        """The hooks for one pass; (attention, part) -> rows of its projection that are negated."""
        self.inputs, self.calls = {}, {}
        handles = []
        try:
            for name, users in self._noisy.items():
                rows = [negated[user] for user in users if user in negated]
                handles.append(self._modules[name].register_forward_hook(self._noise(name, rows)))
            for index, attention in enumerate(self.layout.attentions):
                module = self._modules[attention.o.module]
                handles.append(module.register_forward_pre_hook(self._keep(index)))
                handles.append(module.register_forward_hook(_nothing))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _noise(self, name: str, rows: list[slice]) -> Any:
        def replace(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{name}:{tuple(output.shape)}".encode()))
            noise = torch.randn(output.shape, generator=generator)
            for span in rows:
                noise[..., span] *= -1
            return noise.to(output)

        return replace

    def _keep(self, index: int) -> Any:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.calls[index] = self.calls.get(index, 0) + 1
            self.inputs[index] = inputs[0].detach()

        return keep


def _nothing(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)
