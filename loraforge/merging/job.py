"""One merge while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from loraforge.adapters import Adapter
from loraforge.linalg.rank import RankRule
from loraforge.merging.methods import MethodRow
from loraforge.types import LayerInputs, LowRank

Progress = Callable[[str, str, int, int], None]


@dataclass(slots=True, eq=False)
class Job:
    """One merge while it runs: what was asked, what was opened, what was found.

    Attributes:
        row: The method.
        params: Its parameters.
        adapters: Opened adapters, in the user's order.
        names: Their names, made unique.
        modules: All module names, in natural order.
        weights: w_i (c_i of the calibrated methods).
        rule: The user's rank rule.
        device: Where to compute.
        on_missing: "zero" or "present".
        uniform_rank: All modules are padded to one rank at the end.
        progress: Called with (stage, detail, done, total), or None.
        phases: Seconds by phase.
        warnings: Sentences for the report.
    """

    row: MethodRow
    params: Any
    adapters: Sequence[Adapter]
    names: Sequence[str]
    modules: Sequence[str]
    weights: Sequence[float]
    rule: RankRule
    device: torch.device
    on_missing: str
    uniform_rank: bool
    progress: Progress | None
    phases: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a phase."""
        started = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - started

    def tell_clamped(self, module: str, rank: int) -> None:
        """A warning where a module could not have the rank that was asked for."""
        if self.rule.rank is not None and rank < self.rule.rank:
            self.warnings.append(f"{module}: rank {self.rule.rank} clamped to {rank}")

    def load(self, module: str) -> list[LowRank | None]:
        """The factors of one module, one entry an adapter, on the device."""
        return [a.load(module).to(device=self.device) if module in a.modules_set else None for a in self.adapters]

    def layer(self, module: str) -> LayerInputs:
        """The inputs of one module with its weights resolved."""
        factors = self.load(module)
        share = 1.0
        if self.on_missing == "present" and self.row.default_weight == "mean":
            present = sum(w for w, f in zip(self.weights, factors, strict=True) if f is not None)
            share = sum(self.weights) / present if present else 1.0
        return LayerInputs(module, factors, [w * share for w in self.weights])
