"""Cases of the operators that weigh calibration tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loraforge.bench import costs
from loraforge.bench.cases import Case, Draws, Work
from loraforge.kernels import dcs

# (S, R)
_VARIANCE = {
    "tiny": ((97, 7),),
    "default": ((1024, 64), (24_000, 32)),
    "full": ((1024, 64), (24_000, 32), (65_536, 128)),
}
# (S, scale of the MAD): a small scale makes the floor of the effective sample size act.
_WEIGHTS = {
    "tiny": ((97, 0.1),),
    "default": ((1024, 0.01), (24_000, 0.01), (24_000, 10.0)),
    "full": ((1024, 0.01), (24_000, 0.01), (24_000, 10.0), (262_144, 0.01)),
}
# (b, S, R, scale of the MAD)
_BATCHES = {
    "tiny": ((3, 97, 7, 0.1), (3, 97, 7, 10.0)),
    "default": ((24, 1024, 32, 0.01), (24, 1024, 32, 10.0)),
    "full": ((224, 1024, 64, 0.01), (224, 1024, 64, 10.0)),
}
_MIN_ESS = 0.25


def cases(size: str) -> list[Case]:
    """`dcs_variance`, `dcs_weights` and both at once of many modules, `dcs_batch`."""
    found = [
        Case("dcs_variance", f"S={S:,} R={R}", {"S": S, "R": R}, partial(_variance, S, R)) for S, R in _VARIANCE[size]
    ]
    for S, scale in _WEIGHTS[size]:
        found.append(Case("dcs_weights", f"S={S:,} floor {_floor(scale)}", {"S": S}, partial(_weights, S, scale)))
    for b, S, R, scale in _BATCHES[size]:
        label = f"{b} x S={S:,} R={R} floor {_floor(scale)}"
        found.append(Case("dcs_batch", label, {"b": b, "S": S, "R": R}, partial(_batch, b, S, R, scale)))
    return found


def _floor(scale: float) -> str:
    """Whether the floor of the effective sample size acts at that scale on normal draws."""
    return "acts" if scale < 1.0 else "idle"


def _variance(S: int, R: int, device: torch.device) -> Work:
    draws = Draws(device)
    Y, M = draws.normal(S, R), draws.positive(R, R)
    narrow = M.float()
    return Work(
        forms={
            "reference": lambda: dcs.dcs_variance_reference(Y, M),
            "torch": lambda: ((Y @ narrow) * Y).sum(-1).clamp_min(0).double(),
            "native": lambda: dcs.dcs_variance(Y, M),
        },
        exact=lambda: [dcs.dcs_variance_reference(Y, M)],  # float64 throughout
        rtol=1e-12,
        own={"torch": 1e-5},  # float32 products and sums
        cost=costs.dcs_variance(S, R),
    )


def _weights(S: int, scale: float, device: torch.device) -> Work:
    V = Draws(device).normal(S, dtype=torch.float64).square()
    return Work(
        forms={
            "reference": lambda: dcs.dcs_weights_reference(V, scale, _MIN_ESS),
            "native": lambda: dcs.dcs_weights(V, scale, _MIN_ESS),
        },
        exact=lambda: [dcs.dcs_weights_reference(V, scale, _MIN_ESS).w],
        rtol=1e-8,  # tau is found to 1e-12, and the exponent multiplies its error
        numbers=lambda found: [found.w],
        cost=costs.dcs_weights(S),
    )


def _plain_weights(Y: Tensor, M: Tensor, scale: float) -> Tensor:
    """The document's formula, mean 1, of one module or a batch: (..., S, R), (..., R, R) -> (..., S); no floor."""
    y = Y.double()
    V = ((y @ M) * y).sum(-1).clamp_min(0.0)
    sigma = scale * _median((V - _median(V)).abs())
    w = torch.exp(-(V - V.amin(-1, keepdim=True)) / sigma.square())
    return w / w.mean(-1, keepdim=True)


def _median(values: Tensor) -> Tensor:
    """(..., 1) median with the average of the two middle values."""
    ordered, S = values.sort(-1).values, values.shape[-1]
    return 0.5 * (ordered[..., (S - 1) // 2, None] + ordered[..., S // 2, None])


def _batch(b: int, S: int, R: int, scale: float, device: torch.device) -> Work:
    """Where the floor is idle, the formula is a dozen library calls: batched, or one module after the other."""
    draws = Draws(device)
    Y, M = draws.normal(b, S, R), draws.positive(b, R, R)
    forms: dict[str, Callable[[], Any]] = {
        "reference": lambda: dcs.dcs_batch_reference(Y, M, None, scale, _MIN_ESS).w,
        "native": lambda: dcs.dcs_batch(Y, M, None, scale, _MIN_ESS).w,
    }
    if _floor(scale) == "idle":
        forms["torch"] = lambda: _plain_weights(Y, M, scale)
        forms["torch loop"] = lambda: torch.stack([_plain_weights(y, m, scale) for y, m in zip(Y, M, strict=True)])
    return Work(
        forms=forms,
        exact=lambda: [dcs.dcs_batch_reference(Y, M, None, scale, _MIN_ESS).w],
        rtol=1e-8,  # tau is found to 1e-12, and the exponent multiplies its error
        cost=costs.dcs_batch(b, S, R),
    )
