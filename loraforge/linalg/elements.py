"""Element-wise merging, a tile of rows at a time.

An element-wise rule needs the entries of every D_i = s_i B_i A_i, which no factor holds. They are formed in tiles of
whole rows, B_i[rows] A_i, worked on in place, and dropped: the memory is that of a few tiles, whatever m, N and the
number of modules. A tile's height comes from its width alone and tiles lie on a fixed grid, so an entry has the same
bits however its row is asked for. Products are made in float64 and rounded once.

What a rule does is cut in two: a `Sparsify` changes a tile of one adapter (weights not yet in it), and `summed` or
`elected` joins the tiles of all adapters with their weights. Rules that an `EntryRules` can say (limits, random drops)
run as one fused operator (`kernels.entrywise`) that keeps no tile; any other function works on tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.kernels.entrywise import SPAN, Part, drop_above, drop_rescale_, entry_merge, join_tiles, keep_from
from loraforge.types import LayerInputs, LowRank, RowStream, Update

TILE_ENTRIES = 2**17

# (adapter, tile of its rows, first row): zeros and rescales entries in place.
Sparsify: TypeAlias = Callable[[int, Tensor, int], None]


@dataclass(frozen=True, slots=True)
class EntryRules:
    """A `Sparsify` of limits and random drops, which `summed` and `elected` run without keeping a tile.

    Attributes:
        low: One an adapter: smaller magnitudes are zeroed; 0 keeps all and infinity nothing.
        high: One an adapter: larger magnitudes are zeroed. Empty: none are.
        keys: 128 bits an adapter that its draws belong to. Empty: nothing is drawn.
        limit: An entry is kept where its 32-bit draw is below.
        gain: Factor of what a draw keeps.
    """

    low: Sequence[float]
    high: Sequence[float] = ()
    keys: Sequence[int] = ()
    limit: int = SPAN
    gain: float = 1.0

    def __call__(self, index: int, tile: Tensor, start: int) -> None:
        """Applies the rule to rows from `start` on of one adapter, in place."""
        keep_from(tile, self.low[index])
        if self.high:
            drop_above(tile, self.high[index])
        if self.limit < SPAN:
            drop_rescale_(tile, self.keys[index], start, self.limit, self.gain)

    def part(self, source: Source) -> Part:
        """The rule and the entries of one adapter."""
        high = self.high[source.index] if self.high else math.inf
        key = self.keys[source.index] if self.keys else 0
        return Part(source.left, source.right, source.scaling, source.weight, self.low[source.index], high, key)


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One adapter's entries.

    Attributes:
        index: Its place in the user's order.
        weight: w_i.
        left: (m, r) float64 with the scaling folded in; of a dense update (m, n) as it is.
        right: (r, n) float64; None for a dense update.
        scaling: Factor of a dense update.
    """

    index: int
    weight: float
    left: Tensor
    right: Tensor | None
    scaling: float

    def fill(self, start: int, tile: Tensor, product: Tensor) -> None:
        """Writes rows from `start` on into `tile`; `product` is a float64 work space of its shape."""
        Part(self.left, self.right, self.scaling).fill(start, tile, product)


@dataclass(frozen=True, slots=True, eq=False)
class Deltas:
    """The entries of one module, adapter by adapter.

    Attributes:
        shape: (m, n).
        sources: The adapters that add something: a delta of zeros, or a weight of zero, is as good as none.
        dtype: float64 where any input is, else float32.
        device: Where the inputs are.
        rank_bound: Sum of the ranks of the sources (at most min(m, n) of dense updates).
    """

    shape: tuple[int, int]
    sources: Sequence[Source]
    dtype: torch.dtype
    device: torch.device
    rank_bound: int

    def tiles(self, source: Source) -> Iterator[tuple[int, Tensor]]:
        """(first row, tile) of one adapter, without its weight; a tile is overwritten by the next."""
        step = tile_rows(self.shape[1])
        tile, product = self.work()
        for start in range(0, self.shape[0], step):
            rows = min(step, self.shape[0] - start)
            source.fill(start, tile[:rows], product[:rows])
            yield start, tile[:rows]

    def work(self) -> tuple[Tensor, Tensor]:
        """A tile, and one in float64."""
        size = (min(tile_rows(self.shape[1]), self.shape[0]), self.shape[1])
        tile = torch.empty(size, dtype=self.dtype, device=self.device)
        return tile, torch.empty(size, dtype=torch.float64, device=self.device)


def deltas_of(layer: LayerInputs) -> Deltas:
    """The entries of a module.

    Raises:
        LoraforgeError: No adapter has the module, shapes differ, or a factor holds NaN or Inf.
    """
    present = [f for f in layer.factors if f is not None]
    if not present or len({f.shape for f in present}) > 1:
        raise LoraforgeError(
            "The deltas of a module do not fit together", where=layer.module, got=[f.shape for f in present]
        )
    tensors = [t for f in present for t in ((f.B, f.A) if isinstance(f, LowRank) else (f.weight,))]
    sources, bound = [], 0
    for index, (weight, update) in enumerate(zip(layer.weights, layer.factors, strict=True)):
        if update is not None and adds(weight, update, layer.module):
            sources.append(_source(index, weight, update))
            bound += update.rank
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    if sources and sources[0].right is None:
        bound = min(bound, *present[0].shape)
    return Deltas(present[0].shape, sources, dtype, tensors[0].device, max(1, bound))


def adds(weight: float, update: Update, module: str) -> bool:
    """Whether an update is more than zeros.

    Raises:
        LoraforgeError: It holds NaN or Inf.
    """
    tensors = (update.B, update.A) if isinstance(update, LowRank) else (update.weight,)
    sizes = [float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in tensors]
    if not math.isfinite(sum(sizes)):
        raise LoraforgeError("Factors hold NaN or Inf", where=module, got=[tuple(t.shape) for t in tensors])
    return weight != 0.0 and update.scaling != 0.0 and all(sizes)


def _source(index: int, weight: float, update: Update) -> Source:
    if isinstance(update, LowRank):
        left, right = update.B.to(torch.float64) * update.scaling, update.A.to(torch.float64)
        return Source(index, weight, left, right, 1.0)
    return Source(index, weight, update.weight, None, update.scaling)


def tile_rows(n: int) -> int:
    """Rows of a tile: a power of two, so that larger powers of two hold whole tiles."""
    return 1 << max(0, (TILE_ENTRIES // max(1, n)).bit_length() - 1)


def summed(deltas: Deltas, sparsify: Sparsify) -> RowStream:
    """sum_i w_i sparsify(D_i)."""
    return _joined(deltas, sparsify, elect=False)


def elected(deltas: Deltas, sparsify: Sparsify) -> RowStream:
    """The sign election and disjoint mean of TIES on x_i = w_i sparsify(D_i), entry by entry.

    The sign is that of sum_i x_i; the result is the mean of the x_i with that sign, 0 where the sum is exactly 0
    (`kernels.entrywise` has the formula).
    """
    return _joined(deltas, sparsify, elect=True)


def _joined(deltas: Deltas, sparsify: Sparsify, *, elect: bool) -> RowStream:
    if isinstance(sparsify, EntryRules) and deltas.sources:
        form = _fused(deltas, sparsify, elect=elect)
    else:
        form = _by_tiles(deltas, sparsify, elect=elect)
    return RowStream(deltas.shape, deltas.dtype, deltas.device, form, deltas.rank_bound)


def _fused(deltas: Deltas, rules: EntryRules, *, elect: bool) -> Callable[[int, int], Tensor]:
    """Rows by one operator."""
    parts, step = [rules.part(source) for source in deltas.sources], tile_rows(deltas.shape[1])

    def form(start: int, stop: int) -> Tensor:
        return entry_merge(
            parts, start, stop, limit=rules.limit, gain=rules.gain, elect=elect, dtype=deltas.dtype, step=step
        )

    return form


def _by_tiles(deltas: Deltas, sparsify: Sparsify, *, elect: bool) -> Callable[[int, int], Tensor]:
    """Rows made a tile at a time, on the grid of tiles."""
    (m, n), step = deltas.shape, tile_rows(deltas.shape[1])

    def changed(row: int, tile: Tensor, product: Tensor) -> Iterator[tuple[float, Tensor]]:
        for source in deltas.sources:
            source.fill(row, tile, product)
            sparsify(source.index, tile, row)
            yield source.weight, tile

    def form(start: int, stop: int) -> Tensor:
        first = start - start % step
        last = min(m, -(-stop // step) * step) if stop > start else first
        out = torch.empty(last - first, n, dtype=deltas.dtype, device=deltas.device)
        tile, product = deltas.work()
        for row in range(first, last, step):
            rows = min(step, last - row)
            tiles = changed(row, tile[:rows], product[:rows])
            join_tiles(tiles, out[row - first : row - first + rows], elect=elect)
        return out[start - first : stop - first]

    return form


def trim(thresholds: Sequence[float]) -> EntryRules:
    """Keeps entries at least as large as the adapter's threshold.

    Args:
        thresholds: One an adapter; infinity keeps nothing and 0 everything.
    """
    return EntryRules(thresholds)


def between(limits: Sequence[tuple[float, float]]) -> EntryRules:
    """Keeps entries whose magnitude is from the first to the second number of the adapter's limits."""
    return EntryRules([low for low, _ in limits], [high for _, high in limits])
