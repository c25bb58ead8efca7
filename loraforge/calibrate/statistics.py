"""From the inputs of one module, side by side for all batches, to the sums that a calibrated method solves with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraforge.calibrate.clock import Clock
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

GROUP = 4096  # rows of a product; what it is rounded to does not grow with the number of tokens

# A_i, and where its rows stand in the features of all adapters.
_Block = tuple[Tensor, slice]


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
    Q, triangle = torch.linalg.qr(stacked)  # the decomposition of the small triangle costs nothing that grows with m
    U, S, _ = torch.linalg.svd(triangle, full_matrices=False)
    U = Q @ U
    keep = int((S > S[0] * 1e-13 * max(stacked.shape)).sum()) if float(S[0]) > 0 else 0
    return U[:, : max(keep, 1)]


def collect_stats(
    layer: Layer,
    rows: Sequence[Rows],
    how: Collecting,
    shared: dict[tuple[int, int], Sums] | None,
    clock: Clock | None = None,
) -> LayerStats:
    """The sums of one module over all its calibration rows.

    Args:
        layer: Factors (and W0 where needed).
        rows: All batches' rows, in a fixed order.
        how: What to collect.
        shared: Grams of the modules that are fed by the same tensor, filled by the first and read by the others; None
            when they cannot be shared (sample weights differ by module).
        clock: Takes the time of its parts: weights, grams, targets.

    Raises:
        LoraforgeError: NaN or Inf among the inputs; a task without a single counted token.
    """
    clock = clock or Clock()
    with clock.part("weights"):
        basis = None if how.full_weight else layer_basis(layer)
        pairs = [_project(basis, f) for f in layer.factors]
        tokens = _count(layer.module, rows, len(pairs))
        if how.only_present:
            rows = [r for r in rows if pairs[r.task] is not None]
        lambdas = task_weights(layer, rows, pairs, how)
        coefficients = [c * lam for c, lam in zip(how.coefficients, lambdas, strict=True)]
        weighted, weighting = weigh(rows, pairs, how)
        total_energy = energy(layer, weighted, pairs, coefficients, how)
    folds = _empty_folds(rows[0].X, pairs, how)
    totals, first = [], 0
    with clock.part("targets"):
        for task, (pair, coefficient) in enumerate(zip(pairs, coefficients, strict=True)):
            mine = [r for r in weighted if r.task == task]
            block = None
            if pair is not None:
                block = (pair[1], slice(first, first + pair[1].shape[0]))
                first += pair[1].shape[0]
            totals.append(_collect_task(task, mine, block, coefficient, folds, how, shared, clock))
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
        energy=total_energy,
        base_weight=layer.weight if how.full_weight else None,
        weighting=weighting_report(weighting),
        rank=layer.rank,
    )


def _collect_task(
    task: int,
    rows: Sequence[Rows],
    block: _Block | None,
    coefficient: float,
    folds: Sequence[FoldStats],
    how: Collecting,
    shared: dict[tuple[int, int], Sums] | None,
    clock: Clock,
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
            with clock.part("grams"):
                sums = _sums(mine, gram.shape[0], how, clock)
        if shared is not None:
            shared[task, fold] = sums
        _add(stats, sums, mine, block, coefficient)
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
    # A NaN or Inf anywhere shows in the sum; float32, since a sum of float16 rows may leave its range.
    totals = [t.sum(dtype=_wide(t)).to(torch.float64) for r in rows for t in ((r.X,) if r.Xm is r.X else (r.X, r.Xm))]
    bad = iter((~torch.isfinite(torch.stack(totals))).tolist())
    for r in rows:
        if any([next(bad) for _ in range(1 if r.Xm is r.X else 2)]):
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


def _wide(t: Tensor) -> torch.dtype:
    """The dtype that sums over rows are taken in: at least float32."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _empty_folds(X: Tensor, pairs: Sequence[tuple[Tensor, Tensor] | None], how: Collecting) -> list[FoldStats]:
    """Sums of nothing, one entry a fold."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=X.device)

    d, search = X.shape[1], how.rho is None
    outputs = torch.cat([pair[0] for pair in pairs if pair is not None], dim=1)
    R = outputs.shape[1]
    return [
        FoldStats(
            gram=zeros(d, d),
            outputs=outputs,
            features=zeros(R, d),
            cross=zeros(d, d) if search or how.full_weight else None,
            prior=zeros(d, d) if search else None,
            features_prior=zeros(R, d) if search else None,
        )
        for _ in range(how.folds)
    ]


def _sums(rows: Sequence[Rows], d: int, how: Collecting, clock: Clock) -> Sums:
    """Gram, cross-Gram and prior Gram of one (task, fold); those that coincide are one tensor."""
    alone = all(r.Xm is r.X for r in rows)
    parts = [(_stack([r.X for r in part]), None if alone else _stack([r.Xm for r in part])) for part in _groups(rows)]

    def product(pairs: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        total = torch.zeros(d, d, dtype=torch.float64, device=rows[0].X.device)
        for left, right in pairs:
            gram_(total, left, right)
            clock.did("grams", left.shape[0] * d * (d + 1.0 if right is None else 2.0 * d))
        if how.offdiag != 1.0:
            diagonal = total.diagonal().clone()
            total *= how.offdiag
            total.diagonal().copy_(diagonal)
        return total

    gram = product([(X if Xm is None else Xm, None) for X, Xm in parts])
    cross = prior = None
    if alone or how.target_merged:
        cross = gram
    elif how.rho is None or how.full_weight or how.exact_cross_norm or how.offdiag != 1.0:
        cross = product(parts)
    if how.rho is None:
        prior = gram if alone else product([(X, None) for X, _ in parts])
    return Sums(gram, cross, prior)


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """All rows; no copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _groups(rows: Sequence[Rows]) -> list[list[Rows]]:
    """The rows in order, small batches side by side: a product is added to a (d, d) sum once a group."""
    groups: list[list[Rows]] = []
    size = 0
    for r in rows:
        if not groups or size + r.X.shape[0] > GROUP:
            groups.append([])
            size = 0
        groups[-1].append(r)
        size += r.X.shape[0]
    return groups


def _add(stats: FoldStats, sums: Sums, rows: Sequence[Rows], block: _Block | None, coefficient: float) -> None:
    """Adds one (task, fold) to the fold's weighted sums."""
    stats.gram.add_(sums.gram, alpha=coefficient)
    if stats.cross is not None and sums.cross is not None:
        stats.cross.add_(sums.cross, alpha=coefficient)
    if stats.prior is not None and sums.prior is not None:
        stats.prior.add_(sums.prior, alpha=coefficient)
    if block is None:
        return
    A, where = block
    if sums.cross is not None:
        stats.features[where].add_(A @ sums.cross, alpha=coefficient)
    else:
        for r in rows:
            product = times(r.X.to(_wide(r.X)), A).mT @ r.Xm.to(_wide(r.Xm))
            stats.features[where].add_(product, alpha=coefficient)
    if stats.features_prior is not None and sums.prior is not None:
        stats.features_prior[where].add_(A @ sums.prior, alpha=coefficient)
