"""Exact ablation: the loss with a head's gate closed less the loss with all gates open, sample by sample.

I(h) = mean_i [ l_i(gate of h = 0) - l_i(all gates = 1) ]; above 0 the head helps. Differences are taken per sample, in
float64, before they are averaged: the effects are 1e-4 where the loss is 0.7. (Michel et al. 2019, arXiv 1905.10650,
section 3, with a paired standard error.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from loraforge.evaluation.batches import Progress
from loraforge.measure.importance.choice import Unit, by_block
from loraforge.measure.importance.passes import Passes
from loraforge.measure.importance.prefix import Saved
from loraforge.measure.subjects.objectives import check_losses


class Fills(Protocol):
    """What takes the place of a head's output."""

    def prepare(self, passes: Passes, block: str, attentions: Sequence[int]) -> None:
        """Looks at the attentions of a layer before their heads are gated."""

    def fill(self, number: int, attention: int) -> Tensor | None:
        """For batch `number`: broadcastable to (B, T, n_q * v); None for zero."""


def exact_differences(
    passes: Passes, units: Sequence[Unit], fills: Fills, progress: Progress | None = None
) -> Iterator[tuple[Unit, Tensor]]:
    """Each unit with its (N,) float64 differences of the losses, layer by layer in the order of a pass."""
    total, done = count_passes(passes, units), 0
    for block, group in by_block(passes.layout, units, passes.prefix.order):
        passes.verify(block)
        fills.prepare(passes, block, sorted({unit.attention for unit in group}))
        found: dict[Unit, list[Tensor]] = {unit: [] for unit in group}
        for number in range(len(passes.batches)):
            start = passes.start(number, block)
            for attention, chunk in chunks(group, passes.times(number, block)):
                losses = _ablated(passes, number, start, attention, chunk, fills)
                for unit, ablated in zip(chunk, losses, strict=True):
                    check_losses(ablated, passes.batches[number], number, unit.key)
                    found[unit].append(ablated - passes.base[number])
                done += 1
                if progress is not None:
                    progress("importance", f"layer {group[0].key.layer}", min(done, total), total)
        for unit in group:
            yield unit, torch.cat(found[unit])


def _ablated(
    passes: Passes, number: int, start: tuple[Saved, Tensor | None], attention: int, chunk: Sequence[Unit], fills: Fills
) -> Tensor:
    """(units, B) float64 on the CPU."""
    rows = start[0].rows
    gate = torch.ones(len(chunk), rows, passes.layout.attentions[attention].n_q, device=passes.device)
    for at, unit in enumerate(chunk):
        gate[at, :, list(unit.heads)] = 0.0
    with torch.no_grad():
        losses = passes.losses(number, start, attention, gate.flatten(0, 1), fills.fill(number, attention))
    return losses.double().cpu().reshape(len(chunk), rows)


def chunks(units: Sequence[Unit], size: int) -> Iterator[tuple[int, list[Unit]]]:
    """Units of one attention, at most `size` together, with its index."""
    for attention, group in groupby(units, key=lambda unit: unit.attention):
        found = list(group)
        for at in range(0, len(found), size):
            yield attention, found[at : at + size]


def count_passes(passes: Passes, units: Sequence[Unit]) -> int:
    """Passes with closed gates that the units take."""
    return sum(
        len(list(chunks(group, passes.times(number, block))))
        for block, group in by_block(passes.layout, units, passes.prefix.order)
        for number in range(len(passes.batches))
    )


def estimated_seconds(passes: Passes, units: Sequence[Unit]) -> float:
    """What they should take, by the time of the plain passes and the share of the layers that each runs."""
    layers = max(1, len(passes.prefix.order))
    shares = [1.0 - passes.below(passes.layout.attentions[unit.attention].block) / layers for unit in units]
    return passes.base_seconds * sum(shares)
