"""Consistency loss of I-LORA: hidden states under the plastic adapter are drawn to those under the stable one.

P (..., H) are hidden states under the plastic adapter, which learns, and S those under the stable one, which does not;
m (...) weighs tokens (1 and 0 for a mask), and d = P - S. A rule says which entries are kept plastic and cost nothing:

    elementwise   kept where P > S                  none       none are kept
    margin        kept where P - S > threshold      deadband   kept where S - P <= threshold

    sum = sum_tokens m sum_h D,  D = d^2 where not kept        d sum / d P = 2 m d where not kept, 0 elsewhere

Differences are taken in float32 (float64 for float64 inputs) against a threshold of the same type, and their squares
are summed in float64 in an order that depends on sizes alone. Tokens of weight 0 are never looked at and may hold NaN;
a NaN elsewhere is never kept, so it shows. P and S are all that is saved for the backward pass, which takes the
differences again.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Literal

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError, UsageError, did_you_mean
from loraforge.kernels import backend
from loraforge.kernels.checks import FLOATS, require, require_number

RULES = ("elementwise", "margin", "deadband", "none")  # numbered as in csrc/common/consistency.h
Rule = Literal["elementwise", "margin", "deadband", "none"]
_WEIGHTS = (torch.bool, torch.float32, torch.float64)
_ENTRIES = 1 << 20  # entries that a reference works on at a time: bounds its temporaries


def _kept_above(rule: str, threshold: float, unit: Tensor | None, like: Tensor) -> Tensor:
    """() bound above which a difference is kept, in the dtype that differences are taken in."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    limit = torch.full((), threshold, dtype=torch.float64, device=like.device)
    limit = (limit if unit is None else limit * unit).to(dtype)
    infinity = torch.full_like(limit, float("inf"))
    if rule == "deadband":  # d >= -limit is d > the next number below
        return torch.nextafter(-limit, -infinity)
    return {"elementwise": torch.zeros_like(limit), "margin": limit}.get(rule, infinity)


def blocks(P: Tensor) -> list[slice]:
    """Tokens of (T, H) in runs of a bounded number of entries."""
    rows = max(1, _ENTRIES // max(1, P.shape[1]))
    return [slice(at, at + rows) for at in range(0, P.shape[0], rows)]


def consistency_forward_reference(
    P: Tensor, S: Tensor, mask: Tensor | None, rule: str, threshold: float, unit: Tensor | None = None
) -> Tensor:
    """`consistency_forward` in PyTorch."""
    bound = _kept_above(rule, threshold, unit, P)
    total = torch.zeros((), dtype=torch.float64, device=P.device)
    for cut in blocks(P):
        d = P[cut].to(bound.dtype) - S[cut].to(bound.dtype)
        rows = d.masked_fill_(d > bound, 0.0).double().square_().sum(-1)
        if mask is not None:
            weight = mask[cut].double()
            rows = (rows * weight).masked_fill_(weight == 0.0, 0.0)
        total += rows.sum()
    return total


def consistency_backward_reference(
    grad: Tensor,
    P: Tensor,
    S: Tensor,
    mask: Tensor | None,
    rule: str,
    threshold: float,
    unit: Tensor | None = None,
) -> Tensor:
    """`consistency_backward` in PyTorch."""
    bound = _kept_above(rule, threshold, unit, P)
    out = torch.empty(P.shape, dtype=P.dtype, device=P.device)
    for cut in blocks(P):
        d = P[cut].to(bound.dtype) - S[cut].to(bound.dtype)
        kept = d > bound
        if mask is None:
            d *= (2.0 * grad).to(d.dtype)
        else:
            d *= (2.0 * grad * mask[cut].double()).to(d.dtype)[:, None]
            kept |= (mask[cut] == 0)[:, None]
        out[cut] = d.masked_fill_(kept, 0.0)
    return out


def _check(
    op: str, P: Tensor, S: Tensor, mask: Tensor | None, rule: str, threshold: float, unit: Tensor | None
) -> None:
    require(op, "P", P, ("T", "H"), FLOATS)
    require(op, "S", S, tuple(P.shape), (P.dtype,))
    if mask is not None:
        require(op, "mask", mask, (P.shape[0],), _WEIGHTS)
    if unit is not None:
        require(op, "unit", unit, (), (torch.float64,))
    for name, t in (("S", S), ("mask", mask), ("unit", unit)):
        if t is not None and t.device != P.device:
            raise LoraforgeError(
                f"{op}: tensor {name} is on another device", where=name, got=t.device, expected=f"{P.device}, as P"
            )
    if rule not in RULES:
        raise UsageError(f"{op}: unknown rule", where="rule", got=repr(rule), hint=did_you_mean(rule, RULES))
    require_number(op, "threshold", threshold, 0.0, sys.float_info.max, "a finite number, at least 0")


def _native(op: str, *tensors: Tensor | None) -> bool:
    given = [t for t in tensors if t is not None]
    return _chosen(op, given[0].device.type) if torch.compiler.is_compiling() else backend.takes_native(op, *given)


@torch.compiler.assume_constant_result
def _chosen(op: str, device: str) -> bool:
    """The choice while a graph is traced, which holds for the graph: loading and counting cannot be part of one."""
    return backend.takes_native(op, torch.empty(0, device=device))


@torch.no_grad()
def consistency_forward(
    P: Tensor, S: Tensor, mask: Tensor | None, rule: str, threshold: float, unit: Tensor | None = None
) -> Tensor:
    """The sum alone; `consistency_sum` is its differentiable form.

    Args:
        P: (T, H) of a float dtype.
        S: (T, H) of the same dtype.
        mask: (T,) bool, float32 or float64 weights, or None for ones.
        rule: One of `RULES`.
        threshold: Of `margin` and `deadband`.
        unit: () float64 that multiplies the threshold, or None for 1.

    Returns:
        () float64.

    Raises:
        UsageError: The rule is unknown.
        LoraforgeError: A shape, dtype or number does not fit.
    """
    _check("consistency_forward", P, S, mask, rule, threshold, unit)
    if _native("consistency_forward", P, S, mask, unit):
        return torch.ops.loraforge.consistency_forward(P, S, mask, RULES.index(rule), threshold, unit)
    return consistency_forward_reference(P, S, mask, rule, threshold, unit)


@torch.no_grad()
def consistency_backward(
    grad: Tensor,
    P: Tensor,
    S: Tensor,
    mask: Tensor | None,
    rule: str,
    threshold: float,
    unit: Tensor | None = None,
) -> Tensor:
    """Gradient of `consistency_forward` for P, (T, H) in its dtype, times `grad`, () float64. Raises as it does."""
    _check("consistency_backward", P, S, mask, rule, threshold, unit)
    require("consistency_backward", "grad", grad, (), (torch.float64,))
    if _native("consistency_backward", grad, P, S, mask, unit):
        return torch.ops.loraforge.consistency_backward(grad, P, S, mask, RULES.index(rule), threshold, unit)
    return consistency_backward_reference(grad, P, S, mask, rule, threshold, unit)


@backend.fake("consistency_forward")
def _consistency_forward_fake(
    P: Tensor, S: Tensor, mask: Tensor | None, rule: int, threshold: float, unit: Tensor | None
) -> Tensor:
    return P.new_empty((), dtype=torch.float64)


@backend.fake("consistency_backward")
def _consistency_backward_fake(
    grad: Tensor, P: Tensor, S: Tensor, mask: Tensor | None, rule: int, threshold: float, unit: Tensor | None
) -> Tensor:
    return P.new_empty(P.shape)


class _Slope(torch.autograd.Function):
    """The gradient as a step of its own, so that differentiating it again is refused by name."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        P: Tensor,
        S: Tensor,
        mask: Tensor | None,
        unit: Tensor | None,
        rule: str,
        threshold: float,
    ) -> Tensor:
        return consistency_backward(grad, P, S, mask, rule, threshold, unit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise LoraforgeError(
            "consistency_sum has no second derivative",
            where="a backward pass through the gradient of consistency_sum",
            hint="differentiate once: call backward or grad without create_graph=True",
        )


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, P: Tensor, S: Tensor, mask: Tensor | None, unit: Tensor | None, rule: str, threshold: float
    ) -> Tensor:
        ctx.save_for_backward(P, S, mask, unit)
        ctx.rule, ctx.threshold = rule, threshold
        return consistency_forward(P, S, mask, rule, threshold, unit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        P, S, mask, unit = ctx.saved_tensors
        return _Slope.apply(grads[0], P, S, mask, unit, ctx.rule, ctx.threshold), None, None, None, None, None


def token_weights(P: Tensor, mask: Tensor | None) -> Tensor | None:
    """(T,) of a dtype in `_WEIGHTS`."""
    if mask is None:
        return None
    if mask.shape != P.shape[:-1]:
        raise LoraforgeError(
            "consistency_sum: tensor mask has the wrong shape",
            where="mask",
            got=tuple(mask.shape),
            expected=f"{tuple(P.shape[:-1])}, one weight a token of P",
        )
    flat = mask.detach().reshape(-1)
    return flat if flat.dtype in _WEIGHTS else flat.double()


def consistency_sum(
    P: Tensor,
    S: Tensor,
    mask: Tensor | None = None,
    rule: Rule = "elementwise",
    threshold: float = 0.0,
    unit: Tensor | None = None,
) -> Tensor:
    """sum_tokens m sum_h D: the formulas above. Differentiable in P, once.

    Args:
        P: (..., H) hidden states under the plastic adapter, of any float dtype.
        S: (..., H) hidden states under the stable adapter; of another dtype, both are taken in the wider one.
        mask: (...) bool, or weights of any real dtype; None counts every token once.
        rule: One of `RULES`.
        threshold: Of `margin` and `deadband`, at least 0.
        unit: () float64 that multiplies the threshold, read where it lies; None for 1.

    Returns:
        () float64: the same bits whatever the thread count.

    Raises:
        UsageError: The rule is unknown.
        LoraforgeError: A shape, dtype or number does not fit; or the gradient is differentiated.
    """
    for name, t in (("P", P), ("S", S)):
        if t.dim() == 0 or t.shape != P.shape:
            raise LoraforgeError(
                f"consistency_sum: tensor {name} has the wrong shape",
                where=name,
                got=tuple(t.shape),
                expected="(..., H)" if name == "P" else tuple(P.shape),
            )
    dtype, tokens = torch.promote_types(P.dtype, S.dtype), math.prod(P.shape[:-1])
    p, s = (t.to(dtype).reshape(tokens, P.shape[-1]) for t in (P, S.detach()))
    return _Sum.apply(p, s, token_weights(P, mask), unit, rule, threshold)
