"""Weights of tasks (lambda) and of samples (DCS), from the rows of one module; and what those rows are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loraforge.kernels.dcs import DcsWeights, dcs_variance, dcs_weights
from loraforge.types import LowRank


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
    kernel: Literal["gaussian", "excess"]
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
        only_present: A task whose adapter lacks the module has no say there (otherwise its delta is 0).
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
    only_present: bool = False


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
        out_sq: ||X W_i^T||_F^2 of the task model's outputs, bias taken off, float64 on the device; 0 if not asked for.
    """

    task: int
    fold: int
    X: Tensor
    Xm: Tensor
    out_sq: Tensor | float


def task_weights(
    layer: Layer, rows: Sequence[Rows], pairs: Sequence[tuple[Tensor, Tensor] | None], how: Collecting
) -> list[float]:
    """lambda_i = ||W_i||_F^2 / ||X_i W_i^T||_F^2 of the full weight or of the delta; 1 for "none".

    An adapter that lacks the module has no delta to weigh: with "delta" it takes the mean of the others.
    """
    if how.lambda_weight == "none":
        return [1.0] * len(pairs)
    sizes: list[Tensor | None] = []
    outputs: list[Tensor] = []
    for task, (pair, factors) in enumerate(zip(pairs, layer.factors, strict=True)):
        mine = [r for r in rows if r.task == task]
        output = torch.zeros((), dtype=torch.float64, device=rows[0].X.device)
        if how.lambda_weight == "full":
            assert layer.weight is not None
            sizes.append(_full_norm_squared(layer.weight, factors))
            for r in mine:
                output += r.out_sq
        elif pair is None:
            sizes.append(None)
        else:
            P, A = pair
            K = P.mT @ P
            sizes.append((K * (A @ A.mT)).sum())
            for r in mine:
                output += dcs_variance(times(r.X, A), K).sum()
        outputs.append(output)
    # One read of the device for all of them.
    numbers = torch.stack([*(output.new_zeros(()) if s is None else s for s in sizes), *outputs]).tolist()
    values = [
        size / output if known is not None and output > 0.0 and size > 0.0 else None
        for known, size, output in zip(sizes, numbers[: len(sizes)], numbers[len(sizes) :], strict=True)
    ]
    present = [v for v in values if v is not None]
    mean = sum(present) / len(present) if present else 1.0
    return [mean if v is None else v for v in values]


def _full_norm_squared(weight: Tensor, factors: LowRank | None) -> Tensor:
    """||W0 + B A||_F^2 from the factors: ||W0||^2 + 2 <B^T W0, A> + <B^T B, A A^T>."""
    size = weight.square().sum()
    if factors is not None:
        B, A = factors.B, factors.A
        size = size + 2.0 * ((B.mT @ weight) * A).sum() + ((B.mT @ B) * (A @ A.mT)).sum()
    return size


def weigh(
    rows: Sequence[Rows], pairs: Sequence[tuple[Tensor, Tensor] | None], how: Collecting
) -> tuple[list[Rows], DcsWeights | None]:
    """Rows scaled by the square root of their sample weights (DCS), so that every Gram of them is a weighted one.

    V = y^T M y with y = A_cat x and M_ij = delta_ij K_ii / N - K_ij / N^2, K_ij = P_i^T P_j: W0 cancels.
    """
    weighting = how.weighting
    if weighting is None:
        return list(rows), None
    present = [pair for pair in pairs if pair is not None]
    count = len(present) if how.only_present else len(pairs)
    A_cat = torch.cat([A for _, A in present])
    P_cat = torch.cat([P for P, _ in present], dim=1)
    M = -(P_cat.mT @ P_cat) / count**2
    start = 0
    for P, _ in present:
        block = slice(start, start + P.shape[1])
        M[block, block] += P.mT @ P / count
        start += P.shape[1]
    variance = torch.cat([dcs_variance(times(r.X, A_cat), M) for r in rows])
    result = dcs_weights(variance, weighting.sigma, weighting.min_ess, weighting.kernel, weighting.mad_consistent)
    scaled, start = [], 0
    for r in rows:
        root = result.w[start : start + r.X.shape[0]].sqrt().to(r.X.dtype)[:, None]
        start += r.X.shape[0]
        X = r.X * root
        scaled.append(Rows(r.task, r.fold, X, X if r.Xm is r.X else r.Xm * root, r.out_sq))
    return scaled, result


def weighting_report(weights: DcsWeights | None) -> dict[str, float | None] | None:
    """Numbers of the sample weighting; an infinite tau (equal variances) is None."""
    if weights is None:
        return None
    return {"sigma": weights.sigma, "tau": weights.tau if weights.tau < float("inf") else None, "ess": weights.ess}


def energy(
    layer: Layer,
    rows: Sequence[Rows],
    pairs: Sequence[tuple[Tensor, Tensor] | None],
    coefficients: Sequence[float],
    how: Collecting,
) -> float:
    """sum_i c_i lambda_i ||X_i D_i^T||^2; with the full weight ||X_i D_i^T + (X_i - X~_i) W0^T||^2."""
    total = torch.zeros((), dtype=torch.float64, device=rows[0].X.device)
    for r in rows:
        pair = pairs[r.task]
        if how.full_weight and layer.weight is not None and r.Xm is not r.X and not how.target_merged:
            output = _apart(r, layer.weight)
            if pair is not None:
                output += times(r.X, pair[1]) @ pair[0].to(output.dtype).mT
            energy = output.square().sum(dtype=torch.float64)
        elif pair is not None:
            features = r.Xm if how.target_merged else r.X
            energy = dcs_variance(times(features, pair[1]), pair[0].mT @ pair[0]).sum()
        else:
            continue
        total += coefficients[r.task] * energy
    return float(total)


def _apart(r: Rows, weight: Tensor) -> Tensor:
    """(t, m) float32 or float64: (X - X~) W0^T.

    16-bit rows are those of a 16-bit model on CUDA: the difference is rounded once more (2^-9 of it) and multiplied on
    the tensor cores; in float32 it would cost more than a forward of the module.
    """
    if r.X.dtype in (torch.float32, torch.float64):
        return (r.X - r.Xm) @ weight.to(r.X.dtype).mT
    away = (r.X.float() - r.Xm.float()).to(r.X.dtype)
    return torch.mm(away, weight.to(away.dtype).mT, out_dtype=torch.float32)


def times(X: Tensor, A: Tensor) -> Tensor:
    """(t, r): X A^T in the dtype of X, in float32 for 16-bit rows: A is no matrix of 16 bits."""
    wide = X if X.dtype in (torch.float32, torch.float64) else X.float()
    return wide @ A.to(wide.dtype).mT
