"""From the inputs of one module, side by side for all batches, to the sums that a calibrated method solves with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.kernels.covariance import gram_
from loraforge.kernels.dcs import DcsWeights, dcs_variance, dcs_weights
from loraforge.types import FoldStats, LayerStats, LowRank


@dataclass(frozen=True, slots=True)
class Weighting:
    """Sample weights by the variance of the adapters' outputs (DCS).

    Attributes:
        sigma: Factor on the MAD.
        min_ess: Floor of the effective sample size as a share of the tokens.
        kernel: "gaussian" or "excess".
        mad_consistent: Multiply the MAD by 1.4826.
    """

    sigma: float
    min_ess: float
    kernel: str
    mad_consistent: bool


@dataclass(frozen=True, slots=True)
class Collecting:
    """What to collect.

    Attributes:
        coefficients: c_i, one an adapter.
        folds: Number of folds.
        lambda_weight: "full", "delta" or "none".
        rho: Share of X mixed into X~; None keeps the parts apart, for a search.
        full_weight: Collect for the full weight W0 + delta (the cross-Gram and W0).
        target_merged: The target is W_i on the merged inputs (X := X~ in the cross terms).
        exact_cross_norm: ||X_i^T X~_i||_F is wanted.
        offdiag: Factor on off-diagonal entries of the Grams.
        weighting: Sample weights, or None.
    """

    coefficients: Sequence[float]
    folds: int
    lambda_weight: str
    rho: float | None
    full_weight: bool
    target_merged: bool
    exact_cross_norm: bool
    offdiag: float
    weighting: Weighting | None


@dataclass(slots=True, eq=False)
class Layer:
    """One module's fixed facts.

    Attributes:
        module: Dotted name.
        factors: One entry an adapter, None where it lacks the module; scaling folded in, float64.
        weight: (m, d) W0 in float64 if the full weight or its norm is needed, else None.
    """

    module: str
    factors: Sequence[LowRank | None]
    weight: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d)."""
        return next(f.shape for f in self.factors if f is not None)

    @property
    def rank(self) -> int:
        """R, the sum of the ranks."""
        return sum(f.rank for f in self.factors if f is not None)


@dataclass(slots=True, eq=False)
class Rows:
    """The counted tokens of one batch at one module.

    Attributes:
        task: Index of the task.
        fold: Index of the fold.
        X: (t, d) inputs under the task model.
        Xm: (t, d) inputs under the merged model (the same tensor as X in a pass with the task stream alone).
        out_sq: ||X W_i^T||_F^2 of the task model's outputs, bias taken off; 0 when not asked for.
    """

    task: int
    fold: int
    X: Tensor
    Xm: Tensor
    out_sq: float


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
    lambdas = _task_weights(layer, rows, pairs, how)
    coefficients = [c * lam for c, lam in zip(how.coefficients, lambdas, strict=True)]
    weighted, weighting = _weigh(rows, pairs, how.weighting)
    d, p = rows[0].X.shape[1], layer.shape[0] if basis is None else basis.shape[1]
    folds = [_empty_fold(d, p, how, rows[0].X.device) for _ in range(how.folds)]
    totals = []
    for task, (pair, coefficient) in enumerate(zip(pairs, coefficients, strict=True)):
        total = Sums(torch.zeros_like(folds[0].gram), torch.zeros_like(folds[0].gram), None)
        for fold, stats in enumerate(folds):
            mine = [r for r in weighted if r.task == task and r.fold == fold]
            if not mine:
                continue
            sums = shared.get((task, fold)) if shared is not None else None
            if sums is None:
                sums = _sums(mine, d, how)
            if shared is not None:
                shared[task, fold] = sums
            _add(stats, sums, mine, pair, coefficient)
            total.gram += sums.gram
            if how.exact_cross_norm and sums.cross is not None and total.cross is not None:
                total.cross += sums.cross
        norm = float(total.gram.norm())
        cross = float(total.cross.norm()) if how.exact_cross_norm and total.cross is not None else norm
        totals.append(_TaskTotals(norm, cross, total.gram.diagonal().clone()))
    for fold, stats in enumerate(folds):
        stats.share = sum(r.X.shape[0] for r in rows if r.fold == fold) / sum(tokens)
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
        energy=_energy(layer, weighted, pairs, coefficients, how),
        base_weight=layer.weight if how.full_weight else None,
        weighting=_weighting_report(weighting),
        rank=layer.rank,
    )


def _weighting_report(weights: DcsWeights | None) -> dict[str, float | None] | None:
    """Numbers of the sample weighting; an infinite tau (equal variances) is None."""
    if weights is None:
        return None
    return {"sigma": weights.sigma, "tau": weights.tau if weights.tau < float("inf") else None, "ess": weights.ess}


def _project(basis: Tensor | None, factors: LowRank | None) -> tuple[Tensor, Tensor] | None:
    """(P_i, A_i) with delta_i = basis @ P_i @ A_i."""
    if factors is None:
        return None
    return (factors.B if basis is None else basis.mT @ factors.B, factors.A)


def _count(module: str, rows: Sequence[Rows], tasks: int) -> list[int]:
    """Tokens a task, after the check that they can be used."""
    tokens = [0] * tasks
    for r in rows:
        if not bool(torch.isfinite(r.X).all() and torch.isfinite(r.Xm).all()):
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


def _task_weights(
    layer: Layer, rows: Sequence[Rows], pairs: Sequence[tuple[Tensor, Tensor] | None], how: Collecting
) -> list[float]:
    """lambda_i = ||W_i||_F^2 / ||X_i W_i^T||_F^2 of the full weight or of the delta; 1 for "none".

    An adapter that lacks the module has no delta to weigh: with "delta" it takes the mean of the others.
    """
    if how.lambda_weight == "none":
        return [1.0] * len(pairs)
    values: list[float | None] = []
    for task, (pair, factors) in enumerate(zip(pairs, layer.factors, strict=True)):
        if how.lambda_weight == "full":
            assert layer.weight is not None
            size = _full_norm_squared(layer.weight, factors)
            output = sum(r.out_sq for r in rows if r.task == task)
        elif pair is None:
            values.append(None)
            continue
        else:
            P, A = pair
            size = float(((P.mT @ P) * (A @ A.mT)).sum())
            K = P.mT @ P
            output = sum(float(dcs_variance(_times(r.X, A), K).sum()) for r in rows if r.task == task)
        values.append(size / output if output > 0.0 and size > 0.0 else None)
    known = [v for v in values if v is not None]
    mean = sum(known) / len(known) if known else 1.0
    return [mean if v is None else v for v in values]


def _full_norm_squared(weight: Tensor, factors: LowRank | None) -> float:
    """||W0 + B A||_F^2 from the factors: ||W0||^2 + 2 <B^T W0, A> + <B^T B, A A^T>."""
    size = float(weight.square().sum())
    if factors is not None:
        B, A = factors.B, factors.A
        size += 2.0 * float(((B.mT @ weight) * A).sum()) + float(((B.mT @ B) * (A @ A.mT)).sum())
    return size


def _weigh(
    rows: Sequence[Rows], pairs: Sequence[tuple[Tensor, Tensor] | None], weighting: Weighting | None
) -> tuple[list[Rows], DcsWeights | None]:
    """Rows scaled by the square root of their sample weights (DCS), so that every Gram of them is a weighted one.

    V = y^T M y with y = A_cat x and M_ij = delta_ij K_ii / N - K_ij / N^2, K_ij = P_i^T P_j: W0 cancels.
    """
    if weighting is None:
        return list(rows), None
    count = len(pairs)
    present = [pair for pair in pairs if pair is not None]
    A_cat = torch.cat([A for _, A in present])
    P_cat = torch.cat([P for P, _ in present], dim=1)
    M = -(P_cat.mT @ P_cat) / count**2
    start = 0
    for P, _ in present:
        block = slice(start, start + P.shape[1])
        M[block, block] += P.mT @ P / count
        start += P.shape[1]
    variance = torch.cat([dcs_variance(_times(r.X, A_cat), M) for r in rows])
    result = dcs_weights(variance, weighting.sigma, weighting.min_ess, weighting.kernel, weighting.mad_consistent)
    scaled, start = [], 0
    for r in rows:
        root = result.w[start : start + r.X.shape[0]].sqrt().to(r.X.dtype)[:, None]
        start += r.X.shape[0]
        X = r.X * root
        scaled.append(Rows(r.task, r.fold, X, X if r.Xm is r.X else r.Xm * root, r.out_sq))
    return scaled, result


def _energy(
    layer: Layer,
    rows: Sequence[Rows],
    pairs: Sequence[tuple[Tensor, Tensor] | None],
    coefficients: Sequence[float],
    how: Collecting,
) -> float:
    """sum_i c_i lambda_i ||X_i D_i^T||^2; with the full weight ||X_i D_i^T + (X_i - X~_i) W0^T||^2."""
    total = 0.0
    for r in rows:
        pair = pairs[r.task]
        if how.full_weight and layer.weight is not None and r.Xm is not r.X:
            output = (r.X - r.Xm) @ layer.weight.to(r.X.dtype).mT
            if pair is not None:
                output += _times(r.X, pair[1]) @ pair[0].to(r.X.dtype).mT
            energy = float(output.square().sum(dtype=torch.float64))
        elif pair is not None:
            features = r.Xm if how.target_merged else r.X
            energy = float(dcs_variance(_times(features, pair[1]), pair[0].mT @ pair[0]).sum())
        else:
            energy = 0.0
        total += coefficients[r.task] * energy
    return total


def _times(X: Tensor, A: Tensor) -> Tensor:
    """(t, r): X A^T in the dtype of X."""
    return X @ A.to(X.dtype).mT


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
            features += (_times(r.X, A).mT @ r.Xm).to(torch.float64)
    stats.target.add_(P @ features, alpha=coefficient)
    if stats.target_prior is not None and sums.prior is not None:
        stats.target_prior.add_(P @ (A @ sums.prior), alpha=coefficient)
