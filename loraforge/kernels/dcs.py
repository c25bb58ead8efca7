"""Dynamic calibration sampling: how much the adapters disagree on a token, and the weight that follows.

With y = A_cat x the R low-rank activations of a token under all N adapters and M the R x R form made from B_cat,

    V_s = (1/N) sum_i ||W_i x_s - mean_j W_j x_s||^2 = y_s^T M y_s

is exact and the base weight cancels. Weights (median m, MAD = median |V - m|, medians average the two middle values):

    gaussian   w_s = exp(-V_s / (sigma^2 tau)),             sigma = MAD scale
    excess     w_s = exp(-max(0, V_s - m) / (sigma tau)),   sigma = 1.4826 MAD scale

tau >= 1 is the smallest one with effective sample size (sum w)^2 / sum w^2 >= min_ess S; min_ess = 0 leaves tau = 1,
the literal formula. The exponent is shifted by its smallest value, so that not all weights can underflow, and weights
have mean 1. sigma = 0 (more than half of V equal) stands for the limit of small sigma.
"""

from __future__ import annotations

import math
import sys
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError, UsageError, did_you_mean
from loraforge.kernels import backend
from loraforge.kernels.checks import FLOAT32_64, FLOATS, require, require_finite, require_number

KERNELS = ("gaussian", "excess")
_CONSISTENT = 1.4826  # MAD of a normal distribution to its standard deviation
_REACHABLE = 1.0 - 1e-12  # rounding keeps a share of exactly 1 out of reach
_GROW = 4.0


class DcsWeights(NamedTuple):
    """Weights of S tokens and how they came about.

    Attributes:
        w: (S,) float64, mean 1.
        sigma: Scale of the kernel.
        tau: Factor of the exponent's divisor that the floor asked for; 1 where it did not act. Always finite, but
            beyond all measure (above 1e300) where it acted on sigma = 0.
        ess: Effective sample size as a share of S, in (0, 1].
    """

    w: Tensor
    sigma: float
    tau: float
    ess: float


class DcsBatch(NamedTuple):
    """Weights of the tokens of b modules and how they came about, on the device of the activations.

    Attributes:
        w: (b, S) float64, mean 1 over the rows that count, 0 in the others.
        stats: (b, 3) float64: sigma, tau and the share of effective samples, as in `DcsWeights`.
    """

    w: Tensor
    stats: Tensor


def dcs_variance_reference(Y: Tensor, M: Tensor) -> Tensor:
    """`dcs_variance` in PyTorch."""
    y = Y.double()
    return ((y @ M.double()) * y).sum(-1).clamp_min(0.0)


@torch.no_grad()
def dcs_variance(Y: Tensor, M: Tensor) -> Tensor:
    """Quadratic form y^T M y of every row, clamped at 0.

    Args:
        Y: (S, R) activations of any float dtype.
        M: (R, R) float32 or float64, positive semi-definite; only its symmetric part counts.

    Returns:
        (S,) float64. A NaN in a row of Y gives a NaN there.

    Raises:
        LoraforgeError: A shape or dtype does not fit.
    """
    require("dcs_variance", "Y", Y, ("S", "R"), FLOATS)
    require("dcs_variance", "M", M, (Y.shape[1], Y.shape[1]), FLOAT32_64)
    if backend.takes_native("dcs_variance", Y, M):
        return torch.ops.loraforge.dcs_variance(Y, M)
    return dcs_variance_reference(Y, M)


@backend.fake("dcs_variance")
def _dcs_variance_fake(Y: Tensor, M: Tensor) -> Tensor:
    return Y.new_empty((Y.shape[0],), dtype=torch.float64)


def _median(values: Tensor) -> float:
    """Median of (S,), S >= 1, with the average of the two middle values (torch.median takes the lower one)."""
    ordered = values.sort().values
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return 0.5 * float(low) + 0.5 * float(high)


def _ess_share(d: Tensor, kappa: float) -> float:
    w = torch.exp(-kappa * d)
    return float(w.sum() / (w * w).sum() * (w.sum() / len(d)))


def _floored(d: Tensor, kappa0: float, min_ess: float) -> float:
    """The largest kappa <= kappa0 for which exp(-kappa d) keeps a share of min_ess (that share falls with kappa)."""
    target = min(min_ess, _REACHABLE)
    if min_ess <= 0.0 or _ess_share(d, kappa0) >= target:
        return kappa0
    low, high = min(1.0, 0.5 * kappa0), kappa0
    while _ess_share(d, low) < target:
        low, high = low / _GROW, low
    while low * _GROW < high:
        if _ess_share(d, low * _GROW) < target:
            high = low * _GROW
            break
        low *= _GROW
    for _ in range(60):
        if high / low <= 1.0 + 1e-12:
            break
        mid = low * math.sqrt(high / low)
        low, high = (mid, high) if _ess_share(d, mid) >= target else (low, mid)
    return low


def dcs_weights_reference(
    V: Tensor, scale: float, min_ess: float, kernel: str = "gaussian", mad_consistent: bool = False
) -> DcsWeights:
    """`dcs_weights` in PyTorch."""
    if len(V) == 0:
        return DcsWeights(V.clone(), 0.0, 1.0, 1.0)
    excess = kernel == "excess"
    middle = _median(V)
    sigma = _median((V - middle).abs()) * scale * (_CONSISTENT if excess or mad_consistent else 1.0)
    d = (V - (middle if excess else float(V.min()))).clamp_min(0.0)
    top = float(d.max())
    kappa0 = kappa = 0.0
    if top > 0.0:
        # In units of the largest distance nothing over- or underflows.
        d = d / top
        ratio = top / sigma if sigma > 0.0 else math.inf
        kappa0 = min(ratio if excess or not math.isfinite(ratio) else ratio / sigma, sys.float_info.max)
        kappa = _floored(d, kappa0, min_ess)
    w = torch.exp(-kappa * d)
    tau = 1.0 if kappa == kappa0 else _quotient(kappa0, kappa)
    return DcsWeights(w * (len(w) / w.sum()), sigma, tau, _ess_share(d, kappa))


def _quotient(a: float, b: float) -> float:
    """a / b, at most the largest finite number, so that a report of it stays valid JSON."""
    return sys.float_info.max if b < 1.0 and a > sys.float_info.max * b else a / b


@torch.no_grad()
def dcs_weights(
    V: Tensor,
    scale: float = 1.0,
    min_ess: float = 0.25,
    kernel: Literal["gaussian", "excess"] = "gaussian",
    mad_consistent: bool = False,
) -> DcsWeights:
    """Weights of tokens from their output variances: the formulas above.

    Args:
        V: (S,) float64, not negative.
        scale: Factor of the MAD, above 0.
        min_ess: Floor of the effective sample size as a share of S, 0 (none) to 1.
        kernel: `gaussian` (the document's; not free of units) or `excess` (free of units).
        mad_consistent: Multiply the MAD of `gaussian` by 1.4826 as well.

    Returns:
        The weights with sigma, tau and the share of effective samples.

    Raises:
        UsageError: The kernel is unknown.
        LoraforgeError: V has another shape or dtype or a value that is negative or not finite, or a number is out of
            range.
    """
    require("dcs_weights", "V", V, ("S",), (torch.float64,))
    _check_options("dcs_weights", scale, min_ess, kernel)
    if backend.takes_native("dcs_weights", V):
        w, stats = torch.ops.loraforge.dcs_weights(V, scale, min_ess, kernel == "excess", mad_consistent)
        sigma, tau, ess = stats.tolist()
        if math.isnan(sigma):  # how the compiled form says that V cannot be used: the one wait for a device
            _refuse_variances(V)
        return DcsWeights(w, sigma, tau, ess)
    _refuse_variances(V)
    return dcs_weights_reference(V, scale, min_ess, kernel, mad_consistent)


def _refuse_variances(V: Tensor) -> None:
    """Names the first variance that is negative or not finite, if there is one."""
    require_finite("dcs_weights", "V", V)
    if len(V) and float(V.min()) < 0.0:
        raise LoraforgeError("dcs_weights: a variance is negative", where="V", got=float(V.min()), expected=">= 0")


def _check_options(op: str, scale: float, min_ess: float, kernel: str) -> None:
    require_number(op, "scale", scale, sys.float_info.min, sys.float_info.max, "a finite number above 0")
    require_number(op, "min_ess", min_ess, 0.0, 1.0, "0 to 1")
    if kernel not in KERNELS:
        raise UsageError(f"{op}: unknown kernel", where="kernel", got=repr(kernel), hint=did_you_mean(kernel, KERNELS))


@backend.fake("dcs_weights")
def _dcs_weights_fake(
    V: Tensor, scale: float, min_ess: float, excess: bool, mad_consistent: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(V, memory_format=torch.contiguous_format), V.new_empty((3,))


def dcs_batch_reference(
    Y: Tensor,
    M: Tensor,
    counts: Tensor | None,
    scale: float,
    min_ess: float,
    kernel: str = "gaussian",
    mad_consistent: bool = False,
) -> DcsBatch:
    """`dcs_batch` in PyTorch."""
    w, stats = Y.new_zeros(Y.shape[:2], dtype=torch.float64), Y.new_empty((len(Y), 3), dtype=torch.float64)
    for i, n in enumerate([Y.shape[1]] * len(Y) if counts is None else counts.tolist()):
        V = dcs_variance_reference(Y[i, :n], M[i])
        if bool(torch.isfinite(V).all()):
            one = dcs_weights_reference(V, scale, min_ess, kernel, mad_consistent)
            w[i, :n] = one.w
            stats[i] = torch.tensor(one[1:], dtype=torch.float64)
        else:
            w[i, :n] = stats[i] = math.nan
    return DcsBatch(w, stats)


@torch.no_grad()
def dcs_batch(
    Y: Tensor,
    M: Tensor,
    counts: Tensor | None = None,
    scale: float = 1.0,
    min_ess: float = 0.25,
    kernel: Literal["gaussian", "excess"] = "gaussian",
    mad_consistent: bool = False,
) -> DcsBatch:
    """`dcs_variance` and `dcs_weights` of b modules at once; on a GPU one launch and no wait for the device.

    Args:
        Y: (b, S, R) activations of any float dtype; modules of lower rank end in columns of 0.
        M: (b, R, R) float32 or float64, positive semi-definite; only the symmetric part counts.
        counts: (b,) int64 number of rows of each module that count, or None for all. Later rows are never looked at.
        scale: Factor of the MAD, above 0.
        min_ess: Floor of the effective sample size as a share of the rows that count.
        kernel: `gaussian` or `excess`.
        mad_consistent: Multiply the MAD of `gaussian` by 1.4826 as well.

    Returns:
        Weights and statistics. A module with a variance that is not finite has NaN in both, and so has, on a GPU, one
        whose count is not in 0 to S.

    Raises:
        UsageError: The kernel is unknown.
        LoraforgeError: A shape or dtype does not fit or a number is out of range.
    """
    require("dcs_batch", "Y", Y, ("b", "S", "R"), FLOATS)
    require("dcs_batch", "M", M, (Y.shape[0], Y.shape[2], Y.shape[2]), FLOAT32_64)
    _check_options("dcs_batch", scale, min_ess, kernel)
    given = [Y, M]
    if counts is not None:
        require("dcs_batch", "counts", counts, (Y.shape[0],), (torch.int64,))
        if counts.device.type == "cpu" and len(counts):
            for bound in (int(counts.min()), int(counts.max())):
                require_number("dcs_batch", "counts", bound, 0, Y.shape[1], f"0 to S = {Y.shape[1]}")
        given.append(counts)
    if backend.takes_native("dcs_batch", *given):
        return DcsBatch(
            *torch.ops.loraforge.dcs_batch(Y, M, counts, scale, min_ess, kernel == "excess", mad_consistent)
        )
    return dcs_batch_reference(Y, M, counts, scale, min_ess, kernel, mad_consistent)


@backend.fake("dcs_batch")
def _dcs_batch_fake(
    Y: Tensor,
    M: Tensor,
    counts: Tensor | None,
    scale: float,
    min_ess: float,
    excess: bool,
    mad_consistent: bool,
) -> tuple[Tensor, Tensor]:
    return Y.new_empty(Y.shape[:2], dtype=torch.float64), Y.new_empty((Y.shape[0], 3), dtype=torch.float64)
