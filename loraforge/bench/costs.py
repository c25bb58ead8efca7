"""Bytes and flops of every operator, counted from shapes: what an implementation without waste moves and computes.

An input is counted once, however often it is read, and an in-place accumulator as read and written. A multiply-add is
two flops. Work that depends on the data (medians, searches) is counted by its passes over the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Flops of the thin SVD of an R x R matrix with all vectors: the count of Golub and Van Loan for the
# Golub-Reinsch algorithm, whatever algorithm is used.
SVD_FLOPS = 22


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call has to do.

    Attributes:
        read: Bytes read.
        written: Bytes written.
        flops: Floating-point operations.
        precision: Dtype of most of them: float32, float64 or bfloat16; says which ceiling counts.
    """

    read: int
    written: int
    flops: int
    precision: str = "float32"

    @property
    def bytes(self) -> int:
        """Bytes moved."""
        return self.read + self.written


def anderson_dots(m: int, P: int, itemsize: int = 4) -> Cost:
    """Reads H (m, P) and f (P,) once, writes m + 1 float64; m + 1 dot products of length P in float64."""
    return Cost((m + 1) * P * itemsize, 8 * (m + 1), 2 * (m + 1) * P, "float64")


def anderson_mix(m: int, P: int, itemsize: int = 4) -> Cost:
    """Reads X and F (m, P), writes out (P,); two multiply-adds an entry of X in float64."""
    return Cost(2 * m * P * itemsize + 8 * m, P * itemsize, 4 * m * P, "float64")


def dcs_variance(S: int, R: int, itemsize: int = 4) -> Cost:
    """Reads Y (S, R) and M (R, R) float64, writes (S,) float64; y M and its product with y in float64."""
    return Cost(S * R * itemsize + 8 * R * R, 8 * S, 2 * S * R * R + 2 * S * R, "float64")


def dcs_weights(S: int) -> Cost:
    """Reads V (S,) float64, writes w; 40 passes: two medians, exponentials and sums of a search for the floor."""
    return Cost(8 * S, 8 * S + 24, 40 * S, "float64")


def dcs_batch(b: int, S: int, R: int, itemsize: int = 4) -> Cost:
    """b modules: reads Y (b, S, R) and M (b, R, R) float64, writes w (b, S) and 3 numbers each; flops of both parts."""
    one, weights = dcs_variance(S, R, itemsize), dcs_weights(S)
    return Cost(b * one.read, b * (8 * S + 24), b * (one.flops + weights.flops), "float64")


def cov_pack(T: int, d: int, kept: int, itemsize: int, out_itemsize: int, weighted: bool) -> Cost:
    """Reads the mask (T bytes), `kept` rows of x and their float32 weights, writes `kept` rows; a product an entry."""
    read = T + kept * d * itemsize + (4 * kept if weighted else 0)
    return Cost(read, kept * d * out_itemsize, kept * d if weighted else 0)


def cov_fold_(d: int, columns: int, symmetric: bool, itemsize: int = 4) -> Cost:
    """Reads the product and acc (d, columns) float64, of both the triangle if symmetric; writes acc; one sum each."""
    entries = d * columns
    used = d * (d + 1) // 2 if symmetric else entries
    return Cost(used * (itemsize + 8), 8 * entries, used, "float64")


def gram_(T: int, d: int, itemsize: int, rows: int | None = None) -> Cost:
    """Reads X, reads and writes acc (d, d) float64; the triangle of X^T X over `rows` (default T) rows.

    16-bit rows are multiplied at the rate of bfloat16, all others at that of float32.
    """
    used = T if rows is None else rows
    return Cost(
        used * d * itemsize + 8 * d * d, 8 * d * d, used * d * (d + 1), "bfloat16" if itemsize == 2 else "float32"
    )


def batched_core_svd(b: int, R: int, itemsize: int = 4) -> Cost:
    """Reads b cores (R, R), writes U, S, Vh of each; 22 R^3 flops a core."""
    precision = "float64" if itemsize == 8 else "float32"
    return Cost(b * R * R * itemsize, b * (2 * R * R + R) * itemsize, SVD_FLOPS * b * R**3, precision)


def pick_rank(b: int, R: int, itemsize: int = 4) -> Cost:
    """Reads S (b, R), writes b int64; a square, a sum and a comparison an entry in float64."""
    return Cost(b * R * itemsize, 8 * b, 3 * b * R, "float64")


def scale_write(m: int, n: int, R: int, k: int, itemsize: int = 4, out_itemsize: int = 4) -> Cost:
    """Reads the first k columns of U (m, R), rows of Vh (R, n) and S, writes B (m, k), A (k, n); a product an entry."""
    return Cost((m + n + 1) * k * itemsize, (m + n) * k * out_itemsize, (m + n + 1) * k)


def core_svd_stack(b: int, R: int, itemsize: int = 4) -> Cost:
    """As `batched_core_svd`, on one stack (b, R, R)."""
    return batched_core_svd(b, R, itemsize)


def jacobi_svd(b: int, R: int, itemsize: int = 4) -> Cost:
    """As `batched_core_svd`, on one stack (b, R, R)."""
    return batched_core_svd(b, R, itemsize)


def gram_factor(b: int, R: int) -> Cost:
    """Reads b float64 Grams (R, R), writes T and Z of each; R^3 / 3 flops of a factor, as many of an inverse."""
    return Cost(8 * b * R * R, 16 * b * R * R, 2 * b * R**3 // 3, "float64")


def consistency_forward(T: int, H: int, kept: int, itemsize: int) -> Cost:
    """Reads the mask (T bytes) and `kept` rows of P and S, writes one number; 4 flops an entry."""
    return Cost(T + 2 * kept * H * itemsize, 8, 4 * kept * H)


def consistency_backward(T: int, H: int, kept: int, itemsize: int) -> Cost:
    """Reads the mask and `kept` rows of P and S, writes the gradient (T, H); difference, test and product an entry."""
    return Cost(T + 2 * kept * H * itemsize + 8, T * H * itemsize, 3 * kept * H)


def consistency_sum(T: int, H: int, kept: int, itemsize: int) -> Cost:
    """Forward and backward pass."""
    one, two = consistency_forward(T, H, kept, itemsize), consistency_backward(T, H, kept, itemsize)
    return Cost(one.read + two.read, one.written + two.written, one.flops + two.flops)


def consistency_loss(layers: int, T: int, H: int, kept: int, itemsize: int) -> Cost:
    """Forward and backward pass of every layer."""
    one = consistency_sum(T, H, kept, itemsize)
    return Cost(layers * one.read, layers * one.written, layers * one.flops)


def entry_merge(N: int, m: int, n: int, r: int, itemsize: int = 4) -> Cost:
    """Reads N pairs of float64 factors, writes (m, n); N products of length r and 4 flops of rule and join an entry."""
    return Cost(8 * N * (m + n) * r, m * n * itemsize, N * (2 * r + 4) * m * n, "float64")


def entry_counts_(m: int, n: int, r: int, buckets: int) -> Cost:
    """Reads a pair of float64 factors, reads and writes the counts (int64); one product of length r an entry."""
    return Cost(8 * (m + n) * r + 8 * buckets, 8 * buckets, 2 * r * m * n, "float64")


def drop_rescale_(t: int, n: int, itemsize: int = 4) -> Cost:
    """Reads and writes a tile (t, n); one product an entry. The draws' whole-number arithmetic is not counted."""
    return Cost(t * n * itemsize, t * n * itemsize, t * n)


COSTS: dict[str, Callable[..., Cost]] = {
    function.__name__: function
    for function in (
        anderson_dots, anderson_mix, dcs_variance, dcs_weights, dcs_batch, cov_pack, cov_fold_, gram_,
        batched_core_svd, jacobi_svd, pick_rank, scale_write, core_svd_stack, gram_factor, consistency_forward,
        consistency_backward, consistency_sum, consistency_loss, entry_merge, entry_counts_, drop_rescale_,
    )
}  # fmt: skip
