"""Randomized singular value decomposition of an update held as factors, with its error known exactly.

The range of delta = B A is found from a sketch, never forming the (m, n) matrix:

    Y = B (A Omega), Omega (n, k + p) Gaussian;   Q = qr(Y);   power step: Q <- qr(B (A qr(A^T (B^T Q))));
    delta ~ Q (Q^T B) A, whose small factor (k + p, n) is decomposed by a QR and an SVD of k + p columns.

What is kept is Q Q^T delta cut to rank k, an orthogonal projection of delta: its squared error is ||delta||_F^2 minus
the kept S_i^2, and ||delta||_F is known exactly from the factors. So shares of energy are of the full spectrum although
most of it is never computed.

Source: Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError, UsageError
from loraforge.linalg.bases import column_signs
from loraforge.linalg.factored import Truncated, inner, truncate
from loraforge.linalg.rank import RankRule, choose
from loraforge.types import LowRank


@dataclass(frozen=True, slots=True, eq=False)
class Approximation(LowRank):
    """A low-rank update that was cut from an exact one by the method itself.

    Attributes:
        account: The same factors with what is known of the cut: spectrum, kept energy, error.
        exact: It was found by the exact decomposition and not by a sketch.
    """

    account: Truncated | None = None
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Sketch:
    """How an update is sketched.

    Attributes:
        oversampling: p, columns of the sketch beyond the rank.
        power_iterations: Power steps.
        seed: Seed of Omega.
        exact: "auto" takes the exact decomposition where it is cheaper, "always" everywhere, "never" nowhere.
    """

    oversampling: int = 8
    power_iterations: int = 2
    seed: int = 0
    exact: str = "auto"


def generator(seed: int, word: str) -> torch.Generator:
    """A generator that depends on the seed and a word (module, adapter) only."""
    digest = hashlib.sha256(f"{seed}\0{word}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def gaussian(rows: int, columns: int, seed: int, word: str) -> Tensor:
    """(rows, columns) float64 standard normal draws of that generator, on the CPU."""
    return torch.randn(rows, columns, generator=generator(seed, word), dtype=torch.float64)


def range_basis(B: Tensor, A: Tensor, omega: Tensor, power_iterations: int) -> Tensor:
    """Orthonormal basis of the sketched range of B A.

    Args:
        B: (m, R) float64.
        A: (R, n) float64.
        omega: (n, q) test matrix, q <= min(m, n).
        power_iterations: Steps of Q <- qr(B A qr((B A)^T Q)).

    Returns:
        (m, q).
    """
    Q: Tensor = torch.linalg.qr(B @ (A @ omega)).Q
    for _ in range(power_iterations):
        Q = torch.linalg.qr(A.T @ (B.T @ Q)).Q
        Q = torch.linalg.qr(B @ (A @ Q)).Q
    return Q


def project(B: Tensor, A: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of Q Q^T B A for orthonormal Q (m, q): U (m, q), S (q,), Vh (q, n)."""
    right, triangle = torch.linalg.qr(A.T @ (B.T @ Q))
    U, S, Vh = torch.linalg.svd(triangle.T, full_matrices=False)
    return Q @ U, S, Vh @ right.T


def exact_is_cheaper(m: int, n: int, R: int, width: int, power_iterations: int) -> bool:
    """Whether the exact form costs fewer operations than a sketch of `width` columns.

    Exact: both Gram matrices and the lift, 2 (m + n) R (R + width), and about 25 R^3 of the core's SVD. Sketch: every
    pass through the factors costs 4 (m + n) R width and every QR 4 (m + n) width^2, for 1 + power_iterations passes.
    """
    exact = 2 * (m + n) * R * (R + width) + 25 * R**3
    sketch = 4 * (m + n) * width * (R + width) * (1 + power_iterations)
    return R <= width or exact <= sketch


def randomized_svd(update: LowRank, rule: RankRule, sketch: Sketch, word: str) -> Approximation:
    """Approximates an update under a rank rule from a sketch of its range.

    Args:
        update: (m, n) of rank R at most.
        rule: The rank rule; energy, ratio and error are of the full spectrum.
        sketch: How to sketch.
        word: What the draws are keyed by beside the seed (the module's name).

    Returns:
        Factors as `truncate` makes them, with the exact error. The sketch is widened twofold until it holds what the
        rule asks for; one of R columns holds everything.

    Raises:
        UsageError: A nuclear share with exact="never": it needs every singular value.
        LoraforgeError: A factor holds NaN or Inf.
    """
    m, n = update.shape
    if rule.nuclear is not None and sketch.exact == "never":
        raise UsageError(
            "A nuclear share needs every singular value, and a sketch has only some",
            got="nuclear with exact=never",
            expected="exact=auto or another rank rule",
        )
    size = inner(update, update)
    if not math.isfinite(size):
        raise LoraforgeError("Factors hold NaN or Inf", where=word, got=f"B {(m, update.rank)}, A {(update.rank, n)}")
    width = (rule.rank or rule.max_rank or 32) + sketch.oversampling
    exact = sketch.exact == "always" or rule.nuclear is not None or size == 0.0
    if not exact and sketch.exact == "auto":
        exact = exact_is_cheaper(m, n, update.rank, width, sketch.power_iterations)
    cut = truncate(update, rule) if exact else _sketched(update, rule, sketch, word, width, size)
    return Approximation(cut.factors.B, cut.factors.A, cut.factors.scaling, cut, exact)


def _sketched(update: LowRank, rule: RankRule, sketch: Sketch, word: str, width: int, size: float) -> Truncated:
    """The sketched form; `width` columns to begin with, `size` = ||delta||_F^2."""
    m, n = update.shape
    dtype = update.B.dtype if update.B.dtype == torch.float64 else torch.float32
    B, A = update.B.to(torch.float64) * update.scaling, update.A.to(torch.float64)
    limit = min(update.rank, m, n)
    while True:
        width = min(width, limit)
        omega = gaussian(n, width, sketch.seed, word).to(B.device)
        U, S, Vh = project(B, A, range_basis(B, A, omega, sketch.power_iterations))
        unseen = size - float(S.square().sum())
        if width == limit or unseen <= update.rank * torch.finfo(torch.float64).eps * size:
            unseen = 0.0  # everything was seen, the rest is rounding
        k = _rank_of(S.to(dtype), unseen, rule, m, n)
        if k <= width - sketch.oversampling or width == limit:
            break
        width *= 2
    k = min(k, width)
    half = S[:k].sqrt()
    left = (U[:, :k] * half).to(dtype)
    sign = column_signs(left)
    right = ((half * sign.to(half.dtype))[:, None] * Vh[:k]).to(dtype).contiguous()
    lost = unseen + float(S[k:].square().sum())
    return Truncated(LowRank(left * sign, right), S, 1.0 - lost / size, math.sqrt(lost), k)


def _rank_of(S: Tensor, unseen: float, rule: RankRule, m: int, n: int) -> int:
    """The rule's rank on what a sketch found; more than S has where the sketch is too narrow."""
    if unseen > 0.0 and rule.ratio is None:
        # What is not seen counts as one last direction of its energy, so that shares are of the full spectrum.
        S = torch.cat([S, S.new_tensor([math.sqrt(unseen)])])
    return choose(S, rule, m, n)
