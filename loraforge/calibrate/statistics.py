"""From the inputs of one module, side by side for all batches, to the sums that a calibrated method solves with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraforge.calibrate.weights import (
    Collecting,
    Layer,
    Rows,
    energy,
    task_weights,
    times,
    weigh,
    weighting_report,
)
from loraforge.errors import LoraforgeError
from loraforge.kernels.covariance import gram_
from loraforge.types import FoldStats, LayerStats, LowRank


@dataclass(slots=True, eq=False)
class Sums:
    """Unweighted sums of one (task, fold): Gram of X~, cross-Gram, Gram of X."""

    gram: Tensor
    cross: Tensor | None
    prior: Tensor | None


@dataclass(slots=True, eq=False)
class _TaskTotals:
    """Per-task sums over all folds that scale the regularisers."""

    gram_norm: float
    cross_norm: float
    variances: Tensor


def layer_basis(layer: Layer) -> Tensor:
    """(m, p) orthonormal basis of the columns of all s_i B_i, p = their numerical rank (at least 1)."""
    stacked = torch.cat([f.B for f in layer.factors if f is not None], dim=1)
    U, S, _ = torch.linalg.svd(stacked, full_matrices=False)
    keep = int((S > S[0] * 1e-13 * max(stacked.shape)).sum()) if float(S[0]) > 0 else 0
    return U[:, : max(keep, 1)]


def collect_stats(
    layer: Layer, rows: Sequence[Rows], how: Collecting, shared: dict[tuple[int, int], Sums] | None
) -> LayerStats:
    """The sums of one module over all its calibration rows.

    Args:
        layer: Factors (and W0 where needed).
        rows: All batches' rows, in a fixed order.
        how: What to collect.
        shared: Grams of the modules that are fed by the same tensor, filled by the first and read by the others; None
            when they cannot be shared (sample weights differ by module).

    Raises:
        LoraforgeError: NaN or Inf among the inputs; a task without a single counted token.
    """
    basis = None if how.full_weight else layer_basis(layer)
    pairs = [_project(basis, f) for f in layer.factors]
    tokens = _count(layer.module, rows, len(pairs))
    if how.only_present:
        rows = [r for r in rows if pairs[r.task] is not None]
    lambdas = task_weights(layer, rows, pairs, how)
    coefficients = [c * lam for c, lam in zip(how.coefficients, lambdas, strict=True)]
    weighted, weighting = weigh(rows, pairs, how)
    d, p = rows[0].X.shape[1], layer.shape[0] if basis is None else basis.shape[1]
    folds = [_empty_fold(d, p, how, rows[0].X.device) for _ in range(how.folds)]
    totals = []
    for task, (pair, coefficient) in enumerate(zip(pairs, coefficients, strict=True)):
        mine = [r for r in weighted if r.task == task]
        totals.append(_collect_task(task, mine, pair, coefficient, folds, how, shared))
    for fold, stats in enumerate(folds):
        stats.share = sum(r.X.shape[0] for r in rows if r.fold == fold) / sum(r.X.shape[0] for r in rows)
    return LayerStats(
        module=layer.module,
        basis=basis,
        pairs=pairs,
        coefficients=coefficients,
        lambdas=lambdas,
        tokens=tokens,
        folds=folds,
        gram_norms=[t.gram_norm for t in totals],
        cross_norms=[t.cross_norm for t in totals],
        variances=[t.variances for t in totals],
        energy=energy(layer, weighted, pairs, coefficients, how),
        base_weight=layer.weight if how.full_weight else None,
        weighting=weighting_report(weighting),
        rank=layer.rank,
    )


def _collect_task(
    task: int,
    rows: Sequence[Rows],
    pair: tuple[Tensor, Tensor] | None,
    coefficient: float,
    folds: Sequence[FoldStats],
    how: Collecting,
    shared: dict[tuple[int, int], Sums] | None,
) -> _TaskTotals:
    """Adds one task's rows to the folds; what scales its regulariser comes back."""
    gram = torch.zeros_like(folds[0].gram)
    cross = torch.zeros_like(gram) if how.exact_cross_norm else None
    for fold, stats in enumerate(folds):
        mine = [r for r in rows if r.fold == fold]
        if not mine:
            continue
        sums = shared.get((task, fold)) if shared is not None else None
        if sums is None:
            sums = _sums(mine, gram.shape[0], how)
        if shared is not None:
            shared[task, fold] = sums
        _add(stats, sums, mine, pair, coefficient)
        gram += sums.gram
        if cross is not None and sums.cross is not None:
            cross += sums.cross
    norm = float(gram.norm())
    return _TaskTotals(norm, norm if cross is None else float(cross.norm()), gram.diagonal().clone())


def _project(basis: Tensor | None, factors: LowRank | None) -> tuple[Tensor, Tensor] | None:
    """(P_i, A_i) with delta_i = basis @ P_i @ A_i."""
    if factors is None:
        return None
    return (factors.B if basis is None else basis.mT @ factors.B, factors.A)


def _count(module: str, rows: Sequence[Rows], tasks: int) -> list[int]:
    """Tokens a task, after the check that they can be used."""
    tokens = [0] * tasks
    for r in rows:
        if not bool(torch.isfinite(r.X.sum() + r.Xm.sum())):  # a NaN or Inf anywhere shows in the sum
            raise LoraforgeError(
                "the inputs of a module have NaN or Inf",
                where=module,
                got=f"task {r.task}",
                hint="check the calibration data and the base model's forward; try --set base_dtype=float32",
            )
        tokens[r.task] += r.X.shape[0]
    if 0 in tokens:
        raise LoraforgeError(
            "a task has no calibration token at a module",
            where=module,
            got=f"task {tokens.index(0)}",
            expected="at least one token that is not padding",
        )
    return tokens


def _empty_fold(d: int, p: int, how: Collecting, device: torch.device) -> FoldStats:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=device)

    search = how.rho is None
    return FoldStats(
        gram=zeros(d, d),
        target=zeros(p, d),
        cross=zeros(d, d) if search or how.full_weight else None,
        prior=zeros(d, d) if search else None,
        target_prior=zeros(p, d) if search else None,
    )


def _sums(rows: Sequence[Rows], d: int, how: Collecting) -> Sums:
    """Gram, cross-Gram and prior Gram of one (task, fold); those that coincide are one tensor."""

    def product(pick_left: str, pick_right: str | None) -> Tensor:
        total = torch.zeros(d, d, dtype=torch.float64, device=rows[0].X.device)
        for r in rows:
            gram_(total, getattr(r, pick_left), None if pick_right is None else getattr(r, pick_right))
        if how.offdiag != 1.0:
            diagonal = total.diagonal().clone()
            total *= how.offdiag
            total.diagonal().copy_(diagonal)
        return total

    gram = product("Xm", None)
    alone = all(r.Xm is r.X for r in rows)
    cross = prior = None
    if alone or how.target_merged:
        cross = gram
    elif how.rho is None or how.full_weight or how.exact_cross_norm or how.offdiag != 1.0:
        cross = product("X", "Xm")
    if how.rho is None:
        prior = gram if alone else product("X", None)
    return Sums(gram, cross, prior)


def _add(
    stats: FoldStats, sums: Sums, rows: Sequence[Rows], pair: tuple[Tensor, Tensor] | None, coefficient: float
) -> None:
    """Adds one (task, fold) to the fold's weighted sums."""
    stats.gram.add_(sums.gram, alpha=coefficient)
    if stats.cross is not None and sums.cross is not None:
        stats.cross.add_(sums.cross, alpha=coefficient)
    if stats.prior is not None and sums.prior is not None:
        stats.prior.add_(sums.prior, alpha=coefficient)
    if pair is None:
        return
    P, A = pair
    if sums.cross is not None:
        features = A @ sums.cross
    else:
        features = torch.zeros_like(A)
        for r in rows:
            features += (times(r.X, A).mT @ r.Xm).to(torch.float64)
    stats.target.add_(P @ features, alpha=coefficient)
    if stats.target_prior is not None and sums.prior is not None:
        stats.target_prior.add_(P @ (A @ sums.prior), alpha=coefficient)
