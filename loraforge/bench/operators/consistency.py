"""Cases of the consistency loss: forward, backward, and both as a training step calls them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from loraforge.bench import costs
from loraforge.bench.cases import Case, Draws, Work
from loraforge.kernels import consistency, consistency_loss

# (tokens, width)
_SIZES = {"tiny": ((33, 17),), "default": ((4096, 768),), "full": ((4096, 768), (16_384, 4096))}
# (layers, tokens, width)
_LAYERS = {"tiny": ((2, 33, 17),), "default": ((4, 1024, 768),), "full": ((32, 2048, 4096),)}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_RULE: consistency.Rule = "elementwise"
_PADDED = 4  # every so many tokens one is padding
_SUM = 1e-6  # differences and squares in float32; the sums hardly add to that


def cases(size: str) -> list[Case]:
    """`consistency_forward`, `consistency_backward`, `consistency_sum` and `consistency_loss`."""
    builders = {
        "consistency_forward": _forward, "consistency_backward": _backward, "consistency_sum": _both,
    }  # fmt: skip
    found = [
        Case(op, f"{T}x{H} {_NAMES[dtype]}", {"T": T, "H": H}, partial(build, T, H, dtype))
        for T, H in _SIZES[size]
        for op, build in builders.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for layers, T, H in _LAYERS[size]:
        sizes = {"layers": layers, "T": T, "H": H}
        found.append(Case("consistency_loss", f"{layers} x {T}x{H} bf16", sizes, partial(_loss, layers, T, H)))
    return found


def _states(T: int, H: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """P, S, the mask, and how many tokens it keeps."""
    draws = Draws(device)
    mask = torch.arange(T, device=device) % _PADDED != 0
    return draws.normal(T, H, dtype=dtype), draws.normal(T, H, dtype=dtype), mask, int(mask.sum())


def eager(P: Tensor, S: Tensor, mask: Tensor) -> Tensor:
    """The sum as a training script has it, in the dtype of the states until they are summed."""
    d = P - S
    entries = torch.where(P > S, torch.zeros_like(d), d * d)
    return (entries.float().sum(-1) * mask).sum()


def _exact(P: Tensor, S: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and gradient for P in float64."""
    d = torch.where(P > S, 0.0, P.double() - S.double()) * mask[:, None]
    return d.square().sum(), 2.0 * d


def _forward(T: int, H: int, dtype: torch.dtype, device: torch.device) -> Work:
    P, S, mask, kept = _states(T, H, dtype, device)
    return Work(
        forms={
            "reference": lambda: consistency.consistency_forward_reference(P, S, mask, _RULE, 0.0),
            "torch": lambda: eager(P, S, mask),
            "native": lambda: consistency.consistency_forward(P, S, mask, _RULE, 0.0),
        },
        exact=lambda: [_exact(P, S, mask)[0]],
        rtol=_SUM,
        own={"torch": torch.finfo(dtype).eps * 8},  # squares rounded to the dtype of the states
        cost=costs.consistency_forward(T, H, kept, dtype.itemsize),
    )


def _backward(T: int, H: int, dtype: torch.dtype, device: torch.device) -> Work:
    P, S, mask, kept = _states(T, H, dtype, device)
    grad = torch.ones((), dtype=torch.float64, device=device)

    def plain() -> Tensor:
        return torch.where((P > S) | ~mask[:, None], torch.zeros_like(P), 2.0 * (P - S))

    return Work(
        forms={
            "reference": lambda: consistency.consistency_backward_reference(grad, P, S, mask, _RULE, 0.0),
            "torch": plain,
            "native": lambda: consistency.consistency_backward(grad, P, S, mask, _RULE, 0.0),
        },
        exact=lambda: [_exact(P, S, mask)[1]],
        rtol=torch.finfo(dtype).eps,  # a difference, and its rounding to the dtype of the states
        cost=costs.consistency_backward(T, H, kept, dtype.itemsize),
    )


def _both(T: int, H: int, dtype: torch.dtype, device: torch.device) -> Work:
    P, S, mask, kept = _states(T, H, dtype, device)
    P.requires_grad_()
    one = torch.ones((), dtype=torch.float64, device=device)

    def reference() -> list[Tensor]:
        p = P.detach()
        value = consistency.consistency_forward_reference(p, S, mask, _RULE, 0.0)
        return [value, consistency.consistency_backward_reference(one, p, S, mask, _RULE, 0.0)]

    def step(value: Tensor) -> list[Tensor]:
        return [value.detach(), *torch.autograd.grad(value, P)]

    return Work(
        forms={
            "reference": reference,
            "torch": lambda: step(eager(P, S, mask)),
            "native": lambda: step(consistency.consistency_sum(P, S, mask, _RULE)),
        },
        exact=lambda: list(_exact(P.detach(), S, mask)),
        rtol=max(_SUM, torch.finfo(dtype).eps),
        own={"torch": torch.finfo(dtype).eps * 8},
        cost=costs.consistency_sum(T, H, kept, dtype.itemsize),
    )


def _loss(layers: int, T: int, H: int, device: torch.device) -> Work:
    """The mean over all layers' counted entries, and its gradients: a training step's part of the loss."""
    dtype = torch.bfloat16
    states = [_states(T, H, dtype, device) for _ in range(layers)]
    Ps, Ss = [P.requires_grad_() for P, *_ in states], [S for _, S, *_ in states]
    mask, kept = states[0][2], states[0][3]
    entries = layers * H * kept

    def step(value: Tensor) -> list[Tensor]:
        return [value.detach(), *torch.autograd.grad(value, Ps)]

    def plain() -> Tensor:
        return torch.stack([eager(P, S, mask) for P, S in zip(Ps, Ss, strict=True)]).sum() / entries

    def exact() -> list[Tensor]:
        found = [_exact(P.detach(), S, mask) for P, S in zip(Ps, Ss, strict=True)]
        total = torch.stack([value for value, _ in found]).sum() / entries
        return [total, *(gradient / entries for _, gradient in found)]

    return Work(
        forms={
            "torch": lambda: step(plain()),
            "native": lambda: step(consistency_loss(Ps, Ss, mask, _RULE)),
        },
        exact=exact,
        rtol=torch.finfo(dtype).eps,
        own={"torch": torch.finfo(dtype).eps * 8},
        cost=costs.consistency_loss(layers, T, H, kept, dtype.itemsize),
    )
