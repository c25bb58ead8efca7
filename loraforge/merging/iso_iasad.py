"""Iso-IASAD: Iso-C on deltas that were first split in low rank plus sparse by what their inputs weigh.

    Z_i = D_i diag(sqrt(d_i)),   Z_i ~ L_i + S_i,   P_i = (L_i + S_i) diag(1 / sqrt(d_i)),   W = sum_i P_i

d_i is the mean square of each input feature on task i's data (`--stats`, from `loraforge collect-stats`; ones without),
divided by its mean; the split is that of `loraforge.linalg.iasad`. W is flattened after the rank rule, as in Iso-C.

The budget fits full weights: k = int(rank_ratio (1 - sparsity) m n / (m + n)) is far above the rank of an adapter (259
at 768 x 768), so L_i = Z_i, S_i = 0, P_i = D_i and the method is Iso-C exactly; then the sum of factors is returned
without any of the decompositions. `rank_basis=lora` takes k from the adapter's own rank instead; its result is dense.

Of the published code the centring is left out unless asked for: it takes the mean delta off and never adds it back, so
that what is merged sums to zero but for the errors of the splits. `keep=smallest` is the document's wording; `largest`
is the projection that the method claims, with a falling residual.

Cost: that of Iso-C; where it does more, iters + 1 decompositions of m x n an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.linalg.factored import norm, weighted_sum
from loraforge.linalg.iasad import Budget, Split, input_scale, make_budget, process
from loraforge.merging.spectral_params import IasadParams
from loraforge.types import Dense, LayerInputs, Update


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One delta to be split.

    Attributes:
        weight: w_i.
        update: The delta; None where it is 0 (centred, that is minus the mean).
        scale: (n,) sqrt of the normalised input statistic, or None for ones.
        budget: Rank and sparse share of its split.
    """

    weight: float
    update: Update | None
    scale: Tensor | None
    budget: Budget


def merge_layer(layer: LayerInputs, params: IasadParams) -> Update:
    """The sum of the processed deltas of one module, to be flattened after the rank rule.

    Args:
        layer: Factors (or task vectors), weights and input statistics of the module.
        params: How they are split.

    Returns:
        The factors side by side where every split is exact, else the dense (m, n) sum.

    Raises:
        LoraforgeError: An input statistic does not fit, or rank_basis=lora was asked of full checkpoints.
    """
    entries = _entries(layer, params)
    real = [(e.weight, e.update) for e in entries if e.update is not None]
    if not real:
        return weighted_sum(layer.present)
    # A delta minus the mean has the rank of all of them.
    ranks = [
        sum(f.rank for _, f in real) if params.center != "none" or e.update is None else e.update.rank for e in entries
    ]
    exact = [rank <= e.budget.k for rank, e in zip(ranks, entries, strict=True)]
    if all(exact):
        # Deltas minus their mean sum to zero: what the published code is left with where its splits are exact.
        return weighted_sum([(0.0 if params.center == "drop-mean" else w, f) for w, f in real])
    return _sum_of_splits(entries, exact, weighted_sum(real), params)


def describe(shape: tuple[int, int], rank: int | None, params: IasadParams) -> dict[str, int | float | bool]:
    """What the split of one delta holds, for a report.

    Args:
        shape: (m, n).
        rank: The adapter's rank; None for a full checkpoint.
        params: The method's parameters.

    Returns:
        k, kept (share of the entries in the sparse part), nnz (their number), exact (the split changes nothing).
    """
    m, n = shape
    budget = make_budget(m, n, params.sparsity, params.rank_ratio, rank if params.rank_basis == "lora" else None)
    rows, entries = (m, n) if params.prune_level == "row" else (1, m * n)
    cut = budget.cut(entries)
    nnz = rows * (cut if params.keep == "smallest" else entries - cut)
    exact = (min(m, n) if rank is None else rank) <= budget.k
    return {"k": budget.k, "kept": nnz / (m * n), "nnz": nnz, "exact": exact}


def _entries(layer: LayerInputs, params: IasadParams) -> list[Entry]:
    """What is split: every delta but those of 0, which count only where a mean is taken off.

    Raises:
        LoraforgeError: An input statistic does not fit, or rank_basis=lora was asked of full checkpoints.
    """
    lora = params.rank_basis == "lora"
    if lora and any(isinstance(f, Dense) for f in layer.factors):
        raise LoraforgeError(
            "A full checkpoint has no adapter rank to take the low-rank part from",
            where="rank_basis",
            got="lora",
            expected="budget",
        )
    entries = []
    stats = layer.stats or [None] * len(layer.factors)
    for weight, given, d in zip(layer.weights, layer.factors, stats, strict=True):
        update = given if given is not None and weight * norm(given) != 0.0 else None
        counts = params.center != "none" and not (given is None and layer.only_present)
        if update is None and not counts:
            continue
        rank = (update.rank if update is not None else 0) if lora else None
        budget = make_budget(*layer.shape, params.sparsity, params.rank_ratio, rank)
        entries.append(Entry(weight, update, input_scale(d, layer.shape[1], layer.module), budget))
    return entries


def _sum_of_splits(entries: list[Entry], exact: list[bool], total: Update, params: IasadParams) -> Dense:
    """sum_i P_i as a matrix; one delta is dense at a time."""
    whole = total.delta(torch.float64)
    centre = whole / len(entries) if params.center != "none" else torch.zeros_like(whole)
    result = whole.clone() if params.center == "mean" else torch.zeros_like(whole)
    for entry, unchanged in zip(entries, exact, strict=True):
        delta = -centre if entry.update is None else entry.update.delta(torch.float64) * entry.weight - centre
        how = Split(
            budget=entry.budget,
            iters=params.iters,
            level=cast(Literal["row", "element"], params.prune_level),
            keep=cast(Literal["largest", "smallest"], params.keep),
            final_svd=params.final_svd == "on",
        )
        scale = None if entry.scale is None else entry.scale.to(delta.device)
        result += delta if unchanged else process(delta, scale, how)
    return Dense(result.to(total.delta().dtype if isinstance(total, Dense) else total.B.dtype))
