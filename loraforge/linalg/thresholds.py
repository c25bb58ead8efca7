"""Exact order statistics of magnitudes that come as a stream of blocks, in bounded memory.

The bits of a non-negative float, read as a whole number, are in the order of the floats. The k-th largest is found
digit by digit from the top: one pass counts how often each value of a digit occurs among the entries that agree with
the digits found so far. Two passes settle float32 (16 and 15 bits), four float64; each needs 2^16 counters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from loraforge.kernels.entry_counts import WHOLE, entry_counts_
from loraforge.linalg.elements import Deltas, Source, deltas_of, tile_rows
from loraforge.linalg.pool import pool_map
from loraforge.types import LayerInputs

Layers: TypeAlias = Callable[[], Iterable[LayerInputs]]

# Low end of each digit, from the top; the sign bit is always 0.
SHIFTS = {torch.float32: (15, 0), torch.float64: (47, 31, 15, 0)}


class Selection:
    """The k-th largest magnitudes of one stream, for several k at once.

    Add all blocks, call `narrow`, and do so again until `done`; every pass must give the same entries in any order.

    Args:
        dtype: float32 or float64: the precision in which magnitudes are compared.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype
        self._digit = 0
        self._prefixes = [0]  # the digits found so far, one number for each k
        self._left: list[int] = []  # how far below the largest entry of that prefix the k-th largest is
        self._counts = self._zeros()

    @property
    def passes(self) -> int:
        """How many passes over the entries are needed."""
        return len(SHIFTS[self._dtype])

    @property
    def done(self) -> bool:
        """True once the values are known."""
        return self._digit == self.passes

    def add(self, block: Tensor) -> None:
        """Counts the entries of a block of any shape and either sign; it is left as it is."""
        dtype = torch.float64 if block.dtype == torch.float64 else torch.float32
        self._count(block.reshape(1, -1), None, 1.0, dtype, 1)

    def add_rows(self, source: Source, dtype: torch.dtype) -> None:
        """Counts the entries of one adapter in one module, rounded to `dtype`; they are kept nowhere."""
        step = tile_rows((source.left if source.right is None else source.right).shape[1])
        self._count(source.left, source.right, source.scaling, dtype, step)

    def _count(self, left: Tensor, right: Tensor | None, scaling: float, dtype: torch.dtype, step: int) -> None:
        low, high = self._bounds()
        self._counts = self._counts.to(left.device)
        entry_counts_(
            self._counts, left, right, scaling=scaling, dtype=dtype, compared=self._dtype,
            prefixes=self._prefixes, low=low, high=high, step=step,
        )  # fmt: skip

    def narrow(self, ranks: Sequence[int]) -> None:
        """Ends a pass.

        Args:
            ranks: The k, from 1 (the largest); they are read at the end of the first pass only, since the number of
                entries may not be known before.
        """
        if self._digit == 0:
            self._prefixes, self._left = [0] * len(ranks), list(ranks)
        low, high = self._bounds()
        for index, counts in enumerate(
            self._counts.cpu().numpy().repeat(len(ranks) if self._digit == 0 else 1, axis=0)
        ):
            above = np.cumsum(counts[::-1])
            # Entries that were not given count as zeros: they are below all that were.
            place = int(np.searchsorted(above, self._left[index]))
            if place == len(above):
                digit = 0
            else:
                digit = len(above) - 1 - place
                self._left[index] -= int(above[place]) - int(counts[digit])
            self._prefixes[index] = (self._prefixes[index] << (high - low)) + digit
        self._digit += 1
        if not self.done:
            self._counts = self._zeros()

    def values(self) -> list[float]:
        """The k-th largest magnitude for each k; infinity for k = 0, and 0 for k beyond the number of entries."""
        whole, _ = WHOLE[self._dtype]
        found = torch.tensor(self._prefixes, dtype=whole).view(self._dtype).tolist()
        return [value if left > 0 else float("inf") for value, left in zip(found, self._left, strict=True)]

    def _bounds(self) -> tuple[int, int]:
        """Low and high end of the current digit."""
        shifts = SHIFTS[self._dtype]
        return shifts[self._digit], shifts[self._digit - 1] if self._digit else WHOLE[self._dtype][1]

    def _zeros(self) -> Tensor:
        """A counter for each value of the current digit, for each k."""
        low, high = self._bounds()
        return torch.zeros(len(self._prefixes), 1 << (high - low), dtype=torch.int64)


def largest(
    blocks: Callable[[], Iterable[Tensor]], ranks: Sequence[int], dtype: torch.dtype = torch.float32
) -> list[float]:
    """The k-th largest magnitudes of the entries of all blocks.

    Args:
        blocks: Gives all blocks afresh, once a pass.
        ranks: The k, from 1 (the largest).
        dtype: Precision of the comparison.

    Returns:
        One value for each k; infinity for k = 0.
    """
    selection = Selection(dtype)
    while not selection.done:
        for block in blocks():
            selection.add(block)
        selection.narrow(ranks)
    return selection.values()


def kept_count(density: float, entries: int) -> int:
    """floor(density * n)."""
    return math.floor(density * entries)


def thresholds_in(deltas: Deltas, ranks: Sequence[int]) -> list[list[float]]:
    """The k-th largest magnitudes of each adapter in one module.

    Returns:
        One list an adapter, one value for each k; [0, ...] for an adapter that adds nothing.
    """
    found = [[0.0] * len(ranks) for _ in range(1 + max((s.index for s in deltas.sources), default=-1))]
    values = pool_map(lambda source: _largest_in(deltas, source, ranks), deltas.sources)
    for source, own in zip(deltas.sources, values, strict=True):
        found[source.index] = own
    return found


def _largest_in(deltas: Deltas, source: Source, ranks: Sequence[int]) -> list[float]:
    selection = Selection(deltas.dtype)
    while not selection.done:
        selection.add_rows(source, deltas.dtype)
        selection.narrow(ranks)
    return selection.values()


def trimmed_in(deltas: Deltas, density: float) -> list[float]:
    """The magnitude of each adapter that a share of its entries in one module reaches."""
    return [found[0] for found in thresholds_in(deltas, [kept_count(density, math.prod(deltas.shape))])]


def thresholds_over(layers: Layers, density: float, view: Callable[[LayerInputs], Deltas] = deltas_of) -> list[float]:
    """The magnitude of each adapter that a share of its entries over all modules reaches.

    Args:
        layers: Gives all modules afresh each time; none is kept.
        density: Share of the entries to keep, of all entries of all modules: a module that an adapter lacks counts as
            zeros.
        view: What of a module is looked at.

    Returns:
        One threshold an adapter.
    """
    narrow = _thresholds_over(layers, density, view, torch.float32)
    return narrow if narrow is not None else _thresholds_over(layers, density, view, torch.float64) or []


def _thresholds_over(
    layers: Layers, density: float, view: Callable[[LayerInputs], Deltas], dtype: torch.dtype
) -> list[float] | None:
    """The thresholds found in a dtype, or None where a module needs the wider one."""
    selections: list[Selection] = []
    while not selections or not selections[0].done:
        entries = 0
        for layer in layers():
            deltas = view(layer)
            if deltas.dtype == torch.float64 and dtype == torch.float32:
                return None
            selections = selections or [Selection(dtype) for _ in layer.factors]
            entries += math.prod(deltas.shape)
            pool_map(_count, [(deltas, source, selections[source.index]) for source in deltas.sources])
        if not selections:
            return []
        for selection in selections:
            selection.narrow([kept_count(density, entries)])
    return [selection.values()[0] for selection in selections]


def _count(job: tuple[Deltas, Source, Selection]) -> None:
    deltas, source, selection = job
    selection.add_rows(source, deltas.dtype)
