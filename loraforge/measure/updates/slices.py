"""Norms of the slices of an update that belong to single heads, from factors or from a dense difference.

With delta = s B A, B (m, r), A (r, n), and the QR decomposition A^T = Q R, Q has orthonormal columns, so rows B_h of B
give ||s B_h A||_F = s ||B_h R^T||_F; with B = Q R columns A_h of A give ||s B A_h||_F = s ||R A_h||_F. The cost is that
of one QR of the long side and a product of r columns; the m x n matrix is never formed. QR and not the Gram matrix
A A^T, whose squared condition number turns a head that the update nearly leaves alone into 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.measure.heads.layout import Projection
from loraforge.types import LowRank

# An update of one module in the (out, in) orientation: factors, or a float64 matrix.
Change: TypeAlias = LowRank | Tensor

_BLOCK = 2**18  # entries of a dense matrix that are widened at a time: they stay in the cache


def triangle(factor: Tensor) -> Tensor:
    """R of the QR decomposition of (rows, r) in float64; (min(rows, r), r)."""
    R: Tensor = torch.linalg.qr(factor.to(torch.float64), mode="r").R
    return R


def row_squares(change: Change) -> Tensor:
    """Squared norm of each row of an update, (m,) float64."""
    if isinstance(change, LowRank):
        core = change.B.to(torch.float64) @ triangle(change.A.mT).mT
        return core.square().sum(1) * change.scaling**2
    return torch.cat([block.square().sum(1) for block in _blocks(change)])


def column_squares(change: Change) -> Tensor:
    """Squared norm of each column of an update, (n,) float64."""
    if isinstance(change, LowRank):
        core = triangle(change.B) @ change.A.to(torch.float64)
        return core.square().sum(0) * change.scaling**2
    total = torch.zeros(change.shape[1], dtype=torch.float64)
    for block in _blocks(change):
        total += block.square().sum(0)
    return total


def change_norm(change: Change) -> float:
    """Frobenius norm of an update."""
    if isinstance(change, LowRank):
        # The shorter product: the triangle of one side against the other side.
        wide = change.shape[1] >= change.shape[0]
        return math.sqrt(float((row_squares(change) if wide else column_squares(change)).sum()))
    return tensor_norm(change)


def tensor_norm(tensor: Tensor, minus: Tensor | None = None) -> float:
    """Frobenius norm of a tensor of any shape, or of its difference to another one, in float64."""
    flat_one = tensor.reshape(-1)
    flat_two = None if minus is None else minus.reshape(-1)
    total = 0.0
    for start in range(0, flat_one.numel(), _BLOCK):
        block = flat_one[start : start + _BLOCK].to(torch.float64)
        if flat_two is not None:
            block = block - flat_two[start : start + _BLOCK].to(torch.float64)
        total += float(block.square().sum())
    return math.sqrt(total)


def slice_norms(change: Change, projection: Projection, part: str) -> Tensor:
    """Frobenius norm of the slice of each head of a projection.

    Args:
        change: Update or weight of the module, (out, in).
        projection: Where its heads are.
        part: q, k, v (heads are rows) or o (heads are columns).

    Returns:
        (projection.heads,) float64.

    Raises:
        LoraforgeError: The matrix is smaller than the layout says.
    """
    check_fit(tuple(change.shape), projection, part)
    squares = column_squares(change) if part == "o" else row_squares(change)
    return head_sums(squares, projection).sqrt()


def head_sums(values: Tensor, projection: Projection) -> Tensor:
    """Sum over the rows (o: columns) of each head of (rows,) values: (projection.heads,)."""
    windows = values[projection.offset :].unfold(0, projection.size, projection.stride or projection.size)
    return windows[: projection.heads].sum(1)


def check_fit(shape: tuple[int, ...], projection: Projection, part: str) -> None:
    """Refuses a matrix without the rows (o: columns) that a layout places its heads in.

    Raises:
        LoraforgeError: Naming the module and both sizes.
    """
    needed = projection.span(projection.heads - 1).stop
    has = shape[1] if part == "o" else shape[0]
    # A module of its own is filled by its heads; in a fused one more rows follow.
    alone = projection.offset == 0 and projection.stride in (0, projection.size)
    if has < needed or (alone and part == "o" and has != needed):
        side = "columns" if part == "o" else "rows"
        raise LoraforgeError(
            "the heads do not fit into a projection",
            where=projection.module,
            got=f"{has} {side}",
            expected=f"{projection.heads} heads of {projection.size} {side}: {needed}",
            hint="check --heads, --kv-heads and --head-dim, or the base's config.json",
        )


def head_slice(change: Change, projection: Projection, part: str, head: int) -> Change:
    """Rows (o: columns) of one head of a projection, as factors or as a matrix."""
    span = projection.span(head)
    if isinstance(change, LowRank):
        if part == "o":
            return LowRank(change.B, change.A[:, span], change.scaling)
        return LowRank(change.B[span], change.A, change.scaling)
    return change[:, span] if part == "o" else change[span]


def dense(change: Change) -> Tensor:
    """The update as a float64 matrix."""
    return change.delta(torch.float64) if isinstance(change, LowRank) else change.to(torch.float64)


def difference(new: Change | None, old: Change | None) -> Change | None:
    """new - old: of two pairs of factors one of rank r + r', never the matrix; None where both are absent."""
    if new is None or old is None:
        found = new if old is None else old
        if found is None or old is None:
            return found
        return LowRank(found.B, found.A, -found.scaling) if isinstance(found, LowRank) else -found
    if isinstance(new, LowRank) and isinstance(old, LowRank):
        left = [new.B.to(torch.float64) * new.scaling, old.B.to(torch.float64) * -old.scaling]
        return LowRank(torch.cat(left, 1), torch.cat([new.A.to(torch.float64), old.A.to(torch.float64)]))
    return dense(new) - dense(old)


def _blocks(matrix: Tensor) -> Iterator[Tensor]:
    """Blocks of rows in float64."""
    step = max(1, _BLOCK // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield matrix[start : start + step].to(torch.float64)
