"""The nouns that all rooms share. Shape letters: m out, n in, r rank, N adapters, R sum of ranks, S tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A weight update held as factors: delta = scaling * B @ A.

    Attributes:
        B: (m, r) output factor.
        A: (r, n) input factor.
        scaling: Scalar factor of the product (alpha / r of the adapter; 1 for a merged one).
    """

    B: Tensor
    A: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Number of columns of B, r (not the numerical rank)."""
        return int(self.B.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the delta."""
        return int(self.B.shape[0]), int(self.A.shape[1])

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> LowRank:
        """The same update with factors of another dtype or on another device."""
        return LowRank(self.B.to(device=device, dtype=dtype), self.A.to(device=device, dtype=dtype), self.scaling)

    def folded(self) -> LowRank:
        """The same update with the scaling multiplied into B and scaling 1."""
        return self if self.scaling == 1.0 else LowRank(self.B * self.scaling, self.A, 1.0)

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense (m, n) update, in `dtype` (default: the factors' own). For tests and small layers only."""
        pair = self if dtype is None else self.to(dtype)
        return (pair.B @ pair.A) * self.scaling

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows start..stop of the dense update, (stop - start, n), in `dtype` (default: the factors' own)."""
        return LowRank(self.B[start:stop], self.A, self.scaling).delta(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A weight update held whole: the difference of a fine-tuned weight and its base.

    Attributes:
        weight: (m, n).
        scaling: Scalar factor.
    """

    weight: Tensor
    scaling: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the delta."""
        return int(self.weight.shape[0]), int(self.weight.shape[1])

    @property
    def rank(self) -> int:
        """The largest rank it can have, min(m, n)."""
        return min(self.shape)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Dense:
        """The same update in another dtype or on another device."""
        return Dense(self.weight.to(device=device, dtype=dtype), self.scaling)

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """The (m, n) update, in `dtype` (default: its own)."""
        weight = self.weight if dtype is None else self.weight.to(dtype)
        return weight if self.scaling == 1.0 else weight * self.scaling

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows start..stop of the update, (stop - start, n), in `dtype` (default: its own)."""
        return Dense(self.weight[start:stop], self.scaling).delta(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class RowStream:
    """A merged update that has no low rank and is formed a block of rows at a time.

    Attributes:
        shape: (m, n).
        dtype: Dtype in which rows come.
        device: Device on which rows come.
        form: (start, stop) -> rows start..stop, (stop - start, n). The same numbers however the rows are cut in blocks.
        rank_bound: Output rank of an adapter made of it where no rank rule is given (R = sum r_i of the module).
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    form: Callable[[int, int], Tensor]
    rank_bound: int

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows start..stop, (stop - start, n), in `dtype` (default: its own)."""
        block = self.form(start, stop)
        return block if dtype is None else block.to(dtype)

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense (m, n) update. For tests and small layers only."""
        return self.rows(0, self.shape[0], dtype)


# What a merge method reads of one adapter (or checkpoint), and what it may give.
Update: TypeAlias = LowRank | Dense
Merged: TypeAlias = LowRank | Dense | RowStream


@dataclass(frozen=True, slots=True, eq=False)
class LayerInputs:
    """What a data-free merge method sees of one module.

    Attributes:
        module: Dotted name.
        factors: One entry an adapter, in the user's order; None where an adapter lacks the module (its delta is 0).
            LowRank for adapters, Dense (task vectors) for full checkpoints; all of a module are of one kind.
        weights: w_i, one an adapter; already resolved (defaults, `--on-missing present`).
        keys: One word an adapter that does not depend on the order; random draws are keyed (seed, module, key).
        stats: One entry an adapter: (n,) float64 input statistic of the module, or None where none was given.
        context: What the method's survey found over all modules; None for methods without one.
        rounding: Dtype whose rounding the factors carry, where they were widened; None for their own.
        only_present: Adapters that lack the module do not count (`--on-missing present`); otherwise their delta is 0.
    """

    module: str
    factors: Sequence[Update | None]
    weights: Sequence[float]
    keys: Sequence[str] = ()
    stats: Sequence[Tensor | None] = ()
    context: Any = field(default=None, repr=False)
    only_present: bool = False
    rounding: torch.dtype | None = None

    @property
    def present(self) -> list[tuple[float, Update]]:
        """(w_i, factors_i) of the adapters that have this module."""
        return [(w, f) for w, f in zip(self.weights, self.factors, strict=True) if f is not None]

    @property
    def count(self) -> int:
        """N, the adapters that a mean over this module runs over."""
        return len(self.present) if self.only_present else len(self.factors)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the module."""
        return self.present[0][1].shape


@dataclass(slots=True, eq=False)
class FoldStats:
    """Sums over one fold of the calibration tokens, float64, weighted by c_i lambda_i and the sample weights.

    X are the task model's inputs of the module, X~ the merged model's (mixed with X when rho is fixed), D_i = P_i A_i
    the delta of adapter i in the coordinates of the layer's basis. Sums that a delta multiplies are kept as factors:
    sum_i c_i lambda_i D_i M_i = outputs @ features, with R rows instead of m in full mode.

    Attributes:
        gram: (d, d) sum_i c_i lambda_i X~_i^T X~_i.
        outputs: (p, R) all P_i side by side.
        features: (R, d) below each other c_i lambda_i A_i X_i^T X~_i.
        cross: (d, d) sum_i c_i lambda_i X_i^T X~_i; only where the full weight or a search over rho needs it.
        prior: (d, d) sum_i c_i lambda_i X_i^T X_i; only for a search over rho.
        features_prior: (R, d) below each other c_i lambda_i A_i X_i^T X_i; only for a search over rho.
        share: Share of the tokens that are in this fold.
    """

    gram: Tensor
    outputs: Tensor
    features: Tensor
    cross: Tensor | None = None
    prior: Tensor | None = None
    features_prior: Tensor | None = None
    share: float = 1.0

    @property
    def target(self) -> Tensor:
        """(p, d) sum_i c_i lambda_i D_i X_i^T X~_i."""
        return self.outputs @ self.features

    @property
    def target_prior(self) -> Tensor | None:
        """(p, d) sum_i c_i lambda_i D_i X_i^T X_i, where it was asked for."""
        return None if self.features_prior is None else self.outputs @ self.features_prior


@dataclass(slots=True, eq=False)
class LayerStats:
    """What a calibrated method sees of one module.

    The solution is sought as delta = basis @ S with S (p, d): in delta mode the basis is an orthonormal basis of the
    columns of all B_i (p <= R), in full mode it is the identity (basis None, p = m).

    Attributes:
        module: Dotted name.
        basis: (m, p) orthonormal columns, or None for the identity.
        pairs: D_i = P_i A_i as (P_i (p, r_i), A_i (r_i, d)); None where adapter i lacks the module.
        coefficients: c_i lambda_i.
        lambdas: lambda_i.
        tokens: Calibration tokens a task.
        folds: One entry a fold.
        gram_norms: ||X~_i^T X~_i||_F a task.
        cross_norms: ||X_i^T X~_i||_F a task (equal to gram_norms when not asked for).
        variances: (d,) diagonal of X~_i^T X~_i a task.
        energy: sum_i c_i lambda_i ||Y_i||_F^2 of the outputs Y_i that the delta has to match.
        base_weight: (m, d) W0, in full mode only.
        weighting: Sample weighting: {"sigma", "tau", "ess"}, or None.
        rank: R, the largest rank of the result.
    """

    module: str
    basis: Tensor | None
    pairs: Sequence[tuple[Tensor, Tensor] | None]
    coefficients: Sequence[float]
    lambdas: Sequence[float]
    tokens: Sequence[int]
    folds: Sequence[FoldStats]
    gram_norms: Sequence[float]
    cross_norms: Sequence[float]
    variances: Sequence[Tensor]
    energy: float
    base_weight: Tensor | None
    weighting: dict[str, float | None] | None
    rank: int


@dataclass(frozen=True, slots=True, eq=False)
class LayerSolution:
    """The solved delta of one module, delta = basis @ state.

    Attributes:
        coordinates: The state itself (p, d) in delta mode; in full mode its rows (q, d) along `left`.
        factor: (d, d) lower Cholesky factor of the regularised Gram, the metric of the outputs.
        left: In full mode the leading left singular vectors (p, q), q <= R, of the solution in that metric, and its
            singular values, of which the last may stand for all that `left` leaves: their squares add up to the whole.
            Else None.
        choices: alpha and rho that a search chose; None where they were fixed.
        report: JSON-ready numbers (solver, condition, jitter, held-out gain, ...).
    """

    coordinates: Tensor
    factor: Tensor
    left: tuple[Tensor, Tensor] | None
    choices: tuple[float | None, float | None]
    report: dict[str, object]

    @property
    def state(self) -> Tensor:
        """(p, d) in the basis of the layer's statistics, before the user's rank rule; in full mode of rank R."""
        return self.coordinates if self.left is None else self.left[0] @ self.coordinates
