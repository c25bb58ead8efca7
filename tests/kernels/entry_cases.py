"""Adapters for the tests of the entry-wise operators, and their rules in NumPy, in float64 and with NumPy's draws."""

from __future__ import annotations

import numpy as np
import torch

from loraforge.kernels.entrywise import SPAN, Part

Array = np.ndarray
LIMIT, GAIN = 3 * 2**30, 2.0  # exact products, so that sums that cancel do so in every dtype


def parts(m: int, n: int, ranks=(1, 7, 16), dense: torch.dtype | None = None, seed: int = 0) -> list[Part]:
    """Adapters whose products are exact: whole numbers over 8, so that many entries are equal and zeros occur."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for i, r in enumerate(ranks):
        left = torch.randint(-3, 4, (m, r), generator=g).double() / 4
        right = torch.randint(-3, 4, (r, n), generator=g).double() / 2
        rule = {"weight": (1.0, -0.5, 0.75)[i % 3], "low": 0.125 * i, "high": 2.5 + i, "key": (i + 1) << 63}
        if dense is None:
            made.append(Part(left, right, 1.0, **rule))
        else:
            made.append(Part((left @ right).to(dense), None, 0.5, **rule))
    return made


def numbers(n: int, dtype=np.float32) -> Array:
    """Numbers of every kind, (n,)."""
    tiny = np.finfo(dtype).smallest_subnormal
    special = [0.0, -0.0, 1.0, -1.0, 1e30, -1e-30, tiny, -tiny, float(np.finfo(dtype).max) / 4, 0.5, -0.5]
    with np.errstate(under="ignore"):
        return np.resize(np.array(special), n).astype(dtype)


def draws(part: Part, n: int, start: int, stop: int) -> Array:
    """NumPy's draws of whole rows, from the first entry of the matrix on."""
    words = np.random.Philox(key=part.key).random_raw(-(-stop * n // 2))
    return words.astype("<u8").view("<u4")[start * n : stop * n].reshape(stop - start, n)


def ruled(part: Part, start: int, stop: int, limit: int, gain: float, dtype) -> Array:
    """x of one adapter, weights not in it."""
    rows = part.left[start:stop].double().numpy()
    x = (rows * part.scaling if part.right is None else rows @ part.right.numpy()).astype(dtype)
    x = np.where((np.abs(x) < part.low) | (np.abs(x) > part.high), dtype(0), x)
    if limit < SPAN:
        x = np.where(draws(part, x.shape[1], start, stop) < limit, x * dtype(gain), dtype(0))
    return x


def merged(given: list[Part], start: int, stop: int, limit: int, gain: float, elect: bool, dtype) -> Array:
    """The whole rule, joined in float64."""
    x = np.stack([ruled(p, start, stop, limit, gain, dtype).astype(np.float64) * p.weight for p in given])
    if not elect:
        return x.sum(axis=0)
    agrees = (np.sign(x) == np.sign(x.sum(axis=0))) & (x != 0)
    return (x * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)


def counts(values: Array, prefixes: list[int], low: int, high: int) -> Array:
    """What `entry_counts_` adds for these numbers."""
    word = {4: np.uint32, 8: np.uint64}[values.dtype.itemsize]
    bits = [int(b) for b in np.abs(np.ravel(values)).view(word)]
    width = 1 << (high - low)
    table = np.zeros((len(prefixes), width), dtype=np.int64)
    for row, prefix in zip(table, prefixes, strict=True):
        for b in bits:
            if b >> high == prefix:
                row[(b >> low) % width] += 1
    return table


def halves(key: int) -> list[int]:
    """A key as two signed words."""
    return [word - (word >> 63 << 64) for word in (key % 2**64, key >> 64)]
