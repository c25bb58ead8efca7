"""DELLA merge: drop entries at random, small ones more often, rescale, sum.

    result = sum_i w_i M_i * D_i / p_i,     M_i ~ Bernoulli(p_i),     p_i = density - epsilon + 2 epsilon k / (n - 1)

with D_i = s_i B_i A_i and k = 0 .. n - 1 the rank of |D_i| within its row of n entries, from the smallest; equal
magnitudes rank by column. rescale=l1 leaves p_i out and gives M_i * D_i the l1 norm of D_i in each module instead.
Draws belong to (seed, module, adapter, entry).

Source: Deep et al., arXiv 2406.11617 (MagPrune), its window of probabilities written as density +- epsilon;
rescale=l1 is mergekit's.
Cost: m n R, N m n draws and m row sorts an adapter each time the rows are asked for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loraforge.linalg.draws import drop_by_rank
from loraforge.linalg.elements import Deltas, Sparsify, deltas_of, summed
from loraforge.merging.elements_params import DellaParams
from loraforge.types import LayerInputs, RowStream


def merge_layer(layer: LayerInputs, params: DellaParams) -> RowStream:
    """The merged rows of one module.

    Args:
        layer: Factors (or task vectors), weights and keys of the draws.
        params: density, epsilon, rescale and seed.

    Returns:
        (m, n) rows; rank_bound is the sum of the ranks.

    Raises:
        LoraforgeError: Shapes differ or a factor holds NaN or Inf.
    """
    deltas = deltas_of(layer)
    inverse = params.rescale == "inverse"
    drop = drop_by_rank(layer, params.density, params.epsilon, params.seed, divide=inverse)
    return summed(deltas, drop if inverse else _with_norm(deltas, drop))


def _with_norm(deltas: Deltas, drop: Sparsify) -> Sparsify:
    """`drop`, then the l1 norm that each adapter's module had before."""
    factors = {}
    for source in deltas.sources:
        whole, kept = [], []
        for start, tile in deltas.tiles(source):
            whole.append(float(torch.linalg.vector_norm(tile, ord=1, dtype=torch.float64)))
            drop(source.index, tile, start)
            kept.append(float(torch.linalg.vector_norm(tile, ord=1, dtype=torch.float64)))
        left = math.fsum(kept)
        factors[source.index] = math.fsum(whole) / left if left > 0.0 else 0.0

    def sparsify(index: int, tile: Tensor, start: int) -> None:
        drop(index, tile, start)
        tile.mul_(factors[index])

    return sparsify
