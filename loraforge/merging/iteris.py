"""IterIS, IterIS++, RegMean and RegMean++ of one module, solved in factor space.

    min_W  sum_i c_i lambda_i || X_i W_i^T - X~_i W^T ||_F^2        (rows are tokens; y = x W^T)
    T2 = sum_i c_i lambda_i (G_i + diag a2_i),   T1 = sum_i c_i lambda_i D_i (C_i + diag a1_i),   W = T1 T2^{-1}
    G_i = X~_i^T X~_i,  C_i = X_i^T X~_i,  a1_i = alpha_1 ||C_i||_F,  a2_i = alpha_2 ||G_i||_F  (or the CAMR diagonal)

In delta mode every D_i lies in the span of the columns of all B_i, so the solution is a LoRA of rank <= sum r_i: only a
(p, d) state is solved for, never an (m, d) matrix. In full mode (`with_pretrain_matrix=1`) W_i = W0 + delta_i and the
delta W - W0 has the extra term W0 (C_i - G_i): it is dense, and is cut to rank R in the metric of the outputs.

`alpha=auto` and `rho=auto` take the pair with the least held-out objective tr(S G S^T) - 2 tr(S T^T) over folds.
Cost: d^3 / 3 + 2 d^2 p a solve, about a dozen solves a module for a search.

Sources: IterIS (Chen et al., CVPR 2025, arXiv 2411.15231), the IterIS++ document (CAMR), RegMean (arXiv 2212.09849).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loraforge.linalg.metric import left_subspace
from loraforge.linalg.search import descend_grid
from loraforge.linalg.spd import Factor, factor_spd
from loraforge.merging.iteris_params import IterisParams
from loraforge.types import FoldStats, LayerSolution, LayerStats

Choices = tuple[float | None, float | None]  # (alpha, rho); None where the parameter is a fixed number

ALPHAS: tuple[float | None, ...] = tuple(10.0**e for e in range(-6, 2))  # 1e-6 .. 10
RHOS: tuple[float | None, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
SKETCH = 32  # rows that a search looks at
_START = (4, 0)  # alpha 1e-2, rho 0


def solve_layer(stats: LayerStats, params: IterisParams, choices: Choices | None = None) -> LayerSolution:
    """The solution of one module.

    Args:
        stats: Sums over the calibration tokens.
        params: The method's parameters.
        choices: (alpha, rho) of an earlier pass, taken as they are instead of being searched again.

    Raises:
        LoraforgeError: NaN or Inf in the Gram; names the module.
    """
    report: dict[str, object] = {}
    if choices is None:
        choices = _choose(stats, params, report) if params.searches else (None, None)
    total = _sum_folds(stats.folds)
    state, factor = _solve(stats, total, params, choices)
    if not any(stats.gram_norms):
        state = _mean_of_adapters(stats)  # the limit of a vanishing input
    left = None
    if stats.base_weight is not None:
        # The full-weight solution is dense: its best update of rank R in the metric of the outputs is what counts.
        left = left_subspace(state, factor.L)
        U = left[0][:, : stats.rank]
        state = U @ (U.mT @ state)
    report["alpha"] = choices[0] if params.alpha_1 == "auto" else params.alpha_1
    report["rho"] = choices[1] if params.reg_ceof == "auto" else params.reg_ceof
    report |= {"solver": factor.info.solver, "jitter": factor.info.jitter, "condition": factor.info.condition}
    report["residual_before"] = _residual(stats, total, _mean_of_adapters(stats))
    report["residual_after"] = _residual(stats, total, state)
    return LayerSolution(state, factor.L, left, choices, report)


def _sum_folds(folds: Sequence[FoldStats], leave_out: int | None = None) -> FoldStats:
    """The sum of all folds but one."""
    kept = [f for k, f in enumerate(folds) if k != leave_out]

    def add(parts: list[Tensor | None]) -> Tensor | None:
        present = [p for p in parts if p is not None]
        return functools.reduce(torch.add, present) if present else None

    gram, target = add([f.gram for f in kept]), add([f.target for f in kept])
    assert gram is not None and target is not None  # every fold has both
    return FoldStats(
        gram,
        target,
        add([f.cross for f in kept]),
        add([f.prior for f in kept]),
        add([f.target_prior for f in kept]),
        sum(f.share for f in kept),
    )


def _mix(fold: FoldStats, rho: float | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gram, target and cross-Gram for X~ <- (1 - rho) X~ + rho X; as collected where rho was fixed (None)."""
    if rho is None or rho == 0.0:
        return fold.gram, fold.target, fold.cross
    assert fold.cross is not None and fold.prior is not None and fold.target_prior is not None
    keep = 1.0 - rho
    gram = keep**2 * fold.gram + keep * rho * (fold.cross + fold.cross.mT) + rho**2 * fold.prior
    return gram, keep * fold.target + rho * fold.target_prior, keep * fold.cross + rho * fold.prior


def _solve(stats: LayerStats, fold: FoldStats, params: IterisParams, choices: Choices) -> tuple[Tensor, Factor]:
    """S = T1 T2^{-1} (p, d) on the sums of some folds, and the factor of T2."""
    gram, target, cross = _mix(fold, choices[1])
    diagonals = [camr_diagonals(stats, params, i, choices[0], fold.share) for i in range(len(stats.pairs))]
    T1 = target + _prior_target(stats, [a1 for a1, _ in diagonals])
    shift = _weighted_sum(stats, [a2 for _, a2 in diagonals])
    if stats.base_weight is not None and cross is not None:
        T1 += stats.base_weight @ (cross - gram)
        T1 += stats.base_weight * (_weighted_sum(stats, [a1 for a1, _ in diagonals]) - shift)
    T2 = gram.clone()
    T2.diagonal().add_(shift)
    factor = factor_spd(T2, stats.module)
    state = factor.solve_right(T1)
    return state, factor


def _weighted_sum(stats: LayerStats, diagonals: Sequence[Tensor]) -> Tensor:
    """(d,) sum_i c_i lambda_i a_i."""
    return torch.stack([c * a for c, a in zip(stats.coefficients, diagonals, strict=True)]).sum(0)


def _prior_target(stats: LayerStats, diagonals: Sequence[Tensor]) -> Tensor:
    """(p, d) sum_i c_i lambda_i D_i diag(a_i)."""
    total = torch.zeros_like(stats.folds[0].target)
    for pair, c, a in zip(stats.pairs, stats.coefficients, diagonals, strict=True):
        if pair is not None:
            total += c * (pair[0] @ (pair[1] * a))
    return total


def camr_diagonals(
    stats: LayerStats, params: IterisParams, task: int, alpha: float | None, share: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(a1_i, a2_i), both (d,): what is added to the diagonals of C_i and G_i.

    Without CAMR both are isotropic. With it, a2 = scale (camr_alpha * normalised variances + camr_beta), and a1 is the
    same diagonal ("matched": the prior is the lambda-weighted mean of the adapters), zero, or the isotropic one.

    Args:
        stats: The module's sums.
        params: The method's parameters.
        task: Index of the adapter.
        alpha: The alpha that a search chose; None for the fixed ones.
        share: Share of the tokens that the sums at hand hold; scales the norms with them.
    """
    v = stats.variances[task]
    # A searched alpha scales both by ||G_i||, so that its prior is the mean of the adapters whatever C_i is.
    cross_norm = stats.gram_norms[task] if alpha is not None else stats.cross_norms[task]
    alpha_1, alpha_2 = (alpha, alpha) if alpha is not None else (float(params.alpha_1), float(params.alpha_2))
    iso_1, iso_2 = alpha_1 * cross_norm * share, alpha_2 * stats.gram_norms[task] * share
    if not params.use_camr:
        return torch.full_like(v, iso_1), torch.full_like(v, iso_2)
    strength = alpha_1 if params.camr_alpha is None else params.camr_alpha
    scale = stats.gram_norms[task] * share if params.camr_scale == "fro" else 1.0
    a2 = scale * (strength * _normalised(v, params.camr_normalize, params.camr_direction) + params.camr_beta)
    if params.camr_cross == "matched":
        return a2, a2
    return torch.full_like(v, iso_1 if params.camr_cross == "iso" else 0.0), a2


def _normalised(v: Tensor, by: str, direction: str) -> Tensor:
    """(d,) shares of the variance (inverse: 1 - share), over their mean or maximum, or as they are ("sum")."""
    total = v.sum()
    if float(total) <= 0.0:
        return torch.zeros_like(v)
    share = 1.0 - v / total if direction == "inverse" else v / total
    if by == "sum":
        return share
    return share / (share.mean() if by == "mean" else share.max())


def _choose(stats: LayerStats, params: IterisParams, report: dict[str, object]) -> Choices:
    """The (alpha, rho) with the least objective on folds that the solve did not see."""
    stats = _sketch(stats)
    alphas = ALPHAS if params.alpha_1 == "auto" else (None,)
    rhos = RHOS if params.reg_ceof == "auto" else (None,)
    prior = stats.folds[0].prior
    if len(rhos) > 1 and prior is not None and torch.equal(prior, stats.folds[0].gram):
        rhos = (0.0,)  # X~ = X, as in the first pass of an iteration: rho changes nothing
    used = [k for k, f in enumerate(stats.folds) if 0.0 < f.share < 1.0]
    start = (min(_START[0], len(alphas) - 1), min(_START[1], len(rhos) - 1))
    if not used:  # all tokens in one fold: nothing is left to hold out
        return alphas[start[0]], rhos[start[1]]
    training = {k: _sum_folds(stats.folds, leave_out=k) for k in used}

    def objective(row: int, column: int) -> float:
        pair = (alphas[row], rhos[column])
        states = {k: _solve(stats, training[k], params, pair)[0] for k in used}
        return sum(_objective(stats, stats.folds[k], states[k]) for k in used)

    (row, column), seen = descend_grid(objective, len(alphas), len(rhos), start)
    mean = _mean_of_adapters(stats)
    reference = -sum(_objective(stats, stats.folds[k], mean) for k in used)
    gain = -seen[row, column] - reference
    report["heldout_gain"] = gain / abs(reference) if reference else 0.0
    return alphas[row], rhos[column]


def _sketch(stats: LayerStats) -> LayerStats:
    """The same problem with its p rows replaced by a few random combinations of them.

    Rows of the solution depend on the same rows of the target alone, so the objective is a sum over rows, and Gaussian
    combinations estimate it without bias: what a search needs, at a cost that does not grow with m in full mode.
    """
    p = stats.folds[0].target.shape[0]
    if p <= SKETCH:
        return stats
    generator = torch.Generator().manual_seed(p)
    draw = torch.randn(SKETCH, p, generator=generator, dtype=torch.float64) / math.sqrt(SKETCH)
    draw = draw.to(stats.folds[0].target.device)

    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None else draw @ t

    folds = [replace(f, target=draw @ f.target, target_prior=rows(f.target_prior)) for f in stats.folds]
    pairs = [None if pair is None else (draw @ pair[0], pair[1]) for pair in stats.pairs]
    return replace(stats, folds=folds, pairs=pairs, base_weight=rows(stats.base_weight))


def _mean_of_adapters(stats: LayerStats) -> Tensor:
    """(p, d) mean of the adapters' deltas, weighted as the regulariser's prior is: the limit of a large alpha."""
    ones = torch.ones_like(stats.variances[0])
    # Where no feature ever fires all norms are 0, and the coefficients alone weigh the mean.
    norms = [n * ones for n in stats.gram_norms] if any(stats.gram_norms) else [ones] * len(stats.pairs)
    total = _weighted_sum(stats, norms)
    return _prior_target(stats, norms) / torch.where(total == 0, 1.0, total)


def _residual(stats: LayerStats, total: FoldStats, state: Tensor) -> float | None:
    """Share of the task models' output energy at this module that the merged delta misses; None without any energy."""
    return (stats.energy + _objective(stats, total, state)) / stats.energy if stats.energy > 0 else None


def _objective(stats: LayerStats, fold: FoldStats, state: Tensor) -> float:
    """tr(S G S^T) - 2 tr(S T^T) on one fold: the IterIS objective less a constant."""
    target = fold.target
    if stats.base_weight is not None and fold.cross is not None:
        target = target + stats.base_weight @ (fold.cross - fold.gram)
    return float((state * (state @ fold.gram - 2.0 * target)).sum())
