"""Exact order statistics of magnitudes that come as a stream of blocks, in bounded memory.

The bits of a non-negative float, read as a whole number, are in the order of the floats. The k-th largest is found
digit by digit from the top: one pass counts how often each value of a digit occurs among the entries that agree with
the digits found so far. Two passes settle float32 (16 and 15 bits), four float64; each needs 2^16 counters.

Where there are many float32 entries, a look at some of them says about where the value lies, and one pass that counts
every number near it, and how many entries are above, settles it: the same value, since a guess that missed is dropped.
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

# A guess comes from one tile of EVERY, SAMPLED entries or more, and is good to a few thousandths. The value is looked
# for in two windows of 2^WINDOW neighbouring floats each, 0.8 to 1.6 % of it.
EVERY, SAMPLED, WINDOW = 16, 2**18, 16

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
        self._windows: list[int] = []  # where the values are expected: two neighbouring prefixes for each k
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

    def add_rows(self, source: Source, dtype: torch.dtype, every: int = 1) -> None:
        """Counts the entries of one adapter in one module, rounded to `dtype`, or one tile of `every`; none is kept."""
        step = tile_rows((source.left if source.right is None else source.right).shape[1])
        self._count(source.left, source.right, source.scaling, dtype, step, every)

    def guess(self, ranks: Sequence[int], given: int) -> list[int]:
        """After a pass over some of `given` entries: about the bits of the k-th largest of all; empty if unsure."""
        looked_at = int(self._counts[:, :-1].sum())
        if looked_at < SAMPLED or not all(1e-3 * given < k < 0.999 * given for k in ranks):
            return []
        self.narrow([round(k * looked_at / given) for k in ranks])
        low = SHIFTS[self._dtype][0]
        return [(prefix << low) + (1 << (low - 1)) for prefix in self._prefixes]

    def expect(self, bits: Sequence[int]) -> None:
        """Before the first pass: looks for each value near these bits, and starts afresh where it is not there."""
        starts = [max(0, (b - (1 << (WINDOW - 1))) >> WINDOW) for b in bits]
        self._windows = [prefix for start in starts for prefix in (start, start + 1)]
        self._counts = self._zeros()

    def _look(self, ranks: Sequence[int]) -> None:
        """Ends the pass over the windows."""
        found = []
        counts = self._counts.cpu().numpy()
        for low, high, start, k in zip(counts[::2], counts[1::2], self._windows[::2], ranks, strict=True):
            inside = np.cumsum(np.concatenate([low[:-1], high[:-1]])[::-1])
            place = int(np.searchsorted(inside, k - int(high[-1])))
            if 0 < k - int(high[-1]) and place < len(inside):
                found.append((start << WINDOW) + len(inside) - 1 - place)
        self._windows = []
        if len(found) == len(ranks):
            self._prefixes, self._left, self._digit = found, [1] * len(found), self.passes
        else:
            self._counts = self._zeros()

    def _count(
        self, left: Tensor, right: Tensor | None, scaling: float, dtype: torch.dtype, step: int, every: int = 1
    ) -> None:
        low, high = self._bounds()
        self._counts = self._counts.to(left.device)
        entry_counts_(
            self._counts, left, right, scaling=scaling, dtype=dtype, compared=self._dtype,
            prefixes=self._windows or self._prefixes, low=low, high=high, every=every, step=step,
        )  # fmt: skip

    def narrow(self, ranks: Sequence[int]) -> None:
        """Ends a pass.

        Args:
            ranks: The k, from 1 (the largest); they are read at the end of the first pass only, since the number of
                entries may not be known before.
        """
        if self._windows:
            self._look(ranks)
            return
        if self._digit == 0:
            self._prefixes, self._left = [0] * len(ranks), list(ranks)
        low, high = self._bounds()
        for index, counts in enumerate(
            self._counts[:, :-1].cpu().numpy().repeat(len(ranks) if self._digit == 0 else 1, axis=0)
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
        if self._windows:
            return 0, WINDOW
        return shifts[self._digit], shifts[self._digit - 1] if self._digit else WHOLE[self._dtype][1]

    def _zeros(self) -> Tensor:
        """A counter for each value of the current digit, for each k."""
        low, high = self._bounds()
        return torch.zeros(len(self._windows or self._prefixes), (1 << (high - low)) + 1, dtype=torch.int64)


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
    selection, entries = Selection(deltas.dtype), math.prod(deltas.shape)
    if deltas.dtype == torch.float32 and entries >= EVERY * SAMPLED:
        pilot = Selection()
        pilot.add_rows(source, deltas.dtype, EVERY)
        if bits := pilot.guess(ranks, entries):
            selection.expect(bits)
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
    dtype, entries, pilots = _pilots(layers, view)
    ranks, selections = [kept_count(density, entries)], []
    for pilot, given in pilots:
        selections.append(Selection(dtype))
        if dtype == torch.float32 and (bits := pilot.guess(ranks, given)):
            selections[-1].expect(bits)
    while unsettled := [selection for selection in selections if not selection.done]:
        for layer in layers():
            deltas = view(layer)
            jobs = [(deltas, source, selections[source.index], 1) for source in deltas.sources]
            pool_map(_count, [job for job in jobs if not job[2].done])
        for selection in unsettled:
            selection.narrow(ranks)
    return [selection.values()[0] for selection in selections]


def _pilots(
    layers: Layers, view: Callable[[LayerInputs], Deltas]
) -> tuple[torch.dtype, int, list[tuple[Selection, int]]]:
    """The dtype to compare in, the entries of all modules, and each adapter's counts of some and number of all."""
    dtype, entries = torch.float32, 0
    pilots: list[Selection] = []
    given: list[int] = []
    for layer in layers():
        deltas = view(layer)
        dtype = torch.promote_types(dtype, deltas.dtype)
        pilots = pilots or [Selection() for _ in layer.factors]
        given = given or [0] * len(pilots)
        entries += math.prod(deltas.shape)
        for source in deltas.sources:
            given[source.index] += math.prod(deltas.shape)
        if dtype == torch.float32:
            pool_map(_count, [(deltas, source, pilots[source.index], EVERY) for source in deltas.sources])
    return dtype, entries, list(zip(pilots, given, strict=True))


def _count(job: tuple[Deltas, Source, Selection, int]) -> None:
    deltas, source, selection, every = job
    selection.add_rows(source, deltas.dtype, every)
