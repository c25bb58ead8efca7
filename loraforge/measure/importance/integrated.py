"""Integrated gradients of single gates: equal to exact ablation, as a check on both.

I(h) = - mean_i int_0^1 dl_i/dg_h(t) dt, where only the gate of head h moves from 0 to 1, which is
mean_i [ l_i(g_h = 0) - l_i(g_h = 1) ] by the fundamental theorem. (Sundararajan et al. 2017, arXiv 1703.01365, for one
coordinate.) The integral is taken at Gauss-Legendre points; with 20 of them a smooth loss leaves rounding alone. It
costs as many forward and backward passes a head as there are points.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from loraforge.evaluation.batches import Progress
from loraforge.measure.importance.choice import Unit, by_block
from loraforge.measure.importance.exact import Fills
from loraforge.measure.importance.passes import Passes
from loraforge.measure.importance.prefix import Saved
from loraforge.measure.subjects.objectives import check_losses

POINTS = 20


def integrated_differences(
    passes: Passes, units: Sequence[Unit], fills: Fills, progress: Progress | None = None, points: int = POINTS
) -> Iterator[tuple[Unit, Tensor]]:
    """Each unit with its (N,) float64 integrals, sample by sample, layer by layer in the order of a pass."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    at, weight = (torch.from_numpy(values / 2.0 + shift) for values, shift in ((nodes, 0.5), (weights, 0.0)))
    done, total = 0, len(units) * len(passes.batches)
    for block, group in by_block(passes.layout, units, passes.prefix.order):
        passes.verify(block)
        fills.prepare(passes, block, sorted({unit.attention for unit in group}))
        found: dict[Unit, list[Tensor]] = {unit: [] for unit in group}
        for number in range(len(passes.batches)):
            start = passes.start(number, block)
            for unit in group:
                fill = fills.fill(number, unit.attention)
                total_of_unit = torch.zeros(len(passes.batches[number]), dtype=torch.float64)
                for some in torch.arange(points).split(passes.times(number, block)):
                    slopes = _slopes(passes, number, start, unit, at[some], fill)
                    check_losses(slopes.sum(0), passes.batches[number], number, unit.key)
                    total_of_unit -= (weight[some, None] * slopes).sum(0)
                found[unit].append(total_of_unit)
                done += 1
                if progress is not None:
                    progress("importance", f"layer {unit.key.layer}", done, total)
        for unit in group:
            yield unit, torch.cat(found[unit])


def _slopes(
    passes: Passes, number: int, start: tuple[Saved, Tensor | None], unit: Unit, at: Tensor, fill: Tensor | None
) -> Tensor:
    """(points, B) float64: slope of each sample's loss in the unit's gate, at some values of it."""
    rows, count = len(passes.batches[number]), passes.layout.attentions[unit.attention].n_q
    gate = torch.ones(len(at), rows, count, device=passes.device)
    gate[:, :, list(unit.heads)] = at.to(gate)[:, None, None]
    gate = gate.flatten(0, 1).requires_grad_()
    with torch.enable_grad():
        losses = passes.losses(number, start, unit.attention, gate, fill)
        (slopes,) = torch.autograd.grad(losses.sum(), gate)
    return slopes[:, list(unit.heads)].sum(-1).double().cpu().reshape(len(at), rows)
