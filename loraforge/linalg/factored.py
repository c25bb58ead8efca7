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
from itertools import islice

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.kernels.core_svd import batched_core_svd
from loraforge.linalg.bases import Backend, Side, column_signs, sides
from loraforge.linalg.pool import pool_map
from loraforge.linalg.rank import RankRule, choose
from loraforge.types import Dense, LowRank, Update

# Float64 factors of a batch: enough modules to spread the cost of small calls over, in little memory.
BATCH_BYTES = 16 * 2**20


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
    _check_summable([pair.shape for _, pair in pairs])
    every = [f for _, pair in pairs for f in (pair.B, pair.A)]
    dtype = torch.float64 if any(f.dtype == torch.float64 for f in every) else torch.float32
    B = torch.cat([pair.B.to(dtype) * (w * pair.scaling) for w, pair in pairs], dim=1)
    A = torch.cat([pair.A.to(dtype) for _, pair in pairs], dim=0)
    return LowRank(B, A, 1.0)


def weighted_sum(pairs: Sequence[tuple[float, Update]]) -> Update:
    """The exact weighted sum of updates: `stack` of factors, or the dense sum of task vectors.

    Args:
        pairs: (w_i, update_i), all of one (m, n) and all of one kind.

    Raises:
        LoraforgeError: No pair was given, shapes differ, or factors and task vectors are mixed.
    """
    low = [(w, update) for w, update in pairs if isinstance(update, LowRank)]
    if len(low) == len(pairs):
        return stack(low)
    if low:
        raise LoraforgeError("Adapters and full checkpoints cannot be summed", expected="one kind of input")
    _check_summable([update.shape for _, update in pairs])
    wide = any(update.delta().dtype == torch.float64 for _, update in pairs)
    total = torch.zeros(pairs[0][1].shape, dtype=torch.float64 if wide else torch.float32)
    total = total.to(pairs[0][1].delta().device)
    for w, update in pairs:
        total.add_(update.delta(total.dtype), alpha=w)
    return Dense(total)


def _check_summable(shapes: Sequence[tuple[int, int]]) -> None:
    if not shapes:
        raise LoraforgeError("Nothing to sum: no adapter has this module", expected="at least one pair of factors")
    if len(set(shapes)) > 1:
        raise LoraforgeError(
            "Updates of different shapes cannot be summed", got=sorted(set(shapes)), expected="one (m, n)"
        )


def decompose(lr: LowRank, backend: Backend = "auto") -> FactoredSVD:
    """Exact singular value decomposition of an update from its factors.

    Args:
        lr: The update, (m, n) of rank at most r.
        backend: How the bases are found; see loraforge.linalg.bases.

    Returns:
        The decomposition in float64. Each pair's sign makes the largest entry of the core's left vector positive.
    """
    left, right = sides([lr], backend)
    U, S, Vh = batched_core_svd([left.triangle[0] @ right.triangle[0].T])[0]
    sign = column_signs(U)
    return FactoredSVD(left.basis()[0], U * sign, S, Vh * sign[:, None], right.basis()[0])


def truncate(lr: LowRank, rule: RankRule, backend: Backend = "auto") -> Truncated:
    """Best approximation of an update under a rank rule; see `truncate_many`."""
    return truncate_many([lr], rule, backend)[0]


def truncate_many(
    updates: Sequence[LowRank], rule: RankRule | Sequence[RankRule], backend: Backend = "auto"
) -> list[Truncated]:
    """Best approximation of every module under a rank rule, applied to its full spectrum.

    Modules of one shape are decomposed in batches, batches in a pool with one BLAS thread each. How modules are
    batched does not depend on the number of threads. On a GPU batches follow each other, see `resident`.

    Args:
        updates: One update a module, of any shapes.
        rule: One rule for all, or one a module.
        backend: How the bases are found; see loraforge.linalg.bases.

    Returns:
        One result a module, in order.

    Raises:
        LoraforgeError: A factor holds NaN or Inf, or rules and modules differ in number.
    """
    rules = [rule] * len(updates) if isinstance(rule, RankRule) else list(rule)
    if len(rules) != len(updates):
        raise LoraforgeError("Rank rules and modules differ in number", got=len(rules), expected=len(updates))
    if backend == "auto" and updates and all(lr.B.device.type == "cuda" for lr in updates):
        from loraforge.linalg.resident import truncate_resident

        return truncate_resident(updates, rules)
    done: dict[int, Truncated] = {}
    for window in windows(batches(updates, BATCH_BYTES)):
        bases = pool_map(lambda batch: sides([updates[i] for i in batch], backend), window)
        cores = [core for left, right in bases for core in left.triangle @ right.triangle.mT]
        found = iter(batched_core_svd(cores))
        jobs = [(batch, *pair, [next(found) for _ in batch]) for batch, pair in zip(window, bases, strict=True)]
        cut = pool_map(lambda job: cut_batch([updates[i] for i in job[0]], [rules[i] for i in job[0]], *job[1:]), jobs)
        for batch, results in zip(window, cut, strict=True):
            done.update(zip(batch, results, strict=True))
    return [done[index] for index in range(len(updates))]


def cut_batch(
    updates: Sequence[LowRank],
    rules: Sequence[RankRule],
    left: Side,
    right: Side,
    cores: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> list[Truncated]:
    """Cuts decomposed modules of one shape and splits sqrt(S) over both factors, signs fixed.

    Args:
        updates: The updates that were decomposed.
        rules: One rank rule a module.
        left: Left sides of the batch.
        right: Right sides of the batch.
        cores: (U (p, q), S (q,), Vh (q, p')) a module.

    Returns:
        One result a module. Each column of B has its largest entry by size positive; vectors of equal singular
        values stay arbitrary within their subspace.
    """
    dtype = updates[0].B.dtype if updates[0].B.dtype == torch.float64 else torch.float32
    m, n = updates[0].shape
    ranks = [choose(S.to(dtype), rule, m, n) for (_, S, _), rule in zip(cores, rules, strict=True)]
    top = max(ranks)
    half = torch.stack([S[:top] for _, S, _ in cores]).sqrt()
    B = left.times(torch.stack([U[:, :top] for U, _, _ in cores]) * half[:, None, :]).to(dtype)
    sign = column_signs(B)
    A = right.rows(torch.stack([Vh[:top] for _, _, Vh in cores]).mT * (half * sign)[:, None, :]).to(dtype)
    B *= sign[:, None, :]
    results = []
    for index, ((_, S, _), k) in enumerate(zip(cores, ranks, strict=True)):
        factors = LowRank(B[index, :, :k].contiguous(), A[index, :k].contiguous(), 1.0)
        squares = [s * s for s in S.tolist()]
        total, tail = math.fsum(squares), math.fsum(squares[k:])
        kept = 1.0 - tail / total if total > 0.0 else 1.0
        # A zero update of rank below min_rank is widened with zeros.
        results.append(Truncated(pad(factors, k) if factors.rank < k else factors, S, kept, math.sqrt(tail), k))
    return results


def pad(lr: LowRank, k: int) -> LowRank:
    """The same update with zero columns and rows up to rank k (for consumers that need one rank everywhere)."""
    extra = k - lr.rank
    if extra < 0:
        raise LoraforgeError("Padding cannot lower a rank", got=lr.rank, expected=f"at most {k}")
    m, n = lr.shape
    return LowRank(
        torch.cat([lr.B, lr.B.new_zeros(m, extra)], dim=1), torch.cat([lr.A, lr.A.new_zeros(extra, n)]), lr.scaling
    )


def inner(a: Update, b: Update) -> float:
    """<delta_a, delta_b>_F, accumulated in float64; of factors as sum((B_a^T B_b) * (A_a A_b^T)).

    Raises:
        LoraforgeError: The updates differ in shape or kind.
    """
    if a.shape != b.shape:
        raise LoraforgeError("Updates of different shapes have no inner product", got=a.shape, expected=b.shape)
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        left = a.B.to(torch.float64).T @ b.B.to(torch.float64)
        right = a.A.to(torch.float64) @ b.A.to(torch.float64).T
        return float((left * right).sum()) * a.scaling * b.scaling
    x, y = a.delta(), b.delta()
    rows = max(1, 2**20 // max(1, a.shape[1]))
    blocks = [
        (x[i : i + rows].to(torch.float64) * y[i : i + rows].to(torch.float64)).sum()
        for i in range(0, a.shape[0], rows)
    ]
    return math.fsum(float(block) for block in blocks)


def norm(a: Update) -> float:
    """Frobenius norm of an update."""
    return math.sqrt(max(inner(a, a), 0.0))


def batches(updates: Sequence[LowRank], limit: int) -> Iterator[list[int]]:
    """Indices of updates of one shape, rank, dtype and device, within `limit` bytes of float64 factors."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, lr in enumerate(updates):
        groups.setdefault((lr.B.shape, lr.A.shape, lr.B.dtype, lr.B.device), []).append(index)
    for group in groups.values():
        lr = updates[group[0]]
        size = max(1, limit // (8 * max(1, lr.B.numel() + lr.A.numel())))
        yield from (group[start : start + size] for start in range(0, len(group), size))


def windows(found: Iterator[list[int]]) -> Iterator[list[list[int]]]:
    """As many batches at a time as there are threads to work on them."""
    threads = torch.get_num_threads()
    while window := list(islice(found, threads)):
        yield window
