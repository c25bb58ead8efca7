"""Flattening of a spectrum: the last step of the isotropic methods and of `--post iso`.

A merged update U diag(s) V^T, cut to its k kept directions, gets the spectrum

    s_j -> alpha * c * s_j^(1 - b)        b = power in [0, 1]: 1 makes all equal, 0 changes nothing

with c such that an average of the spectrum stays: the mean (and with it the nuclear norm), the root mean square (the
Frobenius norm) or the geometric mean (the product). Iso-C is b = 1 with the mean (Marczak et al., ICML 2025, arXiv
2502.04959): s_j -> (sum s) / p.

Only directions above rounding take part. The published rule also flattens the null space of an update, whose vectors
LAPACK chooses at will: on adapters most of its result is noise. `mean_over=full` keeps the published divisor
min(m, n), never the published null directions. A flat spectrum cannot be cut any more: cut first, then flatten.
"""

from __future__ import annotations

from typing import Protocol, overload

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.linalg.rank import RankRule, choose
from loraforge.types import Dense, LowRank, Update

# Singular values under this share of the largest are rounding of inputs in that dtype, or of what made them.
NULL = {torch.float64: 1e-10, torch.float32: 1e-6}


class Flattening(Protocol):
    """How to flatten.

    Attributes:
        mean_over: "support": averages run over the kept directions; "full": over min(m, n), zeros included.
        average: "mean", "rms" or "geo".
        power: b in [0, 1].
        alpha: Factor on the result.
        target_norm: "none"; "nuclear" or "fro": that norm of the update before the cut; "mean-adapter": the mean
            Frobenius norm of the merged deltas.
    """

    @property
    def mean_over(self) -> str: ...  # noqa: D102
    @property
    def average(self) -> str: ...  # noqa: D102
    @property
    def power(self) -> float: ...  # noqa: D102
    @property
    def alpha(self) -> float: ...  # noqa: D102
    @property
    def target_norm(self) -> str: ...  # noqa: D102


def support(S: Tensor, dtype: torch.dtype = torch.float64) -> int:
    """Number of singular values (k,), descending, that are no rounding of inputs of `dtype`; 0 of a zero spectrum."""
    values = S.tolist()  # read once: on a GPU every question to a tensor waits for all work before it
    if not values or not values[0] > 0.0:
        return 0
    cut = NULL.get(dtype, NULL[torch.float32]) * values[0]
    return sum(value > cut for value in values)


def cut_gap(S: Tensor, k: int) -> float:
    """(s_k - s_{k+1}) / s_1 of a falling spectrum: near 0 the best rank k is not unique; 1 where nothing is cut."""
    if not 0 < k < S.numel():
        return 1.0
    first, kept, cut = S[[0, k - 1, k]].tolist()
    return (kept - cut) / first if first > 0.0 else 1.0


def flatten(
    S: Tensor,
    shape: tuple[int, int],
    params: Flattening,
    adapter_norm: float | None = None,
    *,
    whole: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The flattened spectrum.

    Args:
        S: (k,) kept singular values, descending.
        shape: (m, n) of the update.
        params: How.
        adapter_norm: mean_i ||w_i D_i||_F over all adapters, for target_norm "mean-adapter".
        whole: (q,) the spectrum before the cut, whose norm `target_norm` restores; default S.
        dtype: Dtype of the inputs, which decides what is rounding.

    Returns:
        (k,) float64; zeros where S is rounding.

    Raises:
        LoraforgeError: target_norm "mean-adapter" without `adapter_norm`.
    """
    S = S.to(torch.float64)
    whole = S if whole is None else whole.to(torch.float64)
    p = support(S, dtype)
    out = torch.zeros_like(S)
    if p == 0:
        return out
    unit = S[:p] / S[0]  # powers of a unit spectrum neither overflow nor underflow
    powered = unit.pow(1.0 - params.power)
    flat = powered * (_average(unit, params.average) / _average(powered, params.average) * S[0])
    if params.mean_over == "full":
        share = p / min(shape)
        flat *= (share if params.average == "mean" else share**0.5) ** params.power
    if params.target_norm == "nuclear":
        flat *= whole.sum() / flat.sum()
    elif params.target_norm == "fro":
        flat *= whole.norm() / flat.norm()
    elif params.target_norm == "mean-adapter":
        if adapter_norm is None:
            raise LoraforgeError(
                "The norms of the adapters are not known here",
                where="target_norm",
                got=params.target_norm,
                expected="none, nuclear or fro",
            )
        flat *= adapter_norm / flat.norm()
    out[:p] = params.alpha * flat
    return out


def _average(S: Tensor, kind: str) -> Tensor:
    """Mean, root mean square or geometric mean of positive values (p,)."""
    if kind == "rms":
        return S.square().mean().sqrt()
    return S.log().mean().exp() if kind == "geo" else S.mean()


@overload
def flatten_update(
    update: LowRank,
    spectrum: Tensor | None,
    params: Flattening,
    adapter_norm: float | None = ...,
    rule: RankRule | None = ...,
) -> tuple[LowRank, dict[str, float]]: ...
@overload
def flatten_update(
    update: Dense,
    spectrum: Tensor | None,
    params: Flattening,
    adapter_norm: float | None = ...,
    rule: RankRule | None = ...,
) -> tuple[Dense, dict[str, float]]: ...
def flatten_update(
    update: Update,
    spectrum: Tensor | None,
    params: Flattening,
    adapter_norm: float | None = None,
    rule: RankRule | None = None,
) -> tuple[Update, dict[str, float]]:
    """An update with its spectrum flattened.

    Args:
        update: A LowRank as `factored.truncate` gives it (sqrt(S) on the columns of B and the rows of A), or a Dense,
            which is decomposed here.
        spectrum: (q,) singular values of the LowRank, descending; those beyond its rank were cut and count only for
            `target_norm`. Ignored for a Dense.
        params: How.
        adapter_norm: mean_i ||w_i D_i||_F over all adapters, for target_norm "mean-adapter".
        rule: Cuts a Dense before it is flattened; default: everything above rounding is kept.

    Returns:
        The same kind of update (a LowRank of the support's rank p, at least 1), and the numbers of the flattening:
        rank p, sbar (mean of the new spectrum), nuclear and Frobenius norms before (the kept part) and after.

    Raises:
        LoraforgeError: A LowRank without spectrum, or target_norm "mean-adapter" without `adapter_norm`.
    """
    if isinstance(update, Dense):
        return _flatten_dense(update, params, adapter_norm, rule or RankRule())
    if spectrum is None:
        raise LoraforgeError("Factors are flattened by their spectrum", expected="the singular values of the update")
    S = spectrum[: update.rank].to(torch.float64)
    flat = flatten(S, update.shape, params, adapter_norm, whole=spectrum, dtype=update.B.dtype)
    p = max(1, support(S, update.B.dtype))
    # What has no support (a zero update) keeps one zero column.
    root = torch.where(S > 0.0, flat / S, 0.0).sqrt()[:p].to(update.B)
    B, A = (update.B[:, :p] * root).contiguous(), (update.A[:p] * root[:, None]).contiguous()
    return LowRank(B, A, update.scaling), numbers(S, flat)


def _flatten_dense(
    update: Dense, params: Flattening, adapter_norm: float | None, rule: RankRule
) -> tuple[Dense, dict[str, float]]:
    """`flatten_update` of a matrix, through its SVD in float64."""
    weight = update.delta()
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    U, whole, Vh = torch.linalg.svd(weight.to(torch.float64), full_matrices=False)
    k = choose(whole.to(dtype), rule, *update.shape)
    S = whole[:k]
    flat = flatten(S, update.shape, params, adapter_norm, whole=whole, dtype=dtype)
    return Dense(((U[:, :k] * flat) @ Vh[:k]).to(dtype)), numbers(S, flat)


def numbers(before: Tensor, after: Tensor) -> dict[str, float]:
    """What a flattening did, as plain numbers.

    Args:
        before: (k,) kept singular values.
        after: (k,) flattened ones.

    Returns:
        rank (directions with support), sbar, nuclear_before, nuclear_after, frobenius_before, frobenius_after.
    """
    found = torch.stack([(after > 0.0).sum().to(after.dtype), before.sum(), after.sum(), before.norm(), after.norm()])
    p, nuclear_before, nuclear_after, frobenius_before, frobenius_after = found.tolist()
    return {
        "rank": int(p),
        "sbar": nuclear_after / p if p else 0.0,
        "nuclear_before": nuclear_before,
        "nuclear_after": nuclear_after,
        "frobenius_before": frobenius_before,
        "frobenius_after": frobenius_after,
    }
