"""Anderson mixing on flat histories.

m iterates X_j and their residuals F_j are rows of (m, P) ring buffers, P = all unknowns of a layer or of a model:

    dots = [F f ; f . f]            float64 accumulation, for the Gram column of the least-squares problem
    out  = sum_j a_j (X_j + beta F_j)

Both are bound by memory: the compiled forms read every number once and keep no temporary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraforge.kernels import backend
from loraforge.kernels.checks import FLOAT32_64, require

_COLUMNS = 1 << 20  # columns that a reference converts at a time: bounds its temporaries


def anderson_dots_reference(H: Tensor, f: Tensor) -> Tensor:
    """`anderson_dots` in PyTorch."""
    out = torch.zeros(H.shape[0] + 1, dtype=torch.float64, device=f.device)
    for at in range(0, f.shape[0], _COLUMNS):
        part = f[at : at + _COLUMNS].double()
        out[:-1] += H[:, at : at + _COLUMNS].double() @ part
        out[-1] += part @ part
    return out


@torch.no_grad()
def anderson_dots(H: Tensor, f: Tensor) -> Tensor:
    """Dot products of the history with the newest residual, and of that with itself.

    Args:
        H: (m, P) float32 or float64; rows may lie apart.
        f: (P,) of the same dtype.

    Returns:
        (m + 1,) float64: H @ f, then f . f. The same bits whatever the thread count.

    Raises:
        LoraforgeError: A shape or dtype does not fit.
    """
    require("anderson_dots", "H", H, ("m", "P"), FLOAT32_64)
    require("anderson_dots", "f", f, (H.shape[1],), (H.dtype,))
    if backend.takes_native("anderson_dots", H, f):
        return torch.ops.loraforge.anderson_dots(H, f)
    return anderson_dots_reference(H, f)


@backend.fake("anderson_dots")
def _anderson_dots_fake(H: Tensor, f: Tensor) -> Tensor:
    return f.new_empty((H.shape[0] + 1,), dtype=torch.float64)


def anderson_mix_reference(X: Tensor, F: Tensor, a: Tensor, beta: float, out: Tensor) -> None:
    """`anderson_mix` in PyTorch."""
    for at in range(0, out.shape[0], _COLUMNS):
        cut = slice(at, at + _COLUMNS)
        out[cut] = (a @ X[:, cut].double() + (a * beta) @ F[:, cut].double()).to(out.dtype)


@torch.no_grad()
def anderson_mix(X: Tensor, F: Tensor, a: Tensor, beta: float, out: Tensor) -> None:
    """Writes out = sum_j a_j (X_j + beta F_j), computed in float64 and rounded once.

    Args:
        X: (m, P) iterates, float32 or float64; rows may lie apart.
        F: (m, P) residuals of the same dtype.
        a: (m,) float64 coefficients.
        beta: Damping of the residuals.
        out: (P,) of the same dtype; it may be a row of X or F.

    Raises:
        LoraforgeError: A shape or dtype does not fit.
    """
    require("anderson_mix", "X", X, ("m", "P"), FLOAT32_64)
    require("anderson_mix", "F", F, tuple(X.shape), (X.dtype,))
    require("anderson_mix", "a", a, (X.shape[0],), (torch.float64,))
    require("anderson_mix", "out", out, (X.shape[1],), (X.dtype,))
    if backend.takes_native("anderson_mix", X, F, a, out):
        torch.ops.loraforge.anderson_mix(X, F, a, beta, out)
    else:
        anderson_mix_reference(X, F, a, beta, out)


@backend.fake("anderson_mix")
def _anderson_mix_fake(X: Tensor, F: Tensor, a: Tensor, beta: float, out: Tensor) -> None:
    return None
