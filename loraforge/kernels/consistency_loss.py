"""The consistency loss over layers: `consistency_sum` of each, masks, units and normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError, UsageError, did_you_mean
from loraforge.kernels.consistency import RULES, blocks, consistency_sum, token_weights

LOSS_RULES = (*RULES, "token")
UNITS = ("abs", "rms")
LossRule = Literal["elementwise", "margin", "deadband", "none", "token"]


@torch.no_grad()
def _mean_square(S: Tensor, mask: Tensor | None) -> Tensor:
    """() float64: sum m S^2 / (H sum m); 1 where that is 0, as it is divided by."""
    rows, weight = S.reshape(math.prod(S.shape[:-1]), S.shape[-1]), token_weights(S, mask)
    total = torch.zeros((), dtype=torch.float64, device=S.device)
    for cut in blocks(rows):
        squares = rows[cut].double().square().sum(-1)
        if weight is not None:
            squares = (squares * weight[cut]).masked_fill_(weight[cut] == 0, 0.0)
        total += squares.sum()
    return _or_one(total / _or_one(S.shape[-1] * _count(S, mask)))


def _count(P: Tensor, mask: Tensor | None) -> Tensor:
    """() float64: sum m."""
    if mask is not None:
        return mask.sum(dtype=torch.float64)
    return torch.full((), math.prod(P.shape[:-1]), dtype=torch.float64, device=P.device)


def _or_one(x: Tensor) -> Tensor:
    return torch.where(x > 0.0, x, 1.0)


def consistency_loss(
    plastic: Sequence[Tensor],
    stable: Sequence[Tensor],
    mask: Tensor | Sequence[Tensor] | None = None,
    rule: LossRule = "elementwise",
    threshold: float = 0.0,
    layer_normalise: bool = False,
    threshold_unit: Literal["abs", "rms"] = "abs",
    keep: Tensor | None = None,
) -> Tensor:
    """Mean of D over all layers, counted tokens and entries: sum_l sum_tokens m sum_h D_l / (sum_l H_l sum m).

    With layers of one width that is the sum over |layers| H sum m; layers of several widths count by their entries.

    Args:
        plastic: Hidden states (..., H_l) under the plastic adapter, one a layer.
        stable: The same under the stable adapter.
        mask: (...) of all layers or one a layer, as in `consistency_sum`; not negative.
        rule: One of `RULES`, or `token`: all entries of a token are kept where `keep` says so, none elsewhere.
        threshold: Of `margin` and `deadband`.
        layer_normalise: Divide D_l by the mean of S_l^2 over the counted tokens.
        threshold_unit: `abs`, or `rms`: the threshold is in units of the root mean square of S_l.
        keep: (...) bool, for the rule `token`.

    Returns:
        () float64 on the device of the first layer, differentiable in `plastic`; 0 where no token counts.

    Raises:
        UsageError: A rule or unit is unknown.
        LoraforgeError: A number of layers, a shape, dtype or number does not fit.
    """
    _check_loss(plastic, stable, mask, rule, threshold_unit, keep)
    masks = [mask] * len(plastic) if mask is None or isinstance(mask, Tensor) else list(mask)
    home = plastic[0].device
    total, entries = (torch.zeros((), dtype=torch.float64, device=home) for _ in range(2))
    for P, S, m in zip(plastic, stable, masks, strict=True):
        pulled, unit = m, None
        if keep is not None:
            pulled = ~keep if m is None else m.masked_fill(keep, 0)
        if threshold_unit == "rms" and rule in ("margin", "deadband"):
            unit = _mean_square(S, m).sqrt()
        value = consistency_sum(P, S, pulled, "none" if rule == "token" else rule, threshold, unit)
        if layer_normalise:
            value = value / _mean_square(S, m)
        total = total + value.to(home)
        entries += (P.shape[-1] * _count(P, m)).to(home)
    return total / _or_one(entries)


def _check_loss(
    plastic: Sequence[Tensor],
    stable: Sequence[Tensor],
    mask: Tensor | Sequence[Tensor] | None,
    rule: str,
    threshold_unit: str,
    keep: Tensor | None,
) -> None:
    for name, value, known in (("rule", rule, LOSS_RULES), ("threshold_unit", threshold_unit, UNITS)):
        if value not in known:
            raise UsageError(
                f"consistency_loss: unknown {name}", where=name, got=repr(value), hint=did_you_mean(value, known)
            )
    if len(plastic) == 0:
        raise LoraforgeError("consistency_loss: there are no layers", where="plastic", got=0, expected="1 or more")
    layers = {"stable": len(stable)} | ({"mask": len(mask)} if isinstance(mask, list | tuple) else {})
    for name, count in layers.items():
        if count != len(plastic):
            raise LoraforgeError(
                f"consistency_loss: {name} has another number of layers",
                where=name,
                got=count,
                expected=len(plastic),
            )
    if (keep is not None) != (rule == "token") or (keep is not None and keep.dtype != torch.bool):
        raise LoraforgeError(
            "consistency_loss: keep goes with the rule token, and only with it",
            where="keep",
            got="None" if keep is None else str(keep.dtype).removeprefix("torch."),
            expected="a bool tensor, one entry a token" if rule == "token" else f"None, with the rule {rule}",
        )
