"""Cases of the entry-wise operators on deltas that are never formed."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from loraforge.bench import costs
from loraforge.bench.cases import Case, Draws, Work, error_of, frobenius_error
from loraforge.kernels import entry_counts, entrywise
from loraforge.kernels.entrywise import Part

# (adapters, m, n, r)
_MERGES = {"tiny": ((2, 33, 17, 3),), "default": ((4, 768, 768, 16),), "full": ((4, 768, 768, 16), (8, 4096, 4096, 16))}
# (m, n, r)
_COUNTS = {"tiny": ((33, 17, 3),), "default": ((768, 768, 16),), "full": ((768, 768, 16), (4096, 4096, 16))}
# (rows, n)
_TILES = {"tiny": ((33, 17),), "default": ((1024, 1024),), "full": ((1024, 1024), (8192, 4096))}
_TILE_ENTRIES = 2**17  # of the reference's tiles, as linalg.elements has them
_HALF, _GAIN = 2**31, 2.0
_TOP, _WIDTH = 20, 31  # bits of the top digit of a float32 magnitude
_FLOAT32 = 4e-7  # entries rounded once, and float32 sums over a few adapters
_KINDS = ("sum", "elect", "drop")


def cases(size: str) -> list[Case]:
    """`entry_merge`, `entry_counts_` and `drop_rescale_`."""
    found = []
    for N, m, n, r in _MERGES[size]:
        sizes = {"N": N, "m": m, "n": n, "r": r}
        for kind in _KINDS:
            found.append(Case("entry_merge", f"{N} x {m}x{n} r={r} {kind}", sizes, partial(_merge, N, m, n, r, kind)))
    for m, n, r in _COUNTS[size]:
        found.append(Case("entry_counts_", f"{m}x{n} r={r}", {"m": m, "n": n, "r": r}, partial(_counts, m, n, r)))
    for t, n in _TILES[size]:
        found.append(Case("drop_rescale_", f"{t}x{n} fp32", {"t": t, "n": n}, partial(_drop, t, n)))
    return found


def _step(n: int) -> int:
    """Rows of a tile of the reference."""
    return 1 << max(0, (_TILE_ENTRIES // n).bit_length() - 1)


def _merge(N: int, m: int, n: int, r: int, kind: str, device: torch.device) -> Work:
    """sum: the weighted sum; elect: trimmed at a magnitude and elected (TIES); drop: half of the entries (DARE)."""
    draws, wide = Draws(device), torch.float64
    low = 1.3 * math.sqrt(r) if kind == "elect" else 0.0  # about a fifth of normal entries is larger
    parts = [
        Part(draws.normal(m, r, dtype=wide), draws.normal(r, n, dtype=wide), weight=1.0 / N, low=low, key=i + 1)
        for i in range(N)
    ]
    limit, gain = (_HALF, _GAIN) if kind == "drop" else (entrywise.SPAN, 1.0)

    def reference() -> Tensor:
        return entrywise.entry_merge_reference(
            parts, 0, m, limit=limit, gain=gain, elect=kind == "elect", dtype=torch.float32, step=_step(n)
        )

    forms = {
        "reference": reference,
        "native": lambda: entrywise.entry_merge(
            parts, 0, m, limit=limit, gain=gain, elect=kind == "elect", dtype=torch.float32, step=_step(n)
        ),
    }
    if kind != "drop":  # other draws would be another result
        narrow = [(p.left.float(), p.right.float()) for p in parts if p.right is not None]
        forms["torch"] = lambda: _dense(narrow, 1.0 / N, low, elect=kind == "elect")
    return Work(
        forms=forms,
        # Entries at the threshold may fall on either side of it in another precision: the reference's own decide.
        exact=lambda: (
            [_dense([(p.left, p.right) for p in parts if p.right is not None], 1.0 / N, 0.0, elect=False)]
            if kind == "sum"
            else [reference().double()]
        ),
        rtol=_FLOAT32,
        own={"torch": 2e-6 if kind == "sum" else 20.0 / m},  # a few entries flip
        cost=costs.entry_merge(N, m, n, r),
        distance=frobenius_error if kind == "elect" else error_of,
    )


def _dense(pairs: list[tuple[Tensor, Tensor]], weight: float, low: float, *, elect: bool) -> Tensor:
    """Full-size deltas, trimmed, then summed or elected and averaged."""
    deltas = torch.stack([left @ right for left, right in pairs])
    if low > 0.0:
        deltas = torch.where(deltas.abs() >= low, deltas, 0.0)
    deltas = deltas * weight
    total = deltas.sum(0)
    if not elect:
        return total
    agree = (deltas.sign() == total.sign()) & (deltas != 0)
    return (deltas * agree).sum(0) / agree.sum(0).clamp_min(1)


def _counts(m: int, n: int, r: int, device: torch.device) -> Work:
    """The top digit of float32 magnitudes, which all entries have."""
    draws, narrow = Draws(device), torch.float32
    left, right = (draws.normal(*shape, dtype=torch.float64) for shape in ((m, r), (r, n)))
    buckets = 1 << (_WIDTH - _TOP)
    counts = {
        name: torch.zeros(1, buckets, dtype=torch.int64, device=device) for name in ("reference", "native", "torch")
    }

    def reference() -> Tensor:
        entry_counts.entry_counts_reference(
            counts["reference"], left, right, 1.0, narrow, narrow, [0], _TOP, _WIDTH, _step(n)
        )
        return counts["reference"]

    def native() -> Tensor:
        entry_counts.entry_counts_(
            counts["native"], left, right, dtype=narrow, compared=narrow, prefixes=[0], low=_TOP, high=_WIDTH,
            step=_step(n),
        )  # fmt: skip
        return counts["native"]

    def plain() -> Tensor:
        bits = (left @ right).to(narrow).abs().view(torch.int32).flatten()
        return counts["torch"].add_(torch.bincount(bits >> _TOP, minlength=buckets))

    def exact() -> list[Tensor]:
        bits = (left @ right).to(narrow).abs().view(torch.int32).flatten()
        return [torch.bincount(bits >> _TOP, minlength=buckets)[None]]

    return Work(
        forms={"reference": reference, "torch": plain, "native": native},
        exact=exact,
        rtol=0.0,
        before=lambda name: counts[name].zero_(),
        cost=costs.entry_counts_(m, n, r, buckets),
    )


def _drop(t: int, n: int, device: torch.device) -> Work:
    source, key = Draws(device).normal(t, n), 7 << 70
    tiles = {name: source.clone() for name in ("reference", "native")}

    def run(name: str) -> Tensor:
        function = entrywise.drop_rescale_ if name == "native" else entrywise.drop_rescale_reference
        function(tiles[name], key, 0, _HALF, _GAIN)
        return tiles[name]

    def exact() -> list[Tensor]:
        kept = torch.from_numpy(entrywise.draw(key, 0, t * n).astype("int64")) < _HALF
        return [source.double() * kept.view(t, n).to(device) * _GAIN]

    return Work(
        forms={"reference": partial(run, "reference"), "native": partial(run, "native")},
        exact=exact,
        rtol=0.0,  # a product with 2
        before=lambda name: tiles[name].copy_(source),
        cost=costs.drop_rescale_(t, n),
    )
