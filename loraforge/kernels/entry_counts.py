"""Counts of the digits of magnitudes: what an exact order statistic needs of a pass over a delta.

The bits of a non-negative float, read as a whole number, are in the order of the floats. Of the entries whose bits from
`high` on are a given prefix, the operator counts how often each value of the bits low .. high - 1 occurs. The entries
are formed as by `entry_merge` and kept nowhere. Whole numbers add up in any order, so counts are the same whatever the
threads and the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.kernels import backend
from loraforge.kernels.checks import FLOAT32_64, require
from loraforge.kernels.entrywise import Part, check_source

# Whole numbers of a float's width, and the place of its sign.
WHOLE = {torch.float32: (torch.int32, 31), torch.float64: (torch.int64, 63)}
_MOST_BITS = 20


def entry_counts_reference(
    counts: Tensor,
    left: Tensor,
    right: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    compared: torch.dtype,
    prefixes: Sequence[int],
    low: int,
    high: int,
    step: int,
) -> None:
    """`entry_counts_` in PyTorch, a tile of `step` rows at a time."""
    part = Part(left, right, scaling)
    m, n = part.shape
    tile, product = (left.new_empty((min(step, m), n), dtype=kind) for kind in (dtype, torch.float64))
    whole, width = WHOLE[compared]
    for start in range(0, m, step):
        rows = min(step, m - start)
        part.fill(start, tile[:rows], product[:rows])
        bits = tile[:rows].to(compared).view(-1).view(whole) & ((1 << width) - 1)
        for counted, prefix in zip(counts, prefixes, strict=True):
            found = bits if high == width else _agreeing(bits, prefix << high, (prefix + 1) << high)
            counted += torch.bincount((found >> low) - (prefix << (high - low)), minlength=1 << (high - low))


@torch.no_grad()
def entry_counts_(
    counts: Tensor,
    left: Tensor,
    right: Tensor | None,
    *,
    scaling: float = 1.0,
    dtype: torch.dtype,
    compared: torch.dtype,
    prefixes: Sequence[int],
    low: int,
    high: int,
    step: int = 32,
) -> None:
    """Adds the counts of one digit of an adapter's entries.

    Args:
        counts: (prefixes, 2^(high - low)) int64, contiguous, on the device of `left`.
        left: (m, r) float64; of a dense update (m, n) of any float dtype.
        right: (r, n) float64; None for a dense update.
        scaling: Factor of a dense update.
        dtype: float32 or float64: what an entry is rounded to.
        compared: float32 or float64: what its bits are read in.
        prefixes: What the bits from `high` on must be; [0] for the top digit, of which all entries have it.
        low: Lowest bit of the digit.
        high: Bit above the digit; 31 or 63 (the sign's place) for the top one.
        step: Rows that the PyTorch form works on at a time.

    Raises:
        LoraforgeError: A shape or dtype does not fit, or there is no such digit.
    """
    width = WHOLE[compared][1] if compared in WHOLE else 0
    if dtype not in FLOAT32_64 or not 0 <= low < high <= width or high - low > _MOST_BITS:
        raise LoraforgeError(
            "entry_counts_: there is no such digit",
            got=f"bits {low} to {high} of {compared}, entries in {dtype}",
            expected=f"at most {_MOST_BITS} bits below the sign of float32 or float64",
        )
    check_source("entry_counts_", left, right)
    require("entry_counts_", "counts", counts, (len(prefixes), 1 << (high - low)), (torch.int64,))
    tensors = [counts, left] if right is None else [counts, left, right]
    if backend.takes_native("entry_counts_", *tensors):
        wide = compared == torch.float64
        torch.ops.loraforge.entry_counts_(counts, left, right, scaling, dtype, wide, list(prefixes), low, high)
    else:
        entry_counts_reference(counts, left, right, scaling, dtype, compared, prefixes, low, high, step)


@backend.fake("entry_counts_")
def _entry_counts_fake(
    counts: Tensor,
    left: Tensor,
    right: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    wide: bool,
    prefixes: list[int],
    low: int,
    high: int,
) -> None:
    return None


def _agreeing(bits: Tensor, low: int, high: int) -> Tensor:
    """The entries in low..high - 1; through NumPy on the CPU, where its masks are several times faster."""
    if bits.device.type != "cpu":
        return bits[(bits >= low) & (bits < high)]
    values = bits.numpy()
    return torch.from_numpy(values[(values >= low) & (values < high)])
