"""Random draws that belong to an entry of a matrix, not to the order in which entries are visited.

Philox (4x64, 10 rounds; Salmon et al., SC 2011) maps (key, counter) to random bits without a state in between. The key
is (seed, module, adapter) and the counter the entry's place, so a draw is the same whatever the blocks, threads, device
and other adapters: entry e = row * n + column has 32 bits, eight entries share a counter.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraforge.kernels.entrywise import SPAN, draw
from loraforge.linalg.elements import EntryRules, Sparsify
from loraforge.types import LayerInputs


class Draws:
    """Uniform 32-bit draws, one an entry, of one adapter in one module; `key` are the 128 bits that they belong to.

    Args:
        seed: The user's seed.
        module: Dotted name of the module.
        key: Word of the adapter that does not depend on the adapters' order.
    """

    def __init__(self, seed: int, module: str, key: str) -> None:
        digest = hashlib.sha256("\0".join((str(seed), module, key)).encode()).digest()
        self.key = int.from_bytes(digest[:16], "little")

    def draw(self, first: int, count: int) -> NDArray[np.uint32]:
        """Draws of entries first .. first + count, (count,), each uniform on 0 .. 2^32 - 1."""
        return draw(self.key, first, count)


def draws_of(layer: LayerInputs, seed: int) -> list[Draws]:
    """The draws of each adapter in a module; where the layer names no keys, adapters are told apart by place."""
    keys = layer.keys or [str(index) for index in range(len(layer.factors))]
    return [Draws(seed, layer.module, key) for key in keys]


def drop_and_rescale(layer: LayerInputs, density: float, seed: int) -> EntryRules:
    """DARE: keeps an entry with probability `density` and divides what is kept by it.

    Args:
        layer: Names the module and the adapters.
        density: Met to 2^-32; 0 keeps nothing and 1 everything.
        seed: The user's seed.
    """
    draws = draws_of(layer, seed)
    limit = round(density * SPAN)
    if limit == 0:
        return EntryRules([math.inf] * len(draws))
    return EntryRules([0.0] * len(draws), keys=[one.key for one in draws], limit=limit, gain=1.0 / density)


def drop_by_rank(layer: LayerInputs, density: float, epsilon: float, seed: int, *, divide: bool) -> Sparsify:
    """DELLA: keeps an entry with a probability that grows with the rank of its magnitude in its row.

    Args:
        layer: Names the module and the adapters.
        density: Mean probability.
        epsilon: The smallest entry of a row has density - epsilon, the largest density + epsilon, linear in rank;
            equal magnitudes rank by column. A row of one entry has density.
        seed: The user's seed.
        divide: Divide what is kept by its probability.
    """
    draws = draws_of(layer, seed)

    def sparsify(index: int, tile: Tensor, start: int) -> None:
        rows, n = tile.shape
        ladder = np.linspace(density - epsilon, density + epsilon, n) if n > 1 else np.array([density])
        ladder = ladder.clip(0.0, 1.0)
        gains = 1.0 / np.where(ladder > 0.0, ladder, 1.0) if divide else np.ones(n)
        order = ascending(tile)
        uniform = np.take_along_axis(draws[index].draw(start * n, rows * n).reshape(rows, n), order, axis=1)
        factors = np.empty((rows, n), dtype=np.float32 if tile.dtype == torch.float32 else np.float64)
        np.put_along_axis(factors, order, np.where(uniform < ladder * SPAN, gains, 0.0), axis=1)
        tile.mul_(torch.from_numpy(factors).to(tile.device))

    return sparsify


def ascending(tile: Tensor) -> NDArray[np.int64]:
    """The column of the k-th smallest magnitude of each row, (rows, n); equal ones by column."""
    sizes = tile.abs()
    if sizes.dtype != torch.float32:
        order: NDArray[np.int64] = torch.sort(sizes, dim=1, stable=True).indices.cpu().numpy()
        return order
    # Bits of a magnitude over its column: whole numbers whose plain sort is the stable one, and several times faster.
    words = sizes.cpu().contiguous().numpy().view(np.uint32).astype(np.uint64) << np.uint64(32)
    words |= np.arange(sizes.shape[1], dtype=np.uint64)
    words.sort(axis=1)
    return (words & np.uint64(SPAN - 1)).view(np.int64)
