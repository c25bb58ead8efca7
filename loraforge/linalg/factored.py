"""Exact linear algebra on updates held as factors: sums, best rank-k approximation, inner products.

With L = [w_1 s_1 B_1 | ...] (m, R) and A = [A_1; ...] (R, n) the sum of updates is L A exactly. Orthogonal bases of
both sides reduce its singular value decomposition to one of an R x R core, so the m x n update is never formed: L =
Q_l R_l, A^T = Q_a R_a, core C = R_l R_a^T = u S v^T, delta = (Q_l u) S (Q_a v)^T. By Eckart and Young the first k
terms are the best rank-k approximation and its error is sqrt(sum_{i>k} S_i^2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.kernels.core_svd import batched_core_svd
from loraforge.linalg.bases import Backend, Side, column_signs, sides
from loraforge.linalg.pool import pool_map
from loraforge.linalg.rank import RankRule, choose
from loraforge.types import LowRank

WINDOW_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class FactoredSVD:
    """delta = (Q_l U) diag(S) (Vh Q_a^T), everything in float64.

    Attributes:
        Q_l: (m, p) orthonormal columns, p = min(m, R).
        U: (p, q) left vectors of the core, q = min(p, p').
        S: (q,) singular values, descending.
        Vh: (q, p') right vectors of the core.
        Q_a: (n, p') orthonormal columns, p' = min(n, R).
    """

    Q_l: Tensor
    U: Tensor
    S: Tensor
    Vh: Tensor
    Q_a: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Truncated:
    """The best approximation of a module under a rank rule.

    Attributes:
        factors: B (m, k), A (k, n) with sqrt(S) on both sides, scaling 1, in the dtype of the input factors.
        spectrum: (q,) all singular values of the input, float64, descending.
        kept_energy: Share of sum S^2 that is kept (1 for a zero delta).
        error: Absolute Frobenius error of the cut.
        rank: k.
    """

    factors: LowRank
    spectrum: Tensor
    kept_energy: float
    error: float
    rank: int


def stack(pairs: Sequence[tuple[float, LowRank]]) -> LowRank:
    """The exact weighted sum of updates, factors side by side.

    Args:
        pairs: (w_i, factors_i), all of one (m, n).

    Returns:
        B (m, R) with w_i * scaling_i folded in, A (R, n), scaling 1; float64 if any factor is, else float32.

    Raises:
        LoraforgeError: No pair was given, or shapes differ.
    """
    if not pairs:
        raise LoraforgeError("Nothing to sum: no adapter has this module", expected="at least one pair of factors")
    shapes = {pair.shape for _, pair in pairs}
    if len(shapes) > 1:
        raise LoraforgeError("Updates of different shapes cannot be summed", got=sorted(shapes), expected="one (m, n)")
    every = [f for _, pair in pairs for f in (pair.B, pair.A)]
    dtype = torch.float64 if any(f.dtype == torch.float64 for f in every) else torch.float32
    B = torch.cat([pair.B.to(dtype) * (w * pair.scaling) for w, pair in pairs], dim=1)
    A = torch.cat([pair.A.to(dtype) for _, pair in pairs], dim=0)
    return LowRank(B, A, 1.0)


def decompose(lr: LowRank, backend: Backend = "auto") -> FactoredSVD:
    """Exact singular value decomposition of an update from its factors.

    Args:
        lr: The update, (m, n) of rank at most r.
        backend: How the bases are found; see the module's docstring.

    Returns:
        The decomposition in float64. Each pair's sign makes the largest entry of the core's left vector positive.
    """
    left, right = sides(lr, backend)
    U, S, Vh = batched_core_svd([left.triangle @ right.triangle.T])[0]
    sign = column_signs(U)
    return FactoredSVD(left.basis(), U * sign, S, Vh * sign[:, None], right.basis())


def truncate(lr: LowRank, rule: RankRule, backend: Backend = "auto") -> Truncated:
    """Best approximation of an update under a rank rule (05 2.1).

    Args:
        lr: The update, (m, n).
        rule: The rank rule, applied to the full spectrum.
        backend: How the bases are found.

    Returns:
        Balanced factors with scaling 1, the spectrum and the exact error.
    """
    left, right = sides(lr, backend)
    return finish(lr, rule, left, right, *batched_core_svd([left.triangle @ right.triangle.T])[0])


def truncate_many(
    updates: Sequence[LowRank], rule: RankRule | Sequence[RankRule], backend: Backend = "auto"
) -> list[Truncated]:
    """`truncate` over modules: bases and cores in windows, the core decompositions batched.

    Args:
        updates: One update a module.
        rule: One rule for all, or one a module.
        backend: How the bases are found.

    Returns:
        One result a module, in order; equal to `truncate` of each.
    """
    rules = [rule] * len(updates) if isinstance(rule, RankRule) else list(rule)
    if len(rules) != len(updates):
        raise LoraforgeError("Rank rules and modules differ in number", got=len(rules), expected=len(updates))
    done: list[Truncated] = []
    for window in windows(updates):
        bases = pool_map(lambda i: sides(updates[i], backend), window)
        cores = batched_core_svd([left.triangle @ right.triangle.T for left, right in bases])
        jobs = list(zip(window, bases, cores, strict=True))
        done += pool_map(lambda job: finish(updates[job[0]], rules[job[0]], *job[1], *job[2]), jobs)
    return done


def finish(lr: LowRank, rule: RankRule, left: Side, right: Side, U: Tensor, S: Tensor, Vh: Tensor) -> Truncated:
    """Cuts one decomposed module and splits sqrt(S) over both factors, signs fixed.

    Args:
        lr: The update that was decomposed, for its dtype.
        rule: The rank rule.
        left: Left side of the update.
        right: Right side of the update.
        U: (p, q) core vectors, left.
        S: (q,) singular values.
        Vh: (q, p') core vectors, right.

    Returns:
        The truncated update. Each column of B has its largest entry (by size, the first of equals) positive; vectors of
        equal singular values stay arbitrary within their subspace.
    """
    dtype = lr.B.dtype if lr.B.dtype == torch.float64 else torch.float32
    m, n = lr.shape
    k = choose(S.to(dtype), rule, m, n)
    half = S[:k].sqrt()
    B, A = left.times(U[:, :k] * half), right.times(Vh[:k].T * half).T
    if k > S.numel():
        B, A = pad(LowRank(B, A), k).B, pad(LowRank(B, A), k).A
    sign = column_signs(B)
    squares = S.square()
    total, tail = float(squares.sum()), float(squares[k:].sum())
    factors = LowRank((B * sign).to(dtype).contiguous(), (A * sign[:, None]).to(dtype).contiguous(), 1.0)
    return Truncated(factors, S, 1.0 if total == 0.0 else 1.0 - tail / total, math.sqrt(tail), k)


def pad(lr: LowRank, k: int) -> LowRank:
    """The same update with zero columns and rows up to rank k (for consumers that need one rank everywhere)."""
    extra = k - lr.rank
    if extra < 0:
        raise LoraforgeError("Padding cannot lower a rank", got=lr.rank, expected=f"at most {k}")
    m, n = lr.shape
    return LowRank(
        torch.cat([lr.B, lr.B.new_zeros(m, extra)], dim=1), torch.cat([lr.A, lr.A.new_zeros(extra, n)]), lr.scaling
    )


def inner(a: LowRank, b: LowRank) -> float:
    """<delta_a, delta_b>_F from the factors: sum((B_a^T B_b) * (A_a A_b^T)), accumulated in float64.

    Raises:
        LoraforgeError: The updates differ in shape.
    """
    if a.shape != b.shape:
        raise LoraforgeError("Updates of different shapes have no inner product", got=a.shape, expected=b.shape)
    left = a.B.to(torch.float64).T @ b.B.to(torch.float64)
    right = a.A.to(torch.float64) @ b.A.to(torch.float64).T
    return float((left * right).sum()) * a.scaling * b.scaling


def norm(a: LowRank) -> float:
    """Frobenius norm of an update from its factors."""
    return math.sqrt(max(inner(a, a), 0.0))


def windows(updates: Sequence[LowRank]) -> Iterator[list[int]]:
    """Index windows whose float64 bases stay within WINDOW_BYTES (one module at least)."""
    window: list[int] = []
    held = 0
    for index, lr in enumerate(updates):
        size = 16 * (lr.B.numel() + lr.A.numel())
        if window and held + size > WINDOW_BYTES:
            yield window
            window, held = [], 0
        window.append(index)
        held += size
    if window:
        yield window
