"""Grams and cross-Grams of activations: pack the rows that count, multiply, add up in float64.

    acc += X^T X   or   acc += X^T Y          (rows are tokens)

Products run in float32 (float64 for float64 rows) over at most 4096 rows, and each is added to the float64 accumulator:
the rounding does not grow with the number of tokens. X^T X is multiplied in the blocks on and above the diagonal only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraforge.kernels import backend
from loraforge.kernels.checks import FLOAT32_64, FLOATS, require, require_dtype

_ROWS = 4096
_PANELS = 8  # of the triangular product: 8 panels multiply 56 % of the square
_MIN_PANEL = 128  # narrower panels cost the product more than the triangle saves


def cov_pack_reference(x: Tensor, mask: Tensor | None, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`cov_pack` in PyTorch."""
    wide = torch.float64 if torch.float64 in (x.dtype, dtype) else torch.float32
    rows = x if mask is None else x[mask]
    if weight is not None:
        rows = rows.to(wide) * (weight if mask is None else weight[mask]).to(wide)[:, None]
    return rows.to(dtype)


@torch.no_grad()
def cov_pack(x: Tensor, mask: Tensor | None, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows that a Gram counts: those with the mask set, times their weight, in the dtype of the product.

    Args:
        x: (T, d) activations of any float dtype; rows may lie apart.
        mask: (T,) bool, True for tokens that count; None counts all.
        weight: (T,) factor of a row, of any float dtype; pass sqrt(w) for X^T diag(w) X.
        dtype: Dtype of the result. The product with the weight is taken in float32, or in float64 where x or the result
            is float64, and rounded once.

    Returns:
        (T', d), T' the number of rows kept. It shares memory with x where nothing had to be done.

    Raises:
        LoraforgeError: A shape or dtype does not fit.
    """
    require("cov_pack", "x", x, ("T", "d"), FLOATS)
    require_dtype("cov_pack", dtype)
    if mask is not None:
        require("cov_pack", "mask", mask, (x.shape[0],), (torch.bool,))
    if weight is not None:
        require("cov_pack", "weight", weight, (x.shape[0],), FLOATS)
    if mask is None and weight is None:
        return x.to(dtype)
    if backend.takes_native("cov_pack", *(t for t in (x, mask, weight) if t is not None)):
        return torch.ops.loraforge.cov_pack(x, mask, weight, dtype)
    return cov_pack_reference(x, mask, weight, dtype)


@backend.fake("cov_pack")
def _cov_pack_fake(x: Tensor, mask: Tensor | None, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = x.shape[0] if mask is None else torch.library.get_ctx().new_dynamic_size()
    return x.new_empty((rows, x.shape[1]), dtype=dtype)


def cov_fold_reference(acc: Tensor, chunk: Tensor, symmetric: bool) -> None:
    """`cov_fold_` in PyTorch."""
    acc += chunk.triu() + chunk.triu(1).T if symmetric else chunk


@torch.no_grad()
def cov_fold_(acc: Tensor, chunk: Tensor, symmetric: bool) -> None:
    """Adds a product into the accumulator, in place.

    Args:
        acc: (d, d) float64, or (d, d') where not symmetric.
        chunk: The product, float32 or float64, of the same shape.
        symmetric: Read the diagonal and what is above it only, and mirror it; what lies below may hold anything.

    Raises:
        LoraforgeError: A shape or dtype does not fit.
    """
    require("cov_fold_", "acc", acc, ("d", "d'"), (torch.float64,))
    if symmetric:
        require("cov_fold_", "acc", acc, (acc.shape[0], acc.shape[0]), (torch.float64,))
    require("cov_fold_", "chunk", chunk, tuple(acc.shape), FLOAT32_64)
    if backend.takes_native("cov_fold_", acc, chunk):
        torch.ops.loraforge.cov_fold_(acc, chunk, symmetric)
    else:
        cov_fold_reference(acc, chunk, symmetric)


@backend.fake("cov_fold_")
def _cov_fold_fake(acc: Tensor, chunk: Tensor, symmetric: bool) -> None:
    return None


def gram_reference(acc: Tensor, X: Tensor, Y: Tensor | None = None) -> None:
    """`gram_` in PyTorch, in float64 throughout."""
    acc += X.double().T @ (X if Y is None else Y).double()


def _upper_product(rows: Tensor, out: Tensor) -> None:
    """Writes the blocks of rows^T rows on and above the diagonal into `out`; the rest of it stays as it was."""
    d = rows.shape[1]
    panel = max(_MIN_PANEL, -(-d // _PANELS))
    for at in range(0, d, panel):
        torch.mm(rows[:, at : at + panel].T, rows[:, at:], out=out[at : at + panel, at:])


@torch.no_grad()
def gram_(acc: Tensor, X: Tensor, Y: Tensor | None = None) -> None:
    """Adds X^T X, or X^T Y, to a float64 accumulator in place.

    Args:
        acc: (d, d) float64, or (d, d') with Y.
        X: (T, d) of any float dtype; float64 is multiplied in float64, all others in float32.
        Y: (T, d') of the same dtype, or None for X itself.

    Raises:
        LoraforgeError: A shape or dtype does not fit.
    """
    require("gram_", "X", X, ("T", "d"), FLOATS)
    if Y is not None:
        require("gram_", "Y", Y, (X.shape[0], "d'"), (X.dtype,))
    require("gram_", "acc", acc, (X.shape[1], (X if Y is None else Y).shape[1]), (torch.float64,))
    wide = torch.float64 if X.dtype == torch.float64 else torch.float32
    backend.count("gram_", "blocks")
    product = torch.empty(acc.shape, dtype=wide, device=acc.device)
    for at in range(0, X.shape[0], _ROWS):
        rows = X[at : at + _ROWS].to(wide)
        if Y is None:
            _upper_product(rows, product)
        else:
            torch.mm(rows.T, Y[at : at + _ROWS].to(wide), out=product)
        cov_fold_(acc, product, symmetric=Y is None)
