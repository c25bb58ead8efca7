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

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from loraforge.linalg.leading import leading_subspace
from loraforge.linalg.metric import left_subspace
from loraforge.linalg.mixing import BaseProducts, mixed_gram, mixed_lag, mixed_target
from loraforge.linalg.search import descend_grid
from loraforge.linalg.spd import Factor, factor_spd
from loraforge.merging.iteris_params import IterisParams
from loraforge.types import FoldStats, LayerSolution, LayerStats

Choices = tuple[float | None, float | None]  # (alpha, rho); None where the parameter is a fixed number
Part = Callable[[str], AbstractContextManager[None]]

ALPHAS: tuple[float | None, ...] = tuple(10.0**e for e in range(-6, 2))  # 1e-6 .. 10
RHOS: tuple[float | None, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
SKETCH = 32  # rows that a search looks at
LARGE = 1024  # sides from which an eigendecomposition costs more than a few Krylov steps
_START = (4, 0)  # alpha 1e-2, rho 0


def solve_layer(
    stats: LayerStats, params: IterisParams, choices: Choices | None = None, part: Part | None = None
) -> LayerSolution:
    """The solution of one module.

    Args:
        stats: Sums over the calibration tokens.
        params: The method's parameters.
        choices: (alpha, rho) of an earlier pass, taken as they are instead of being searched again.
        part: Takes the time of a part of the work: search, residual.

    Raises:
        LoraforgeError: NaN or Inf in the Gram; names the module.
    """
    report: dict[str, object] = {}
    part = part or _untimed
    if choices is None:
        with part("search"):
            choices = _choose(stats, params, report) if params.searches else (None, None)
    right, factor = _system(stats, stats.folds, params, choices)
    if not any(stats.gram_norms):
        right = _mean_of_adapters(stats) @ factor.L @ factor.L.mT  # the limit of a vanishing input
    left = None
    if stats.base_weight is None:
        coordinates = factor.solve_right(right)
    else:
        # The full-weight solution is dense: its best update of rank R in the metric of the outputs is what counts.
        # M = state L comes out of half a solve, and only R rows of the state itself are wanted: U^T M L^{-1}.
        M = factor.half_solve_right(right)
        del right
        left = _leading(M, stats.rank)
        coordinates = factor.other_half_right(left[0].mT @ M)
    report["alpha"] = choices[0] if params.alpha_1 == "auto" else params.alpha_1
    report["rho"] = choices[1] if params.reg_ceof == "auto" else params.reg_ceof
    report |= {"solver": factor.info.solver, "jitter": factor.info.jitter, "condition": factor.info.condition}
    with part("residual"):
        before = _gained(stats, *_mean_factors(stats))
        after = _gained(stats, None if left is None else left[0], coordinates)
        report |= _residuals(stats.energy, *torch.stack([before, after]).tolist())
    return LayerSolution(coordinates, factor.L, left, choices, report)


def _untimed(_: str) -> AbstractContextManager[None]:
    return nullcontext()


def _leading(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Left singular vectors of the `rank` largest values of M (p, d), and values whose squares add up to ||M||_F^2."""
    if min(M.shape) >= LARGE and 4 * rank <= min(M.shape):
        return leading_subspace(M, rank)
    U, S = left_subspace(M, None)
    return U[:, :rank], S


def _system(
    stats: LayerStats, folds: Sequence[FoldStats], params: IterisParams, choices: Choices
) -> tuple[Tensor, Factor]:
    """T1 (p, d), and the factor of T2, on the sums of some folds."""
    prior, shift, lag = _regulariser(stats, params, choices[0], sum(f.share for f in folds))
    T1 = mixed_target(folds, choices[1]).add_(prior)
    if stats.base_weight is not None and folds[0].cross is not None:
        T1.addmm_(stats.base_weight, mixed_lag(folds, choices[1]))
        T1.addcmul_(stats.base_weight, lag)
    T2 = mixed_gram(folds, choices[1])
    T2.diagonal().add_(shift)
    return T1, factor_spd(T2, stats.module)


def _regulariser(
    stats: LayerStats, params: IterisParams, alpha: float | None, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_i c_i lambda_i D_i diag(a1_i) (p, d), sum_i c_i lambda_i a2_i (d,), and the latter of a1_i - a2_i."""
    diagonals = [camr_diagonals(stats, params, i, alpha, share) for i in range(len(stats.pairs))]
    prior = _prior_target(stats, [a1 for a1, _ in diagonals])
    shift = _weighted_sum(stats, [a2 for _, a2 in diagonals])
    return prior, shift, _weighted_sum(stats, [a1 for a1, _ in diagonals]) - shift


def _weighted_sum(stats: LayerStats, diagonals: Sequence[Tensor]) -> Tensor:
    """(d,) sum_i c_i lambda_i a_i."""
    return torch.stack([c * a for c, a in zip(stats.coefficients, diagonals, strict=True)]).sum(0)


def _prior_factors(stats: LayerStats, diagonals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """sum_i c_i lambda_i D_i diag(a_i) as a product of (p, R) and (R, d)."""
    rows = [
        c * (pair[1] * a)
        for pair, c, a in zip(stats.pairs, stats.coefficients, diagonals, strict=True)
        if pair is not None
    ]
    return stats.folds[0].outputs, torch.cat(rows)


def _prior_target(stats: LayerStats, diagonals: Sequence[Tensor]) -> Tensor:
    """(p, d) sum_i c_i lambda_i D_i diag(a_i)."""
    outputs, rows = _prior_factors(stats, diagonals)
    return outputs @ rows


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
    alphas = ALPHAS if params.alpha_1 == "auto" else (None,)
    rhos = RHOS if params.reg_ceof == "auto" else (None,)
    prior = stats.folds[0].prior
    if len(rhos) > 1 and prior is not None and torch.equal(prior, stats.folds[0].gram):
        rhos = (0.0,)  # X~ = X, as in the first pass of an iteration: rho changes nothing
    used = [k for k, f in enumerate(stats.folds) if 0.0 < f.share < 1.0]
    start = (min(_START[0], len(alphas) - 1), min(_START[1], len(rhos) - 1))
    if not used:  # all tokens in one fold: nothing is left to hold out
        return alphas[start[0]], rhos[start[1]]
    search = Search(_sketch(stats), params)

    def objective(row: int, column: int) -> float:
        return float(torch.stack([search.held_out(k, (alphas[row], rhos[column])) for k in used]).sum())

    (row, column), seen = descend_grid(objective, len(alphas), len(rhos), start)
    reference = -float(torch.stack([search.of_mean(k) for k in used]).sum())
    gain = -seen[row, column] - reference
    report["heldout_gain"] = gain / abs(reference) if reference else 0.0
    return alphas[row], rhos[column]


class Search:
    """The held-out objective at any (alpha, rho).

    The base weight meets the sums of every fold once; after that a point costs the factorisation of one Gram a fold
    and products with p rows.

    Args:
        stats: The module's sums, with few rows p (`_sketch`).
        params: The method's parameters.
    """

    def __init__(self, stats: LayerStats, params: IterisParams) -> None:
        self._stats, self._params = stats, params
        self._base = [BaseProducts.of(stats.base_weight, fold) for fold in stats.folds]
        self._mixed: dict[int, tuple[float, Tensor]] = {}

    def held_out(self, fold: int, choices: Choices) -> Tensor:
        """The objective on a fold of the solution on the others, a number."""
        alpha, rho = choices
        rest = [k for k in range(len(self._stats.folds)) if k != fold]
        folds = [self._stats.folds[k] for k in rest]
        prior, shift, lag = _regulariser(self._stats, self._params, alpha, sum(f.share for f in folds))
        T1 = mixed_target(folds, rho).add_(prior)
        for base in (self._base[k] for k in rest):
            if base is not None:
                T1 += base.lag(rho or 0.0)
        if self._stats.base_weight is not None and self._base[fold] is not None:
            T1.addcmul_(self._stats.base_weight, lag)
        T2 = self._gram(fold, folds, rho)
        diagonal = T2.diagonal()
        kept = diagonal.clone()
        diagonal.add_(shift)
        state = factor_spd(T2, self._stats.module).solve_right(T1)
        diagonal.copy_(kept)
        return self._on(fold, state)

    def of_mean(self, fold: int) -> Tensor:
        """The objective on a fold of the mean of the adapters."""
        return self._on(fold, _mean_of_adapters(self._stats))

    def _gram(self, fold: int, folds: Sequence[FoldStats], rho: float | None) -> Tensor:
        """The mixed Gram of the other folds: collected, or the last one that was made; to be left as it was."""
        if len(folds) == 1 and not rho:
            return folds[0].gram
        if fold not in self._mixed or self._mixed[fold][0] != (rho or 0.0):
            self._mixed.pop(fold, None)  # its memory first
            self._mixed[fold] = (rho or 0.0, mixed_gram(folds, rho))
        return self._mixed[fold][1]

    def _on(self, fold: int, state: Tensor) -> Tensor:
        sums, base = self._stats.folds[fold], self._base[fold]
        target = sums.target if base is None else sums.target + base.lag(0.0)
        return (state * (state @ sums.gram - 2.0 * target)).sum()


def _sketch(stats: LayerStats) -> LayerStats:
    """The same problem with its p rows replaced by a few random combinations of them.

    Rows of the solution depend on the same rows of the target alone, so the objective is a sum over rows, and Gaussian
    combinations estimate it without bias: what a search needs, at a cost that does not grow with m in full mode.
    """
    p = stats.folds[0].outputs.shape[0]
    if p <= SKETCH:
        return stats
    generator = torch.Generator().manual_seed(p)
    draw = torch.randn(SKETCH, p, generator=generator, dtype=torch.float64) / math.sqrt(SKETCH)
    draw = draw.to(stats.folds[0].outputs.device)
    outputs = draw @ stats.folds[0].outputs
    folds = [replace(f, outputs=outputs) for f in stats.folds]
    pairs = [None if pair is None else (draw @ pair[0], pair[1]) for pair in stats.pairs]
    base = None if stats.base_weight is None else draw @ stats.base_weight
    return replace(stats, folds=folds, pairs=pairs, base_weight=base)


def _mean_factors(stats: LayerStats) -> tuple[Tensor, Tensor]:
    """Mean of the adapters' deltas, weighted as the regulariser's prior is (the limit of a large alpha), as factors."""
    ones = torch.ones_like(stats.variances[0])
    # Where no feature ever fires all norms are 0, and the coefficients alone weigh the mean.
    norms = [n * ones for n in stats.gram_norms] if any(stats.gram_norms) else [ones] * len(stats.pairs)
    total = _weighted_sum(stats, norms)
    outputs, rows = _prior_factors(stats, norms)
    return outputs, rows / torch.where(total == 0, 1.0, total)


def _mean_of_adapters(stats: LayerStats) -> Tensor:
    """(p, d) that mean."""
    outputs, rows = _mean_factors(stats)
    return outputs @ rows


def _gained(stats: LayerStats, left: Tensor | None, rows: Tensor) -> Tensor:
    """tr(S G S^T) - 2 tr(S T^T), a number: the objective of a delta S = left @ rows less that of no delta.

    Args:
        stats: The module's sums.
        left: (p, q), or None for the identity.
        rows: (q, d); only these meet the sums.
    """
    weighted = rows if left is None else (left.mT @ left) @ rows
    outputs = stats.folds[0].outputs if left is None else left.mT @ stats.folds[0].outputs
    base = stats.base_weight if left is None or stats.base_weight is None else left.mT @ stats.base_weight
    total = torch.zeros((), dtype=rows.dtype, device=rows.device)
    for fold in stats.folds:
        total += (weighted * (rows @ fold.gram)).sum() - 2.0 * (rows * (outputs @ fold.features)).sum()
        if base is not None and fold.cross is not None:
            total -= 2.0 * (rows * (base @ fold.cross - base @ fold.gram)).sum()
    return total


def _residuals(energy: float, before: float, after: float) -> dict[str, float | None]:
    """Shares of the task models' output energy at a module that a delta misses; None without any energy."""
    if energy <= 0:
        return {"residual_before": None, "residual_after": None}
    return {"residual_before": (energy + before) / energy, "residual_after": (energy + after) / energy}
