"""Best rank-k approximation of an update that has no factors: exact where it is small, a seeded sketch where not.

Rows are asked for in blocks, `update.rows(start, stop)`, and dropped again, so an update of any height fits. With V an
orthonormal basis of the leading right singular directions, W V = P S Q^T gives W ~ P_k S_k (V Q_k)^T, and
||W - that||^2 = ||W||^2 - sum_{i<=k} S_i^2 holds exactly for any such V. From l random directions V_0, one step is one
pass over the rows, V_{j+1} = orth(W^T (W V_j)) block by block, because rows of a stream cost more to form than to
multiply; V spans the last two of them, which is worth more than another step (a block Krylov space). On spectra as
slow as (1 + i / 50)^(-1/2) the error is within 1 % of the optimum, on fast ones far nearer.

Source: Halko, Martinsson and Tropp, SIAM Review 53 (2011); Musco and Musco, NeurIPS 2015.
Cost: 3 passes over the rows, 12 m n l flops, l = k + max(10, k / 4); memory 2 (m + n) l and one block, or the
whole update where that is small (HELD_BYTES).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.linalg.bases import column_signs
from loraforge.linalg.factored import Truncated, pad, truncate
from loraforge.linalg.rank import RankRule, choose
from loraforge.types import Dense, LowRank, Merged

# Largest min(m, n) and m n of a dense decomposition: 0.1 s in float64, as long as the sketch of such a matrix; 64 MB.
EXACT_SIDE, EXACT_ENTRIES = 512, 2**23
BLOCK_ENTRIES = 2**21
# Rows of a stream up to this size are formed once and held for all passes; the numbers are the same either way.
HELD_BYTES = 2**26
POWER_STEPS = 2
# Float32 products blur directions under sqrt(eps) of the largest; they can matter only where little else is left.
BLURRED = 1e-4
# A rest of the squared norm that is rounding of the two sums it is the difference of.
ROUNDING = 1e-13


def low_rank(update: Merged, rule: RankRule, module: str = "") -> Truncated:
    """Best approximation of an update under a rank rule.

    Args:
        update: (m, n). Factors go through their core (`factored.truncate`); for a stream of rows the rank is clamped to
            `rank_bound`, for every update to min(m, n).
        rule: The rank rule. Shares of energy and Frobenius errors are of the whole update. In a sketch the spectrum is
            known up to the clamp of the rank and a little further, so a nuclear share is one of that part, and a goal
            that the clamp does not allow to reach gives the clamp.
        module: Name of the module: the key of the sketch's random directions, and what an error names.

    Returns:
        Factors in float64 where rows come in float64, else float32. `kept_energy` and `error` are exact to rounding,
        also where the spectrum (2 l values of a sketch, min(m, n) of a dense decomposition) is not whole.

    Raises:
        LoraforgeError: The update holds NaN or Inf.
    """
    if isinstance(update, LowRank):
        return truncate(update, rule)
    m, n = update.shape
    most = min(m, n, getattr(update, "rank_bound", min(m, n)))
    wanted = max(rule.rank, rule.min_rank) if rule.rank is not None else most
    k = max(1, min(wanted, most, max(rule.max_rank or most, rule.min_rank)))
    directions = k + max(10, k // 4)
    small = min(m, n) <= EXACT_SIDE and m * n <= EXACT_ENTRIES
    if small or 3 * directions >= min(m, n):
        W = torch.cat([X.to(torch.float64) for X in _blocks(update)])
        _check(float(W.sum()), module)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return _cut(U, S, Vh, None, rule, k, update.rows(0, 0).dtype)
    dtype = torch.float64 if update.rows(0, 0).dtype == torch.float64 else torch.float32
    if m * n * dtype.itemsize <= HELD_BYTES:
        update = Dense(update.delta())
    U, S, Vh, energy = _sketch(update, directions, module, dtype)
    if dtype == torch.float32 and energy - math.fsum(s * s for s in S.tolist()) < BLURRED * energy:
        U, S, Vh, energy = _sketch(update, directions, module, torch.float64)
    return _cut(U, S, Vh, energy, rule, k, dtype)


def block_rows(n: int) -> int:
    """Rows of a block: a power of two, from the width alone, so that results do not depend on memory or threads."""
    return 1 << max(0, (BLOCK_ENTRIES // max(1, n)).bit_length() - 1)


def _blocks(update: Merged, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """All rows, (block_rows, n) at a time."""
    step = block_rows(update.shape[1])
    for start in range(0, update.shape[0], step):
        yield update.rows(start, min(start + step, update.shape[0]), dtype)


def _sketch(update: Merged, directions: int, module: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, float]:
    """Leading singular triplets and the squared Frobenius norm of an update, with products in `dtype`.

    Returns:
        U (m, q), S (q,), Vh (q, n) in float64, q = 2 l, and ||W||_F^2.
    """
    n = update.shape[1]
    device = update.rows(0, 0).device
    seed = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "little") >> 1
    # Drawn on the CPU: the same directions on every device.
    V = torch.randn(n, directions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)
    before = V
    for _ in range(POWER_STEPS):
        before = torch.linalg.qr(V).Q
        narrow = before.to(dtype)
        Z = torch.zeros_like(narrow)
        for X in _blocks(update, dtype):
            Z.addmm_(X.T, X @ narrow)
        V = Z.to(torch.float64)
    V = torch.linalg.qr(torch.cat([before, torch.linalg.qr(V).Q], dim=1)).Q
    narrow = V.to(dtype)
    parts, squares = [], []
    for X in _blocks(update, dtype):
        parts.append((X @ narrow).to(torch.float64))
        squares.append(torch.linalg.vector_norm(X, dtype=torch.float64).square())
    Q, triangle = torch.linalg.qr(torch.cat(parts))
    # The device is asked once: a NaN or Inf anywhere in the rows is in their norm, and one in V is in the triangle.
    energy = torch.stack(squares).sum()
    size, total = torch.stack([energy, triangle.sum()]).tolist()
    _check(size + total, module)
    U, S, Vh = torch.linalg.svd(triangle, full_matrices=False)
    return Q @ U, S, Vh @ V.T, size


def _cut(
    U: Tensor, S: Tensor, Vh: Tensor, energy: float | None, rule: RankRule, most: int, dtype: torch.dtype
) -> Truncated:
    """The rank rule on a spectrum of which the rest is known by its energy alone, and the split of sqrt(S).

    Args:
        U: (m, q).
        S: (q,) leading singular values.
        Vh: (q, n).
        energy: ||W||_F^2; None where S is the whole spectrum.
        rule: The rank rule.
        most: Largest k.
        dtype: Dtype of the rows: its rounding decides which directions are there.
    """
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    m, n = U.shape[0], Vh.shape[1]
    squares = [s * s for s in S.tolist()]
    if energy is None:
        energy = math.fsum(squares)
    rest = energy - math.fsum(squares)
    rest = rest if rest > ROUNDING * energy else 0.0
    known = S
    if rest and (rule.energy is not None or rule.fro_error is not None):
        known = torch.cat([S, S.new_tensor([math.sqrt(rest)])])  # what is left, as one value: sums of squares are right
    k = choose(known.to(dtype), rule, m, n)
    if energy > 0.0:
        k = min(k, most)
    tail = math.fsum([rest, *squares[k:]])
    sign = column_signs(U[:, :k])
    half = S[:k].sqrt()
    factors = LowRank((U[:, :k] * (half * sign)).to(dtype), (Vh[:k] * (half * sign)[:, None]).to(dtype))
    kept = 1.0 - tail / (tail + math.fsum(squares[:k])) if energy > 0.0 else 1.0
    return Truncated(pad(factors, k) if factors.rank < k else factors, S, kept, math.sqrt(tail), k)


def _check(total: float, module: str) -> None:
    if not math.isfinite(total):
        raise LoraforgeError("A merged update holds NaN or Inf", where=module)
