"""Grams and cross-Grams of activations: pack the rows that count, multiply, add up in float64.

    acc += X^T X   or   acc += X^T Y          (rows are tokens)

Products run in float32 (float64 for float64 rows) over at most 4096 rows, and each is added to the float64 accumulator:
the rounding does not grow with the number of tokens. X^T X is multiplied in the blocks on and above the diagonal only,
and mirrored once, by the last fold.

On CUDA bfloat16 and float16 rows are multiplied as they are: their products are exact in float32. What was counted for
an H200 (132 processors, tiles of 128 x 256, 790 TF, 4.3 TB/s):

* panels: 2048 rows of the product are 16 tiles, so 2048 x 2048 k is 128 k tiles: k turns of the processors, 3 % idle.
  The panel that is left over comes first, where it is widest. d = 4096: 3 turns against 4 of the full square; 8192: 10
  against 16; 14336: 28 against 48. Panels of 512 would take 8 turns for d = 4096, each nearly empty.
* slots: a fold of c products moves (8 + 2 c) d^2 bytes, the last one 4 d^2 more for the mirror. 8192 rows of d = 4096
  are 2 products in one fold, 16 d^2 = 268 MB (62 us); a fold with its mirror after each would move 36 d^2 (140 us), all
  beside 290 us of products. d = 14336 folds its products of 822 MB one by one: 10 d^2 a product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.kernels import backend
from loraforge.kernels.checks import FLOAT32_64, FLOATS, require, require_dtype

_ROWS = 4096
_PANELS = 8  # of the triangular product: 8 panels multiply 56 % of the square
_MIN_PANEL = 128  # narrower panels cost the product more than the triangle saves
_CUDA_PANEL = 2048
_SLOT_BYTES = 256 << 20  # of products that wait for one fold on CUDA
_HALVES = (torch.bfloat16, torch.float16)

Piece = tuple[Tensor, Tensor | None]  # some rows of X, and those of Y


def cov_pack_reference(x: Tensor, mask: Tensor | None, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`cov_pack` in PyTorch."""
    wide = torch.float64 if torch.float64 in (x.dtype, dtype) else torch.float32
    rows = x if mask is None else x[mask]
    if weight is not None:
        rows = rows.to(wide) * (weight if mask is None else weight[mask]).to(wide)[:, None]
    return rows.to(dtype)


@torch.no_grad()
def cov_pack(
    x: Tensor, mask: Tensor | None, weight: Tensor | None, dtype: torch.dtype, rows: int | None = None
) -> Tensor:
    """The rows that a Gram counts: those with the mask set, times their weight, in the dtype of the product.

    Args:
        x: (T, d) activations of any float dtype; rows may lie apart.
        mask: (T,) bool, True for tokens that count; None counts all.
        weight: (T,) factor of a row, of any float dtype; pass sqrt(w) for X^T diag(w) X.
        dtype: Dtype of the result. The product with the weight is taken in float32, or in float64 where x or the result
            is float64, and rounded once.
        rows: How many rows the mask keeps, where the caller knows: CUDA then need not be waited for. A wrong number is
            refused on the CPU, and gives rows of NaN on CUDA.

    Returns:
        (T', d), T' the number of rows kept. It shares memory with x where nothing had to be done.

    Raises:
        LoraforgeError: A shape or dtype does not fit, or `rows` is not the number of rows kept.
    """
    require("cov_pack", "x", x, ("T", "d"), FLOATS)
    require_dtype("cov_pack", dtype)
    if mask is not None:
        require("cov_pack", "mask", mask, (x.shape[0],), (torch.bool,))
    if weight is not None:
        require("cov_pack", "weight", weight, (x.shape[0],), FLOATS)
    if mask is None and weight is None:
        found = x.to(dtype)
    elif backend.takes_native("cov_pack", *(t for t in (x, mask, weight) if t is not None)):
        known = rows if x.is_cuda and rows is not None and 0 <= rows <= x.shape[0] else None
        found = torch.ops.loraforge.cov_pack(x, mask, weight, dtype, known)
    else:
        found = cov_pack_reference(x, mask, weight, dtype)
    if rows is not None and found.shape[0] != rows:
        raise LoraforgeError(
            "cov_pack: the mask keeps another number of rows", where="rows", got=rows, expected=found.shape[0]
        )
    return found


@backend.fake("cov_pack")
def _cov_pack_fake(
    x: Tensor, mask: Tensor | None, weight: Tensor | None, dtype: torch.dtype, rows: int | None = None
) -> Tensor:
    kept = x.shape[0] if mask is None else torch.library.get_ctx().new_dynamic_size() if rows is None else rows
    return x.new_empty((kept, x.shape[1]), dtype=dtype)


def cov_fold_reference(acc: Tensor, chunk: Tensor, symmetric: bool, mirror: bool = True) -> None:
    """`cov_fold_` in PyTorch."""
    for slot in chunk if chunk.dim() == 3 else (chunk,):
        acc += slot.triu() if symmetric else slot
    if symmetric and mirror:
        acc.copy_(acc.triu() + acc.triu(1).T)


@torch.no_grad()
def cov_fold_(acc: Tensor, chunk: Tensor, symmetric: bool, mirror: bool = True) -> None:
    """Adds a product into the accumulator, in place.

    Args:
        acc: (d, d) float64, or (d, d') where not symmetric.
        chunk: The product, float32 or float64, of the same shape; or (c, d, d') for several, which are added in order.
        symmetric: Both are symmetric, and only the diagonal and what is above it is read; below it they may hold
            anything.
        mirror: Copy the sum below the diagonal. Without it, what lies there in `acc` is left to a later fold.

    Raises:
        LoraforgeError: A shape or dtype does not fit.
    """
    require("cov_fold_", "acc", acc, ("d", "d'"), (torch.float64,))
    if symmetric:
        require("cov_fold_", "acc", acc, (acc.shape[0], acc.shape[0]), (torch.float64,))
    require("cov_fold_", "chunk", chunk, (*(("c",) if chunk.dim() == 3 else ()), *acc.shape), FLOAT32_64)
    if backend.takes_native("cov_fold_", acc, chunk):
        torch.ops.loraforge.cov_fold_(acc, chunk, symmetric, mirror)
    else:
        cov_fold_reference(acc, chunk, symmetric, mirror)


@backend.fake("cov_fold_")
def _cov_fold_fake(acc: Tensor, chunk: Tensor, symmetric: bool, mirror: bool = True) -> None:
    return None


def gram_reference(acc: Tensor, X: Tensor, Y: Tensor | None = None) -> None:
    """`gram_` in PyTorch, in float64 throughout."""
    acc += X.double().T @ (X if Y is None else Y).double()


def _panels(d: int, cuda: bool) -> list[slice]:
    """Rows of the product that are multiplied at a time, each with the columns from its first row on."""
    if not cuda:
        size = max(_MIN_PANEL, -(-d // _PANELS))
        return [slice(at, at + size) for at in range(0, d, size)]
    edges = [0, *range(d % _CUDA_PANEL or _CUDA_PANEL, d, _CUDA_PANEL), d]
    return [slice(low, high) for low, high in zip(edges, edges[1:], strict=False)]


def _groups(blocks: Sequence[Piece], cuda: bool) -> Iterator[list[Piece]]:
    """The rows of all blocks in order, cut into products of at most `_ROWS` rows.

    On the CPU blocks are never joined: the sums are those of one call a block, to the bit.
    """
    group: list[Piece] = []
    free = _ROWS
    for x, y in blocks:
        at = 0
        while at < x.shape[0]:
            end = min(at + free, x.shape[0])
            group.append((x[at:end], None if y is None else y[at:end]))
            free -= end - at
            at = end
            if free == 0 or not cuda:
                yield group
                group, free = [], _ROWS
    if group:
        yield group


def _stays_half(x: Tensor) -> bool:
    """Whether these rows are multiplied in their 16 bits."""
    return x.is_cuda and x.dtype in _HALVES


def _slots(acc: Tensor, wide: torch.dtype, products: int) -> int:
    """How many products wait for a fold."""
    room = _SLOT_BYTES // max(acc.numel() * wide.itemsize, 1) if acc.is_cuda else 1
    return max(1, min(room, products))


def _multiply_half(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    """out (+)= left @ right of 16-bit matrices, summed and written in float32 (CUDA only)."""
    if add:
        torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, out=out)
    else:
        torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=out)


def _multiply(group: Sequence[Piece], out: Tensor, panels: Sequence[slice]) -> None:
    """Writes the sum of X^T Y over the pieces; of X^T X only the panels, from the diagonal on to the right."""
    for k, (x, y) in enumerate(group):
        half = _stays_half(x)
        x = x if half else x.to(out.dtype)
        right = x if y is None else y if half else y.to(out.dtype)
        for panel in panels:
            columns = slice(panel.start, None) if y is None else slice(None)
            left, part = x[:, panel].T, out[panel, columns]
            if half:
                _multiply_half(left, right[:, columns], part, add=k > 0)
            elif k > 0:
                torch.addmm(part, left, right[:, columns], out=part)
            else:
                torch.mm(left, right[:, columns], out=part)


@contextmanager
def _full_float32(cuda: bool) -> Iterator[None]:
    """Float32 products of 24 bits, whatever a program has set for its own: TF32 keeps 11 of them."""
    switch = torch.backends.cuda.matmul
    if not cuda or switch.fp32_precision != "tf32":
        yield
        return
    try:
        before: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # TF32 came by the newer switch, of which the older one does not know
        before = None
    switch.allow_tf32 = False  # sets both
    try:
        yield
    finally:
        if before in ("high", "medium"):
            torch.set_float32_matmul_precision(before)
        else:
            switch.fp32_precision = "tf32"


@torch.no_grad()
def gram_(acc: Tensor, X: Tensor | Sequence[Tensor], Y: Tensor | Sequence[Tensor] | None = None) -> None:
    """Adds X^T X, or X^T Y, to a float64 accumulator in place.

    Args:
        acc: (d, d) float64 and symmetric, or (d, d') with Y.
        X: (T, d) of any float dtype, or several such blocks of rows of one dtype. Float64 is multiplied in float64, all
            others in float32 (never in TF32). On CUDA blocks share a product until it has 4096 rows.
        Y: (T, d') of the same dtype, or as many blocks of as many rows; None for X itself.

    Raises:
        LoraforgeError: A shape or dtype does not fit.
    """
    lefts = [X] if isinstance(X, Tensor) else list(X)
    rights: list[Tensor | None] = [None] * len(lefts) if Y is None else [Y] if isinstance(Y, Tensor) else list(Y)
    if len(lefts) != len(rights):
        raise LoraforgeError("gram_: X and Y have other numbers of blocks", got=len(rights), expected=len(lefts))
    for x, y in zip(lefts, rights, strict=True):
        require("gram_", "X", x, ("T", "d"), FLOATS)
        require("gram_", "X", x, tuple(x.shape), (lefts[0].dtype,))
        if y is not None:
            require("gram_", "Y", y, (x.shape[0], "d'"), (x.dtype,))
        require("gram_", "acc", acc, (x.shape[1], (x if y is None else y).shape[1]), (torch.float64,))
    backend.count("gram_", "blocks")
    groups = list(_groups(list(zip(lefts, rights, strict=True)), acc.is_cuda))
    if not groups:
        return
    symmetric = Y is None
    wide = torch.float64 if lefts[0].dtype == torch.float64 else torch.float32
    slots = _slots(acc, wide, len(groups))
    products = torch.empty((slots, *acc.shape), dtype=wide, device=acc.device)
    panels = _panels(acc.shape[0], acc.is_cuda) if symmetric else [slice(None)]
    with _full_float32(acc.is_cuda and wide == torch.float32):
        for k, group in enumerate(groups):
            used = k % slots + 1
            _multiply(group, products[used - 1], panels)
            if used == slots or k + 1 == len(groups):
                cov_fold_(acc, products[:used], symmetric, mirror=k + 1 == len(groups))
