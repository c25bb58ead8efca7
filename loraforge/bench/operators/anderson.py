"""Cases of the operators on flat Anderson histories."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from loraforge.bench import costs
from loraforge.bench.cases import Case, Draws, Work
from loraforge.kernels import anderson

# (m, P)
_SIZES = {
    "tiny": ((3, 129),),
    "default": ((5, 500_000), (5, 2_000_000)),
    "full": ((5, 1_000_000), (5, 8_000_000), (5, 40_000_000)),
}
_FLOAT64 = 1e-12  # float64 sums taken in another order
_FLOAT32 = 2.0**-23  # one rounding to float32


def cases(size: str) -> list[Case]:
    """`anderson_dots` and `anderson_mix`, float32 histories."""
    return [
        Case(op, f"m={m} P={P:,}", {"m": m, "P": P}, partial(build, m, P))
        for op, build in (("anderson_dots", _dots), ("anderson_mix", _mix))
        for m, P in _SIZES[size]
    ]


def _dots(m: int, P: int, device: torch.device) -> Work:
    draws = Draws(device)
    H, f = draws.normal(m, P), draws.normal(P)

    def plain() -> Tensor:
        wide = f.double()
        return torch.cat([H.double() @ wide, (wide @ wide)[None]])

    return Work(
        forms={
            "reference": lambda: anderson.anderson_dots_reference(H, f),
            "torch": plain,
            "torch float32": lambda: torch.cat([H @ f, (f @ f)[None]]).double(),
            "native": lambda: anderson.anderson_dots(H, f),
        },
        exact=lambda: [anderson.anderson_dots_reference(H, f)],  # float64 throughout
        rtol=_FLOAT64,
        own={"torch float32": 1e-3},  # what a float32 dot product of that length may be off by
        cost=costs.anderson_dots(m, P),
    )


def _mix(m: int, P: int, device: torch.device) -> Work:
    draws = Draws(device)
    X, F, a = draws.normal(m, P), draws.normal(m, P), draws.normal(m, dtype=torch.float64)
    narrow, beta = a.float(), 0.7
    outs = {name: torch.empty(P, device=device) for name in ("reference", "native")}

    def into(name: str, function: Callable[..., None]) -> Tensor:
        function(X, F, a, beta, outs[name])
        return outs[name]

    def exact() -> list[Tensor]:
        wide = torch.empty(P, dtype=torch.float64, device=device)
        anderson.anderson_mix_reference(X, F, a, beta, wide)
        return [wide]

    return Work(
        forms={
            "reference": lambda: into("reference", anderson.anderson_mix_reference),
            "torch": lambda: torch.addmm((narrow @ X)[None], (narrow * beta)[None], F)[0],
            "native": lambda: into("native", anderson.anderson_mix),
        },
        exact=exact,
        rtol=_FLOAT32,
        own={"torch": 2e-6},  # float32 sums of 2 m terms
        cost=costs.anderson_mix(m, P),
    )
