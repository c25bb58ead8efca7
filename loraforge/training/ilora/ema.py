"""The stable adapter's moving average: ema <- ema + a (default - ema), once an optimiser step.

Tensors of one device and type lie end to end in one storage that the parameters are views of, on both sides, so that an
update is one operation instead of one a tensor. The average itself is float32 even where the adapters are bfloat16, in
which 1 + 0.001 (1.01 - 1) is 1. The `ema` parameters are then its rounded copy, which the stable forward sees.

An average of the factors is one of their product only as long as both adapters share a gauge: `ema` starts as an exact
copy of `default`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraforge.training.ilora.config import ILoraConfig

# Tensors begin at multiples of 64 bytes for float32, as allocations of their own would.
_ALIGN = 16


@dataclass(frozen=True)
class Pair:
    """A tensor of the plastic adapter and its counterpart.

    Attributes:
        name: Name in the model, without that of the adapter.
        plastic: Parameter of `default`.
        stable: Parameter of `ema`, of the same shape.
    """

    name: str
    plastic: nn.Parameter
    stable: nn.Parameter


class EmaPairs:
    """The pairs of a model and the average over them.

    The parameters keep being the model's; only their memory moves. A model that was moved or cast since is laid out
    anew at the next update.

    Args:
        pairs: Of `loraforge.training.ilora.adapters.pair_adapters`.
        dtype: Precision of the average: float32 or float64; never less than the adapter's own.
    """

    def __init__(self, pairs: Sequence[Pair], dtype: torch.dtype = torch.float32) -> None:
        self.pairs = list(pairs)
        self.dtype = dtype
        self._groups: list[_Group] = []
        self.attach()

    @torch.no_grad()
    def attach(self) -> None:
        """Lays the tensors out; the average becomes what the `ema` parameters hold."""
        kinds: dict[tuple[torch.device, torch.dtype, torch.dtype], list[Pair]] = defaultdict(list)
        for pair in self.pairs:
            kinds[pair.plastic.device, pair.plastic.dtype, pair.stable.dtype].append(pair)
        self._groups = [_Group(pairs, self.dtype) for pairs in kinds.values()]

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """One step of the average.

        Args:
            weight: Of the new value, 0 to 1.
        """
        if not all(group.holds() for group in self._groups):
            self.attach()
        for group in self._groups:
            group.update(weight)

    @torch.no_grad()
    def drift(self) -> float:
        """Euclidean distance of the two adapters; waits for the device."""
        return sum(group.squared_drift() for group in self._groups) ** 0.5

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Within the block the `ema` parameters are the average itself, not its rounded copy: for saving and loading.

        What was written into them within the block becomes the average.
        """
        rounded = [(pair.stable, pair.stable.data) for pair in self.pairs]
        for group in self._groups:
            group.show_average()
        try:
            yield
        finally:
            for parameter, data in rounded:
                parameter.data = data
            for group in self._groups:
                group.round()


class _Group:
    """Pairs of one device and type."""

    def __init__(self, pairs: Sequence[Pair], dtype: torch.dtype) -> None:
        self.pairs = list(pairs)
        own = pairs[0].plastic.dtype
        self.plastic, self._plastic_views = _flat([pair.plastic for pair in pairs])
        _lay(pairs, self._plastic_views, stable=False)
        average, views = _flat([pair.stable for pair in pairs])
        wide = torch.promote_types(dtype, own)
        self.average = average if average.dtype == wide else average.to(wide)
        self.average_views = views if self.average is average else _views(self.average, pairs)
        # The forward of the stable adapter runs in the type of the plastic one.
        self.rounded = None if own == wide else self.average.to(own)
        self._stable_views = self.average_views if self.rounded is None else _views(self.rounded, pairs)
        _lay(pairs, self._stable_views, stable=True)

    def holds(self) -> bool:
        """Whether the parameters still are views of this memory: a model is moved or cast as a whole."""
        ends = (0, -1)
        return all(
            self.pairs[at].plastic.data_ptr() == self._plastic_views[at].data_ptr()
            and self.pairs[at].stable.data_ptr() == self._stable_views[at].data_ptr()
            for at in ends
        )

    def update(self, weight: float) -> None:
        if self.rounded is None and self.average.dtype == self.plastic.dtype:
            self.average.lerp_(self.plastic, weight)
        else:
            self.average.mul_(1.0 - weight).add_(self.plastic, alpha=weight)
        self.round()

    def round(self) -> None:
        if self.rounded is not None:
            self.rounded.copy_(self.average)

    def show_average(self) -> None:
        _lay(self.pairs, self.average_views, stable=True)

    def squared_drift(self) -> float:
        return float((self.plastic.to(self.average.dtype) - self.average).square_().sum(dtype=torch.float64))


def _flat(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One storage with a copy of the tensors, and the views of it."""
    sizes = [-(-tensor.numel() // _ALIGN) * _ALIGN for tensor in tensors]
    flat = torch.zeros(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
    views = _views(flat, tensors)
    for view, tensor in zip(views, tensors, strict=True):
        view.copy_(tensor)
    return flat, views


def _views(flat: Tensor, like: Sequence[Tensor] | Sequence[Pair]) -> list[Tensor]:
    views, at = [], 0
    for item in like:
        tensor = item.plastic if isinstance(item, Pair) else item
        views.append(flat[at : at + tensor.numel()].view(tensor.shape))
        at += -(-tensor.numel() // _ALIGN) * _ALIGN
    return views


def _lay(pairs: Sequence[Pair], views: Sequence[Tensor], *, stable: bool) -> None:
    for pair, view in zip(pairs, views, strict=True):
        (pair.stable if stable else pair.plastic).data = view


def update_ema(pairs: EmaPairs, weight: float) -> None:
    """One step of the average of all pairs: ema <- ema + weight (default - ema)."""
    pairs.update(weight)


def effective_weight(config: ILoraConfig, step: int) -> float:
    """Weight of the new value at an optimiser step.

    With warm-up the weight of the old value is at most 1 - 1 / (step + 1): the average starts as a running mean.

    Args:
        config: Convention, coefficient, warm-up.
        step: Optimiser steps done in this task, from 1.
    """
    weight = config.new_weight
    return max(weight, 1.0 / (step + 1)) if config.ema_warmup else weight
