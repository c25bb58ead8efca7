"""Best approximations of updates that lie on a GPU: the host waits once a batch and asks nothing module by module.

A batch of b modules of one shape (m, n) and stacked rank R costs, whatever b is, about 30 launches and one wait:

    widen      factors to float64, one copy for dozens of modules (no stack of them in their own dtype before)
    Grams      two products, the pivoted Cholesky of both sides in one launch
    cores      one product, the SVD of all in one launch, one copy of the spectra to the host
    lift       ranks on the host, then a product a side, signs, rounding, and a gather for each different rank

In bytes of float32 factors F = 4 b R (m + n) the widening moves 3 F, the Grams 2 F, the lift to rank k 2 F + 7 F k / R.
For 224 modules of 4096 x 4096 with R = 64, k = 32: F = 0.47 GB, 5 GB in all, and 30 GFLOP in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraforge.kernels.core_svd import decompose_stack
from loraforge.linalg.bases import Side, column_signs, gram_sides
from loraforge.linalg.factored import Truncated, batches, pad, truncate_many
from loraforge.linalg.rank import RankRule
from loraforge.types import LowRank

# float64 copies of the factors that are worked on together; cuts a model in few enough batches that waits cost nothing.
WINDOW_BYTES = 2**30


@dataclass(frozen=True, slots=True, eq=False)
class _Decomposed:
    """A batch on its way: nothing of it has been waited for.

    Attributes:
        indices: Modules, by place.
        left: Left side.
        right: Right side.
        core: U (b, q, q), S (b, q), Vh (b, q, q).
        words: (b, q + 1) float64: the spectrum, and whether the bases are exact and the core converged.
    """

    indices: list[int]
    left: Side
    right: Side
    core: tuple[Tensor, Tensor, Tensor]
    words: Tensor


def truncate_resident(updates: Sequence[LowRank], rules: Sequence[RankRule]) -> list[Truncated]:
    """`truncate_many` with backend "auto" for updates on any one or more devices.

    Args:
        updates: One update a module, of any shapes.
        rules: One rank rule a module.

    Returns:
        One result a module, in order; spectra are on the CPU.

    Raises:
        LoraforgeError: A factor holds NaN or Inf, or a core does not converge.
    """
    done: dict[int, Truncated] = {}
    for window in _windows(updates):
        pending = [_decompose(updates, batch) for batch in window]
        while pending:
            done.update(_cut(updates, rules, pending.pop(0)))
    return [done[index] for index in range(len(updates))]


def _windows(updates: Sequence[LowRank]) -> list[list[list[int]]]:
    """Batches that are queued before the first of them is waited for."""
    found: list[list[list[int]]] = []
    size = WINDOW_BYTES + 1
    for batch in batches(updates, WINDOW_BYTES):
        lr = updates[batch[0]]
        needed = 8 * len(batch) * (lr.B.numel() + lr.A.numel())
        if size + needed > WINDOW_BYTES:
            found.append([])
            size = 0
        found[-1].append(batch)
        size += needed
    return found


def _decompose(updates: Sequence[LowRank], batch: list[int]) -> _Decomposed:
    left, right, exact = gram_sides([updates[i] for i in batch])
    U, S, Vh, info = decompose_stack(left.triangle @ right.triangle.mT)
    words = torch.cat([S, (exact & (info >= 0)).to(S.dtype)[:, None]], dim=1)
    return _Decomposed(batch, left, right, (U, S, Vh), words)


def _cut(updates: Sequence[LowRank], rules: Sequence[RankRule], batch: _Decomposed) -> dict[int, Truncated]:
    """Waits for a batch, picks its ranks and lifts it; modules that need another form of bases go there."""
    words: NDArray[np.float64] = batch.words.cpu().numpy()
    good = words[:, -1] == 1.0
    rest = [index for index, fine in zip(batch.indices, good, strict=True) if not fine]
    other = truncate_many([updates[i] for i in rest], [rules[i] for i in rest], "gram") if rest else []
    done = dict(zip(rest, other, strict=True))
    places = np.flatnonzero(good)
    if not len(places):
        return done
    lr = updates[batch.indices[0]]
    dtype = lr.B.dtype if lr.B.dtype == torch.float64 else torch.float32
    spectra = words[places, :-1]
    ranks = choose_many(spectra, [rules[batch.indices[p]] for p in places], *lr.shape, dtype)
    factors = _lift(batch, places, ranks, dtype)
    squares = np.square(spectra)
    # Summed from the small end: tails[:, k] is what a cut at k loses.
    tails = np.cumsum(squares[:, ::-1], axis=1)[:, ::-1]
    tails = np.concatenate([tails, np.zeros((len(places), 1))], axis=1)
    total, lost = tails[:, 0], tails[np.arange(len(places)), np.minimum(ranks, squares.shape[1])]
    kept = np.where(total > 0.0, 1.0 - lost / np.where(total > 0.0, total, 1.0), 1.0)
    rows = torch.from_numpy(spectra).unbind()
    for place, pair, S, share, error, k in zip(
        places, factors, rows, kept.tolist(), np.sqrt(lost).tolist(), ranks.tolist(), strict=True
    ):
        done[batch.indices[place]] = Truncated(pad(pair, k) if pair.rank < k else pair, S, share, error, k)
    return done


def _lift(batch: _Decomposed, places: NDArray[np.int64], ranks: NDArray[np.int64], dtype: torch.dtype) -> list[LowRank]:
    """Factors of every module of `places` cut to its rank (to what there is, where that is less), signs fixed."""
    U, S, Vh = batch.core
    top = int(min(ranks.max(), S.shape[1]))
    half = S[:, :top].sqrt()
    B = batch.left.times(U[:, :, :top] * half[:, None, :]).to(dtype)
    sign = column_signs(B)
    A = batch.right.rows(Vh[:, :top].mT * (half * sign)[:, None, :]).to(dtype)
    B *= sign[:, None, :]
    rows = A.unbind()
    found: list[LowRank | None] = [None] * len(places)
    for k in np.unique(np.minimum(ranks, top)).tolist():
        which = np.flatnonzero(np.minimum(ranks, top) == k)
        if k == top and len(which) == len(B):
            columns = B.unbind()
        else:  # one gather, so that every module's columns lie together
            chosen = torch.from_numpy(places[which]).to(B.device)
            columns = B[:, :, :k].index_select(0, chosen).unbind()
        for place, part in zip(which.tolist(), columns, strict=True):
            found[place] = LowRank(part, rows[places[place]][:k], 1.0)
    return [pair for pair in found if pair is not None]


def choose_many(
    spectra: NDArray[np.float64], rules: Sequence[RankRule], m: int, n: int, dtype: torch.dtype
) -> NDArray[np.int64]:
    """`rank.choose` for spectra of one length, by whole arrays: the same sums in the same order.

    Args:
        spectra: (b, q) singular values, descending.
        rules: One rank rule a spectrum.
        m: Rows of the deltas.
        n: Columns of the deltas.
        dtype: Dtype whose rounding the spectra carry; they are rounded to it.

    Returns:
        (b,) ranks, 1 or more.
    """
    ranks = np.ones(len(spectra), dtype=np.int64)
    for rule in set(rules):
        which = np.flatnonzero([other == rule for other in rules])
        ranks[which] = _choose_by(spectra[which], rule, m, n, dtype)
    return ranks


def _choose_by(S: NDArray[np.float64], rule: RankRule, m: int, n: int, dtype: torch.dtype) -> NDArray[np.int64]:
    if dtype == torch.float32:
        S = S.astype(np.float32).astype(np.float64)
    count, q = S.shape
    if q == 0:
        return np.full(count, max(1, min(m, n, rule.min_rank)))
    factor = max(16, q) if dtype == torch.float64 else 2
    present = (S > factor * torch.finfo(dtype).eps * S[:, :1]).sum(1)
    wanted = np.maximum(_wanted(S, rule, present), rule.min_rank)
    ranks = np.minimum(np.minimum(wanted, present), min(m, n, rule.max_rank or min(m, n)))
    return np.where(present == 0, max(1, min(m, n, rule.min_rank)), np.maximum(ranks, 1))


def _wanted(S: NDArray[np.float64], rule: RankRule, present: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ranks of the rule's goal, before any clamp."""
    share = rule.energy if rule.energy is not None else rule.nuclear
    if share is not None:
        head = np.cumsum(S * S if rule.energy is not None else S, axis=1)
        least = share * head[:, -1:]
        reached = (head >= least) & (least > 0.0)
        return np.where(reached.any(1), reached.argmax(1) + 1, 0)
    if rule.ratio is not None:
        return np.asarray((S * rule.ratio > S[:, :1]).sum(1))
    if rule.fro_error is not None:
        tails = np.cumsum((S * S)[:, ::-1], axis=1)
        small = tails <= rule.fro_error**2 * tails[:, -1:]
        return np.where(tails[:, -1] > 0.0, S.shape[1] - small.sum(1), 0)
    return present if rule.rank is None else np.full(len(S), rule.rank)
