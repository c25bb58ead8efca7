"""Entry-wise rules on the deltas of all adapters, without forming a delta in memory.

Entry (a, b) of adapter i is x = s_i (B_i A_i)_ab, its sum over r taken in order in float64 and rounded once to the
result's dtype (or an entry of a dense update times s_i, rounded likewise). A rule changes it, and the adapters join:

    x <- 0 where |x| < low_i or |x| > high_i
    x <- gain x where draw(key_i, entry) < limit, else 0        draws: Philox, entry = row * n + column
    out = sum_i w_i x_i                                          or, electing, with x_i <- w_i x_i:
    out = (S + g T) / (z + g c),   S = sum x, T = sum |x|, c = sum sign(x), z = sum |sign(x)|, g = sign(S)

The last is the mean of the x_i whose sign is that of their sum, 0 where the sum is exactly 0: both sums hold each x of
the elected sign twice, none cancels, and no adapter's entries have to be kept for a second look.

A NaN stays one whatever the rule. Bits depend on no tile, block or thread. Against the PyTorch form, rules, draws and
joins do the same arithmetic; only the products' sums over r are added by BLAS in an order of its own there, a
difference of float64 roundings that few float32 entries can show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.kernels import backend
from loraforge.kernels.checks import FLOAT32_64, FLOATS, require

SPAN = 2**32  # number of values of a draw
_PER_COUNTER = 8  # 32-bit draws of one Philox block of 4 x 64 bits
_WORD = 2**64 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One adapter's entries and what a rule does to them.

    Attributes:
        left: (m, r) float64 with the scaling folded in; of a dense update (m, n) of any float dtype.
        right: (r, n) float64; None for a dense update.
        scaling: Factor of a dense update.
        weight: w_i.
        low: Smaller magnitudes become 0.
        high: Larger magnitudes become 0.
        key: 128 bits that the draws belong to.
    """

    left: Tensor
    right: Tensor | None
    scaling: float = 1.0
    weight: float = 1.0
    low: float = 0.0
    high: float = math.inf
    key: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    def fill(self, start: int, tile: Tensor, product: Tensor) -> None:
        """Writes rows from `start` on into `tile` by PyTorch; `product` is a float64 work space of its shape."""
        rows = self.left[start : start + tile.shape[0]]
        if self.right is not None:
            torch.mm(rows, self.right, out=product)
            tile.copy_(product)
        elif self.scaling == 1.0:
            tile.copy_(rows)
        else:
            tile.copy_(torch.mul(rows.to(product.dtype), self.scaling))


def draw(key: int, first: int, count: int) -> NDArray[np.uint32]:
    """Draws of entries first .. first + count, (count,), each uniform on 0 .. 2^32 - 1, on the CPU."""
    block, skip = divmod(first, _PER_COUNTER)
    words = -(-(skip + count) // 2)
    raw = np.random.Philox(key=key, counter=block).random_raw(words)
    return raw.astype("<u8", copy=False).view("<u4")[skip : skip + count]


def below(value: float, dtype: torch.dtype) -> float:
    """The next smaller number of a dtype, as a Python float."""
    one = torch.tensor(value, dtype=dtype)
    return float(torch.nextafter(one, torch.zeros_like(one)))


def keep_from(tile: Tensor, threshold: float) -> None:
    """Zeros the entries smaller than a threshold, in place; infinity zeros all."""
    if math.isinf(threshold):
        tile.zero_()
    elif threshold > 0.0:
        # hardshrink keeps what is larger than its bound; one step below the threshold that is what is not smaller.
        torch.ops.aten.hardshrink.out(tile, below(threshold, tile.dtype), out=tile)


def drop_above(tile: Tensor, limit: float) -> None:
    """Zeros the entries larger than a limit, in place."""
    if not math.isinf(limit):
        tile.sub_(torch.nn.functional.hardshrink(tile, limit))


def drop_rescale_reference(tile: Tensor, key: int, first: int, limit: int, gain: float) -> None:
    """`drop_rescale_` in PyTorch, with NumPy's draws."""
    t, n = tile.shape
    mask = draw(key, first * n, t * n).reshape(t, n) < np.uint32(limit)
    if tile.device.type == "cpu":
        values = tile.numpy()  # NumPy's masks are several times faster
        np.multiply(values, mask, out=values)
    else:
        tile.mul_(torch.from_numpy(mask).to(tile.device))
    tile.mul_(gain)


@torch.no_grad()
def drop_rescale_(tile: Tensor, key: int, first: int, limit: int, gain: float) -> None:
    """Keeps the entries whose draw is below a limit, times a gain, and zeros the others, in place.

    Args:
        tile: (t, n) float32 or float64, whole rows of a matrix.
        key: 128 bits that the draws belong to.
        first: Row of the matrix that the tile begins with.
        limit: 0 .. 2^32 - 1; an entry is kept with probability limit / 2^32.
        gain: Factor of what is kept.

    Raises:
        LoraforgeError: A shape, dtype or the limit does not fit.
    """
    require("drop_rescale_", "tile", tile, ("t", "n"), FLOAT32_64)
    _check_limit("drop_rescale_", limit, SPAN - 1)
    if backend.takes_native("drop_rescale_", tile):
        torch.ops.loraforge.drop_rescale_(tile, *_halves(key), first, limit, gain)
    else:
        drop_rescale_reference(tile, key, first, limit, gain)


@backend.fake("drop_rescale_")
def _drop_rescale_fake(tile: Tensor, key_low: int, key_high: int, first: int, limit: int, gain: float) -> None:
    return None


def join_tiles(tiles: Iterable[tuple[float, Tensor]], out: Tensor, *, elect: bool) -> None:
    """Joins (weight, tile) of all adapters in `out` by PyTorch; tiles are changed and may share their memory."""
    out.zero_()
    if not elect:
        for weight, tile in tiles:
            out.add_(tile, alpha=weight)
        return
    sign, sizes, signs, count = (torch.zeros_like(out) for _ in range(4))
    for weight, tile in tiles:
        if weight != 1.0:
            tile.mul_(weight)
        torch.sign(tile, out=sign)
        out.add_(tile)
        sizes.add_(tile.abs_())
        signs.add_(sign)
        count.add_(sign.abs_())
    torch.sign(out, out=sign)
    out.addcmul_(sizes, sign)
    out.div_(count.addcmul_(signs, sign).clamp_(min=1.0))


def entry_merge_reference(
    parts: Sequence[Part],
    start: int,
    stop: int,
    *,
    limit: int,
    gain: float,
    elect: bool,
    dtype: torch.dtype,
    step: int,
) -> Tensor:
    """`entry_merge` in PyTorch by tiles of `step` rows on a fixed grid: BLAS's sums depend on its shapes."""
    m, n = parts[0].shape
    first = start - start % step
    last = min(m, -(-stop // step) * step) if stop > start else first
    out = torch.empty(last - first, n, dtype=dtype, device=parts[0].left.device)
    tile, product = (out.new_empty(min(step, m), n, dtype=kind) for kind in (dtype, torch.float64))

    def ruled(row: int, rows: int) -> Iterator[tuple[float, Tensor]]:
        for part in parts:
            part.fill(row, tile[:rows], product[:rows])
            keep_from(tile[:rows], part.low)
            drop_above(tile[:rows], part.high)
            if limit < SPAN:
                drop_rescale_reference(tile[:rows], part.key, row, limit, gain)
            yield part.weight, tile[:rows]

    for row in range(first, last, step):
        rows = min(step, last - row)
        join_tiles(ruled(row, rows), out[row - first : row - first + rows], elect=elect)
    return out[start - first : stop - first]


@torch.no_grad()
def entry_merge(
    parts: Sequence[Part],
    start: int,
    stop: int,
    *,
    limit: int = SPAN,
    gain: float = 1.0,
    elect: bool = False,
    dtype: torch.dtype = torch.float32,
    step: int = 32,
) -> Tensor:
    """Rows of the adapters' entries under a rule, joined.

    Args:
        parts: One an adapter, all of one shape (m, n), all low-rank or all dense.
        start: First row.
        stop: Row after the last.
        limit: 0 .. 2^32: an entry is kept where its draw is below; 2^32 draws nothing.
        gain: Factor of what a draw keeps.
        elect: TIES' election and mean instead of the sum.
        dtype: float32 or float64, of entries and result.
        step: Rows that the PyTorch form works on at a time.

    Returns:
        (stop - start, n).

    Raises:
        LoraforgeError: Nothing is given, shapes or dtypes do not fit, or a number is out of range.
    """
    _check_parts("entry_merge", parts, start, stop)
    _check_limit("entry_merge", limit, SPAN)
    if dtype not in FLOAT32_64:
        raise LoraforgeError(
            "entry_merge: the result cannot have this dtype", where="dtype", got=dtype, expected="float32 or float64"
        )
    tensors = [t for part in parts for t in (part.left, part.right) if t is not None]
    if not backend.takes_native("entry_merge", *tensors):
        return entry_merge_reference(parts, start, stop, limit=limit, gain=gain, elect=elect, dtype=dtype, step=step)
    # An infinite threshold keeps nothing, infinity and NaN included.
    live = [part for part in parts if not math.isinf(part.low)]
    if not live:
        return parts[0].left.new_zeros((stop - start, parts[0].shape[1]), dtype=dtype)
    return torch.ops.loraforge.entry_merge(
        [part.left[start:stop] for part in live],
        [part.right for part in live if part.right is not None],
        [part.scaling for part in live],
        [part.weight for part in live],
        [part.low for part in live],
        [part.high for part in live],
        [half for part in live for half in _halves(part.key)],
        limit,
        gain,
        start,
        elect,
        dtype,
    )


@backend.fake("entry_merge")
def _entry_merge_fake(
    left: list[Tensor],
    right: list[Tensor],
    scaling: list[float],
    weights: list[float],
    low: list[float],
    high: list[float],
    keys: list[int],
    limit: int,
    gain: float,
    first: int,
    elect: bool,
    dtype: torch.dtype,
) -> Tensor:
    columns = (right[0] if right else left[0]).shape[1]
    return left[0].new_empty((left[0].shape[0], columns), dtype=dtype)


def _halves(key: int) -> tuple[int, int]:
    """The low and the high 64 bits of a key as signed numbers, which is what an operator takes."""
    low, high = key & _WORD, (key >> 64) & _WORD
    return low - ((low >> 63) << 64), high - ((high >> 63) << 64)


def _check_limit(op: str, limit: int, most: int) -> None:
    if not 0 <= limit <= most:
        raise LoraforgeError(f"{op}: limit is out of range", where="limit", got=limit, expected=f"0 to {most}")


def _check_parts(op: str, parts: Sequence[Part], start: int, stop: int) -> None:
    if not parts or len({part.right is None for part in parts}) > 1:
        raise LoraforgeError(
            f"{op}: the adapters' entries do not fit together",
            where="parts",
            got=[tuple(part.left.shape) for part in parts],
            expected="one or more, all low-rank or all dense",
        )
    for part in parts:
        check_source(op, part.left, part.right)
        if part.shape != parts[0].shape:
            raise LoraforgeError(f"{op}: shapes differ", where="parts", got=part.shape, expected=parts[0].shape)
    if not 0 <= start <= stop <= parts[0].shape[0]:
        raise LoraforgeError(
            f"{op}: rows are out of range", where="start, stop", got=(start, stop), expected=f"0 to {parts[0].shape[0]}"
        )


def check_source(op: str, left: Tensor, right: Tensor | None) -> None:
    """Refuses factors, or rows, that `entry_merge` and `entry_counts_` cannot take."""
    if right is None:
        require(op, "left", left, ("m", "n"), FLOATS)
    else:
        require(op, "left", left, ("m", "r"), (torch.float64,))
        require(op, "right", right, (left.shape[1], "n"), (torch.float64,))
