"""What a case of the benchmarks is: several forms of one computation, and the numbers that all of them must give."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loraforge.bench.costs import Cost

Form = Callable[[], Any]
Distance = Callable[[Sequence[Tensor], Sequence[Tensor]], float]
Numbers = Callable[[Any], Sequence[Tensor]]


def as_tensors(result: Any) -> Sequence[Tensor]:
    """A result that is a tensor or a sequence of tensors, as a sequence."""
    return [result] if isinstance(result, Tensor) else list(result)


def error_of(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest deviation relative to the largest value expected, over all tensors; infinite for another shape or NaN.

    Integers and bools have to be equal: error 0 or infinite.
    """
    if len(got) != len(exact):
        return float("inf")
    worst = 0.0
    for mine, right in zip(got, exact, strict=True):
        if mine.shape != right.shape:
            return float("inf")
        if not right.is_floating_point():
            worst = max(worst, 0.0 if bool((mine == right).all()) else float("inf"))
            continue
        if mine.numel() == 0:
            continue
        if not bool(torch.isfinite(mine).all()):
            return float("inf")
        away = float((mine.to(torch.float64) - right.to(torch.float64)).abs().max())
        size = float(right.to(torch.float64).abs().max())
        worst = max(worst, away / size if size > 0.0 else away)
    return worst


def frobenius_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest relative Frobenius distance of a pair: for results in which single entries may flip (thresholds)."""
    if len(got) != len(exact) or any(mine.shape != right.shape for mine, right in zip(got, exact, strict=True)):
        return float("inf")
    worst = max(
        float((mine.to(torch.float64) - right).norm() / right.norm()) for mine, right in zip(got, exact, strict=True)
    )
    return worst if math.isfinite(worst) else float("inf")


@dataclass(frozen=True, eq=False)
class Work:
    """One case on one device, ready to run.

    Attributes:
        forms: Ways to compute it. "native" is the compiled form and is timed with LORAFORGE_KERNELS=native; a result
            names it by the device. "reference" is the PyTorch form beside it, "torch" what a user would write.
        exact: The numbers that every form must give, float64 (or integers, which must be equal); called once.
        rtol: Error allowed to every form, relative to the largest value of `exact`, tensor by tensor.
        numbers: The tensors of a form's result that are compared.
        own: Other `rtol` of single forms, for peers that compute in another precision.
        cost: Bytes and flops; None where nobody counted them.
        before: Gets a form's name before every call of it, outside of the time.
        distance: Error of tensors against those of `exact`; `rtol` bounds it.
        peer: The form that the others are compared with; by default "torch", or "reference" without one.
    """

    forms: Mapping[str, Form]
    exact: Callable[[], Sequence[Tensor]]
    rtol: float
    numbers: Numbers = as_tensors
    own: Mapping[str, float] = field(default_factory=dict)
    cost: Cost | None = None
    before: Callable[[str], object] | None = None
    distance: Distance = error_of
    peer: str | None = None

    @property
    def compared_with(self) -> str:
        """Name of the form that speed-ups refer to."""
        return self.peer or ("torch" if "torch" in self.forms else "reference")


@dataclass(frozen=True, eq=False)
class Case:
    """One operator (or method) on one size.

    Attributes:
        op: Its name.
        label: The size in words, unique within the operator.
        size: The size in numbers.
        build: Device -> the case with its tensors there; the same numbers at every call.
    """

    op: str
    label: str
    size: Mapping[str, int]
    build: Callable[[torch.device], Work]

    @property
    def name(self) -> str:
        """Operator and size."""
        return f"{self.op} {self.label}".strip()


class Draws:
    """Random tensors on a device, the same ones at every start.

    Args:
        device: Where they are drawn: large ones do not cross a bus.
    """

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self.device = device

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers, drawn in float32 unless float64 is asked for."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=wide).to(dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers from [0, 1)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.rand(shape, generator=self._generator, device=self.device, dtype=wide).to(dtype)

    def positive(self, *shape: int) -> Tensor:
        """(..., R, R) float64 positive semi-definite matrices X X^T."""
        root = self.normal(*shape, dtype=torch.float64)
        return root @ root.mT
