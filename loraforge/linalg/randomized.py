"""Randomized singular value decomposition of an update held as factors, with its error known exactly.

The range of delta = B A is found from a sketch, never forming the (m, n) matrix:

    Y = B (A Omega), Omega (n, k + p) Gaussian;   Q = qr(Y);   power step: Q <- qr(B (A qr(A^T (B^T Q))));
    delta ~ Q (Q^T B) A, whose small factor (k + p, n) is decomposed by a QR and an SVD of k + p columns.

What is kept is Q Q^T delta cut to rank k, an orthogonal projection of delta: its squared error is ||delta||_F^2 minus
the kept S_i^2, and ||delta||_F is known exactly from the factors. So shares of energy are of the full spectrum although
most of it is never computed.

On a GPU, modules of one shape are sketched together, and blocks of float32 factors are made orthonormal by two passes
of pivoted Cholesky on their Gram matrix (CholeskyQR2 with cut-off) where the CPU takes Householder QR: a column that
adds less than the rounding of float32 to the others becomes 0.

Source: Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError, UsageError
from loraforge.kernels.core_svd import core_svd_stack
from loraforge.kernels.gram_cholesky import gram_factor
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


def orthonormal(Y: Tensor, *, gram: bool = False) -> tuple[Tensor, Tensor]:
    """Y = Q T with orthonormal columns Q.

    Args:
        Y: (rows, q) or a batch of such, float64.
        gram: Two passes of pivoted Cholesky on the Gram matrix in place of Householder QR.

    Returns:
        Q of the shape of Y and T (q, q). In the Gram form Q has columns of zeros where Y has fewer directions than
        columns to 1e-7 of a column, and Y is Q T to that.
    """
    if not gram:
        Q, T = torch.linalg.qr(Y)
        return Q, T
    first = gram_factor((Y.mT @ Y).reshape(-1, Y.shape[-1], Y.shape[-1]))
    shape = (*Y.shape[:-2], Y.shape[-1], Y.shape[-1])
    Q = Y @ first.solve.reshape(shape)
    second = gram_factor((Q.mT @ Q).reshape(-1, Y.shape[-1], Y.shape[-1]))
    return Q @ second.solve.reshape(shape), (second.triangle @ first.triangle).reshape(shape)


def range_basis(B: Tensor, A: Tensor, omega: Tensor, power_iterations: int, *, gram: bool = False) -> Tensor:
    """Orthonormal basis of the sketched range of B A; all arguments may have a batch in front.

    Args:
        B: (m, R) float64.
        A: (R, n) float64.
        omega: (n, q) test matrix, q <= min(m, n).
        power_iterations: Steps of Q <- qr(B A qr((B A)^T Q)).
        gram: See `orthonormal`.

    Returns:
        (m, q).
    """
    Q = orthonormal(B @ (A @ omega), gram=gram)[0]
    for _ in range(power_iterations):
        Q = orthonormal(A.mT @ (B.mT @ Q), gram=gram)[0]
        Q = orthonormal(B @ (A @ Q), gram=gram)[0]
    return Q


def project(B: Tensor, A: Tensor, Q: Tensor, *, gram: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of Q Q^T B A for orthonormal Q (m, q): U (m, q), S (q,), Vh (q, n); all may have a batch in front.

    `gram` is that of `orthonormal`; the small SVDs then are those of `core_svd_stack`.
    """
    right, triangle = orthonormal(A.mT @ (B.mT @ Q), gram=gram)
    U, S, Vh = core_svd_stack(triangle.mT) if gram else torch.linalg.svd(triangle.mT, full_matrices=False)
    return Q @ U, S, Vh @ right.mT


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
    if update.B.device.type == "cuda":
        from loraforge.linalg.sketched_batch import randomized_svd_many

        return randomized_svd_many([update], rule, sketch, [word])[0]
    refuse_unseen_shares(rule, sketch)
    size = inner(update, update)
    refuse_unbounded(size, update, word)
    width = first_width(rule, sketch)
    exact = wants_exact(update, rule, sketch, size)
    cut = truncate(update, rule) if exact else _sketched(update, rule, sketch, word, width, size)
    return Approximation(cut.factors.B, cut.factors.A, cut.factors.scaling, cut, exact)


def first_width(rule: RankRule, sketch: Sketch) -> int:
    """Columns that a sketch begins with."""
    return (rule.rank or rule.max_rank or 32) + sketch.oversampling


def wants_exact(update: LowRank, rule: RankRule, sketch: Sketch, size: float) -> bool:
    """Whether the exact decomposition is taken, for ||delta||_F^2 = size."""
    if sketch.exact == "always" or rule.nuclear is not None or size == 0.0:
        return True
    width = first_width(rule, sketch)
    return sketch.exact == "auto" and exact_is_cheaper(*update.shape, update.rank, width, sketch.power_iterations)


def refuse_unseen_shares(rule: RankRule, sketch: Sketch) -> None:
    """Refuses a rule that no sketch can follow."""
    if rule.nuclear is not None and sketch.exact == "never":
        raise UsageError(
            "A nuclear share needs every singular value, and a sketch has only some",
            got="nuclear with exact=never",
            expected="exact=auto or another rank rule",
        )


def refuse_unbounded(size: float, update: LowRank, word: str) -> None:
    """Refuses a module whose norm tells of NaN or Inf."""
    if not math.isfinite(size):
        m, n = update.shape
        raise LoraforgeError("Factors hold NaN or Inf", where=word, got=f"B {(m, update.rank)}, A {(update.rank, n)}")


def seen_rank(
    S: Tensor, size: float, update: LowRank, rule: RankRule, sketch: Sketch, limit: int
) -> tuple[int | None, float]:
    """The rule's rank on a sketch's singular values S (width,), on the CPU, and the energy that it did not see.

    The rank is None where the sketch is too narrow for it; one of `limit` columns never is.
    """
    width = S.numel()
    dtype = update.B.dtype if update.B.dtype == torch.float64 else torch.float32
    unseen = size - float(S.square().sum())
    if width == limit or unseen <= update.rank * torch.finfo(torch.float64).eps * size:
        unseen = 0.0  # everything was seen, the rest is rounding
    k = _rank_of(S.to(dtype), unseen, rule, *update.shape)
    if k > width - sketch.oversampling and width < limit:
        return None, unseen
    return min(k, width), unseen


def _sketched(update: LowRank, rule: RankRule, sketch: Sketch, word: str, width: int, size: float) -> Truncated:
    """The sketched form; `width` columns to begin with, `size` = ||delta||_F^2."""
    m, n = update.shape
    dtype = update.B.dtype if update.B.dtype == torch.float64 else torch.float32
    B, A = update.B.to(torch.float64) * update.scaling, update.A.to(torch.float64)
    limit = min(update.rank, m, n)
    k = None
    while k is None:
        width = min(width, limit)
        omega = gaussian(n, width, sketch.seed, word)
        U, S, Vh = project(B, A, range_basis(B, A, omega, sketch.power_iterations))
        k, unseen = seen_rank(S, size, update, rule, sketch, limit)
        width *= 2
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
