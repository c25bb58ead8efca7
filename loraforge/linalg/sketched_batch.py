"""Randomized SVD of many updates on a GPU: modules of one shape in one sequence of products, whatever their number.

The draws are those of `randomized.randomized_svd`, keyed by (seed, module) and made on the CPU, and so are the rules
and the widening. The launches and waits of a batch do not depend on its number of modules; those whose rank was not
reached go on with twice the columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loraforge.linalg.bases import column_signs, widened
from loraforge.linalg.factored import Truncated, batches, truncate_many
from loraforge.linalg.pool import pool_map
from loraforge.linalg.randomized import (
    Approximation,
    Sketch,
    first_width,
    gaussian,
    project,
    randomized_svd,
    range_basis,
    refuse_unbounded,
    refuse_unseen_shares,
    seen_rank,
    wants_exact,
)
from loraforge.linalg.rank import RankRule
from loraforge.types import LowRank

BATCH_BYTES = 256 * 2**20  # float64 factors; a sketch holds as much again


def randomized_svd_many(
    updates: Sequence[LowRank], rule: RankRule, sketch: Sketch, words: Sequence[str]
) -> list[Approximation]:
    """`randomized_svd` of every update; on the CPU module by module over all threads.

    Args:
        updates: One update a module, of any shapes.
        rule: The rank rule.
        sketch: How to sketch.
        words: What the draws are keyed by beside the seed, one a module.

    Returns:
        One result a module, in order. float32 factors give the same as on the CPU to their rounding.

    Raises:
        UsageError: As `randomized_svd`.
        LoraforgeError: A factor holds NaN or Inf; the module is named.
    """
    if any(update.B.device.type != "cuda" for update in updates):
        return pool_map(lambda i: randomized_svd(updates[i], rule, sketch, words[i]), range(len(updates)))
    return sketch_batches(updates, rule, sketch, words)


def sketch_batches(
    updates: Sequence[LowRank], rule: RankRule, sketch: Sketch, words: Sequence[str]
) -> list[Approximation]:
    """`randomized_svd_many` in batches, on any device."""
    refuse_unseen_shares(rule, sketch)
    done: dict[int, Truncated] = {}
    exact: list[int] = []
    for batch in batches(updates, BATCH_BYTES):
        B, A = widened([updates[i].B for i in batch]), widened([updates[i].A for i in batch])
        B *= torch.tensor([updates[i].scaling for i in batch], dtype=torch.float64).to(B.device)[:, None, None]
        sizes: list[float] = ((B.mT @ B) * (A @ A.mT)).sum((1, 2)).tolist()
        rest = []
        for place, index in enumerate(batch):
            refuse_unbounded(sizes[place], updates[index], words[index])
            if wants_exact(updates[index], rule, sketch, sizes[place]):
                exact.append(index)
            else:
                rest.append(place)
        width = first_width(rule, sketch)
        while rest:
            chosen = [updates[batch[place]] for place in rest]
            b, a = (B, A) if len(rest) == len(batch) else (B[rest], A[rest])
            cuts = _sketch(b, a, chosen, [words[batch[p]] for p in rest], [sizes[p] for p in rest], rule, sketch, width)
            done.update((batch[place], cut) for place, cut in zip(rest, cuts, strict=True) if cut is not None)
            rest = [place for place, cut in zip(rest, cuts, strict=True) if cut is None]
            width *= 2
    done.update(zip(exact, truncate_many([updates[i] for i in exact], rule), strict=True))
    whole = set(exact)
    return [
        Approximation(done[i].factors.B, done[i].factors.A, done[i].factors.scaling, done[i], i in whole)
        for i in range(len(updates))
    ]


def _sketch(
    B: Tensor,
    A: Tensor,
    updates: Sequence[LowRank],
    words: Sequence[str],
    sizes: Sequence[float],
    rule: RankRule,
    sketch: Sketch,
    width: int,
) -> list[Truncated | None]:
    """One sketch of `width` columns of the updates B A, and the cuts of those whose rank it reaches."""
    first = updates[0]
    n, limit, gram = first.shape[1], min(first.rank, *first.shape), first.B.dtype != torch.float64
    omega = torch.stack([gaussian(n, min(width, limit), sketch.seed, word) for word in words]).to(B.device)
    Q = range_basis(B, A, omega, sketch.power_iterations, gram=gram)
    U, S, Vh = project(B, A, Q, gram=gram)
    spectra = S.cpu()
    found = [
        seen_rank(spectrum, size, update, rule, sketch, limit)
        for spectrum, size, update in zip(spectra, sizes, updates, strict=True)
    ]
    top = max((k for k, _ in found if k is not None), default=0)
    half, dtype = S[:, :top].sqrt(), torch.float32 if gram else torch.float64
    left = (U[:, :, :top] * half[:, None, :]).to(dtype)
    sign = column_signs(left)
    right = ((half * sign)[:, :, None] * Vh[:, :top]).to(dtype)
    left *= sign[:, None, :]
    cuts: list[Truncated | None] = []
    for place, (spectrum, size, (k, unseen)) in enumerate(zip(spectra, sizes, found, strict=True)):
        if k is None:
            cuts.append(None)
            continue
        lost = unseen + float(spectrum[k:].square().sum())
        pair = LowRank(left[place, :, :k].contiguous(), right[place, :k])
        cuts.append(Truncated(pair, spectrum, 1.0 - lost / size, math.sqrt(lost), k))
    return cuts
