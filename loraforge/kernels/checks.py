"""Checks of an operator's tensors, the same for its compiled and its reference form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError

FLOAT32_64 = (torch.float32, torch.float64)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _words(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def _shape(shape: Sequence[int | str]) -> str:
    return f"({', '.join(str(s) for s in shape)}{',' if len(shape) == 1 else ''})"


def require(op: str, name: str, t: Tensor, shape: Sequence[int | str], dtypes: Sequence[torch.dtype]) -> None:
    """Refuses a tensor of another shape or dtype.

    Args:
        op: Operator, for the message.
        name: Name of the tensor in its signature.
        t: The tensor.
        shape: One entry an axis: an int is demanded, a letter stands for any size.
        dtypes: The dtypes that are taken.

    Raises:
        LoraforgeError: The shape or the dtype is another one.
    """
    fits = t.dim() == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(t.shape, shape, strict=True)
    )
    if not fits:
        raise LoraforgeError(
            f"{op}: tensor {name} has the wrong shape", where=name, got=_shape(t.shape), expected=_shape(shape)
        )
    if t.dtype not in dtypes:
        raise LoraforgeError(
            f"{op}: tensor {name} has the wrong dtype",
            where=name,
            got=_words([t.dtype]),
            expected=_words(dtypes),
        )


def require_dtype(op: str, dtype: torch.dtype) -> None:
    """Refuses a result dtype that is no float type of `FLOATS`."""
    if dtype not in FLOATS:
        raise LoraforgeError(
            f"{op}: the result cannot have this dtype", where="dtype", got=_words([dtype]), expected=_words(FLOATS)
        )


def require_number(op: str, name: str, value: float, low: float, high: float, interval: str) -> None:
    """Refuses a number outside [low, high], and NaN; `interval` is how the bounds are written in the message."""
    if not low <= value <= high:
        raise LoraforgeError(f"{op}: {name} is out of range", where=name, got=value, expected=interval)


def require_finite(op: str, name: str, t: Tensor) -> None:
    """Refuses NaN and infinity, naming the first place."""
    if math.isfinite(float(t.sum())):  # one cheap pass; a sum that overflows leads to the exact look below
        return
    finite = torch.isfinite(t)
    if not bool(finite.all()):
        place = tuple((~finite).nonzero()[0].tolist())
        raise LoraforgeError(
            f"{op}: tensor {name} holds a value that is not finite",
            where=f"{name}[{', '.join(str(i) for i in place)}]",
            got=float(t[place]),
            expected="finite numbers",
        )
