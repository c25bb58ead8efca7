"""One merge while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loraforge.adapters import Adapter
from loraforge.linalg.rank import RankRule
from loraforge.merging.row import MethodRow
from loraforge.types import LayerInputs, LowRank

Progress = Callable[[str, str, int, int], None]


class Told:
    """Remembers what progress was told last, and passes it on.

    Attributes:
        detail: The module that is worked on; None before the first.
    """

    def __init__(self, listener: Progress | None) -> None:
        """Passes on to `listener`, if there is one."""
        self.detail: str | None = None
        self._listener = listener

    def __call__(self, stage: str, detail: str, done: int, total: int) -> None:
        """Progress, as everywhere."""
        self.detail = detail
        if self._listener is not None:
            self._listener(stage, detail, done, total)


class Loader:
    """Reads modules of adapters as their files have them."""

    def __call__(self, adapter: Adapter, module: str) -> Any:
        """The update of one module of one adapter."""
        return adapter.load(module)

    def lost(self, adapter: Adapter, module: str) -> float:
        """Frobenius norm of what was cut from a module while it was read."""
        return 0.0

    def summary(self) -> str | None:
        """What was cut, in a sentence, or None."""
        return None


@dataclass(slots=True, eq=False)
class Job:
    """One merge while it runs: what was asked, what was opened, what was found.

    Attributes:
        row: The method.
        params: Its parameters.
        adapters: Opened adapters, in the user's order.
        names: Their names, made unique.
        keys: One word an adapter that does not depend on their order, for random draws.
        modules: All module names, in natural order.
        weights: w_i (c_i of the calibrated methods).
        rule: The user's rank rule.
        device: Where to compute.
        on_missing: "zero" or "present".
        uniform_rank: All modules are padded to one rank at the end.
        progress: Called with (stage, detail, done, total), or None.
        post: Parameters of the flattening after the rank rule, or None.
        budget: Parameters that all modules share, or None.
        stats: Input statistics by module, one mapping an adapter; empty without `--stats`.
        loader: Reads a module of an adapter.
        phases: Seconds by phase.
        warnings: Sentences for the report.
    """

    row: MethodRow
    params: Any
    adapters: Sequence[Adapter]
    names: Sequence[str]
    keys: Sequence[str]
    modules: Sequence[str]
    weights: Sequence[float]
    rule: RankRule
    device: torch.device
    on_missing: str
    uniform_rank: bool
    progress: Progress | None
    post: Any = None
    budget: int | None = None
    stats: Sequence[Mapping[str, Tensor]] = ()
    loader: Loader = field(default_factory=Loader)
    phases: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a phase."""
        started = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - started

    def tell(self, stage: str, detail: str, done: int, total: int) -> None:
        """Reports progress to whoever listens."""
        if self.progress is not None:
            self.progress(stage, detail, done, total)

    def clamped(self, module: str, rank: int) -> list[str]:
        """A note where a module could not have the rank that was asked for."""
        asked = getattr(self.params, "rank", None) if self.row.own_rule else self.rule.rank
        return [f"{module}: rank {asked} clamped to {rank}"] if asked is not None and rank < asked else []

    def load(self, module: str) -> list[LowRank | None]:
        """The factors of one module, one entry an adapter, on the device."""
        return [
            self.loader(a, module).to(device=self.device) if module in a.modules_set else None for a in self.adapters
        ]

    def lost(self, module: str) -> float:
        """Bound on the Frobenius norm of what reading cut from the weighted sum of a module."""
        pairs = [(w, a) for w, a in zip(self.weights, self.adapters, strict=True) if module in a.modules_set]
        return sum(abs(w * self.share(module)) * self.loader.lost(a, module) for w, a in pairs)

    def share(self, module: str) -> float:
        """What the weights of a module are multiplied by: with `present`, averages run over those that have it."""
        if self.on_missing != "present" or self.row.default_weight != "mean":
            return 1.0
        present = sum(w for w, a in zip(self.weights, self.adapters, strict=True) if module in a.modules_set)
        return sum(self.weights) / present if present else 1.0

    def layer(self, module: str, context: Any = None) -> LayerInputs:
        """The inputs of one module with its weights resolved."""
        share = self.share(module)
        return LayerInputs(
            module,
            self.load(module),
            [w * share for w in self.weights],
            tuple(self.keys),
            [found.get(module) for found in self.stats] or [None] * len(self.adapters),
            context,
            self.on_missing == "present",
        )

    def bias(self, module: str) -> Tensor | None:
        """sum_i w_i s_i b_i of the adapters with a bias on lora_B (float32), or None where none has one."""
        total: Tensor | None = None
        for weight, adapter in zip(self.weights, self.adapters, strict=True):
            found = adapter.bias(module) if module in adapter.modules_set else None
            if found is not None:
                scaled = found.to(torch.float32) * (weight * self.share(module) * adapter.info(module).scaling)
                total = scaled if total is None else total + scaled
        return total
