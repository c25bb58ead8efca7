"""Cases of the operators on small cores: their SVD, the rank that an energy asks for, the written factors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loraforge.bench import costs
from loraforge.bench.cases import Case, Draws, Work
from loraforge.kernels.core_svd import (
    batched_core_svd,
    batched_core_svd_reference,
    core_svd_stack,
    pick_rank,
    pick_rank_reference,
    scale_write,
    scale_write_reference,
)
from loraforge.kernels.gram_cholesky import gram_factor, gram_factor_reference
from loraforge.kernels.jacobi import jacobi_svd, jacobi_svd_reference

# (number of cores, R)
_CORES = {
    "tiny": ((3, 7),),
    "default": ((56, 32), (28, 64), (7, 128)),
    "full": ((224, 64), (32, 160), (16, 256)),
}
_STACKS = {"tiny": ((3, 7),), "default": ((28, 64),), "full": ((224, 32), (224, 64), (56, 128))}
_SPECTRA = {"tiny": ((5, 7),), "default": ((224, 64),), "full": ((224, 64), (224, 256))}
# (m, n, R, k)
_SPLITS = {
    "tiny": ((33, 17, 7, 5),),
    "default": ((768, 768, 64, 16), (4096, 4096, 64, 16)),
    "full": ((4096, 4096, 64, 16), (14336, 4096, 128, 64)),
}
_FLOAT32 = 1e-5  # a float32 decomposition of R <= 256 put together again
_ENERGY = 0.9


def cases(size: str) -> list[Case]:
    """`batched_core_svd`, `jacobi_svd`, `core_svd_stack`, `gram_factor`, `pick_rank` and `scale_write`."""
    found = [Case("batched_core_svd", f"{b} x R={R}", {"b": b, "R": R}, partial(_svd, b, R)) for b, R in _CORES[size]]
    for op in ("jacobi_svd", "core_svd_stack"):
        found += [Case(op, f"{b} x R={R}", {"b": b, "R": R}, partial(_stack, op, b, R)) for b, R in _STACKS[size]]
    found += [
        Case("gram_factor", f"{b} x R={R}", {"b": b, "R": R}, partial(_gram_factor, b, R)) for b, R in _STACKS[size]
    ]
    found += [Case("pick_rank", f"{b} x R={R}", {"b": b, "R": R}, partial(_rank, b, R)) for b, R in _SPECTRA[size]]
    for m, n, R, k in _SPLITS[size]:
        for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            sizes = {"m": m, "n": n, "R": R, "k": k}
            found.append(Case("scale_write", f"{m}+{n} R={R} k={k} {name}", sizes, partial(_split, m, n, R, k, dtype)))
    return found


def put_together(U: Tensor, S: Tensor, Vh: Tensor) -> list[Tensor]:
    """S and U S Vh in float64: vectors are unique up to sign and rotation, these are unique."""
    return [S.double(), (U.double() * S.double()[..., None, :]) @ Vh.double()]


def _stack_numbers(found: Any) -> Sequence[Tensor]:
    """The same of a list of decompositions, or of a stack of them with what else was told."""
    parts = [torch.stack([one[part] for one in found]) for part in range(3)] if isinstance(found, list) else found[:3]
    return put_together(*parts)


def _eigh(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fastest library calls on a GPU: eigenvectors of the float64 Gram matrices, batched."""
    wide = stack.double()
    squares, V = torch.linalg.eigh(wide.mT @ wide)
    S = squares.clamp_min(0.0).sqrt().flip(-1)
    V = V.flip(-1)
    return (wide @ V / S[:, None, :]).to(stack), S.to(stack), V.mT.to(stack)


def _svd(b: int, R: int, device: torch.device) -> Work:
    """The cores as a list, as they come off the modules."""
    stack = Draws(device).normal(b, R, R)
    cores = list(stack)
    return Work(
        forms={
            "reference": lambda: batched_core_svd_reference(cores),
            "torch": lambda: torch.linalg.svd(stack, full_matrices=False),
            "native": lambda: batched_core_svd(cores),
        },
        exact=lambda: [torch.linalg.svdvals(stack.double()), stack.double()],
        rtol=_FLOAT32,
        numbers=_stack_numbers,
        cost=costs.batched_core_svd(b, R),
    )


def _stack(op: str, b: int, R: int, device: torch.device) -> Work:
    """The cores as one stack: `jacobi_svd`, the kernel, and `core_svd_stack`, which looks at how it went."""
    stack = Draws(device).normal(b, R, R)
    return Work(
        forms={
            "reference": lambda: jacobi_svd_reference(stack),
            "torch": lambda: torch.linalg.svd(stack, full_matrices=False),
            "torch eigh": lambda: _eigh(stack),
            "native": lambda: jacobi_svd(stack) if op == "jacobi_svd" else core_svd_stack(stack),
        },
        exact=lambda: [torch.linalg.svdvals(stack.double()), stack.double()],
        rtol=_FLOAT32,
        numbers=_stack_numbers,
        cost=costs.COSTS[op](b, R),
    )


def _gram_factor(b: int, R: int, device: torch.device) -> Work:
    """Of full rank: without a cut-off to act, the plain Cholesky factor and its inverse are as good."""
    X = Draws(device).normal(b, 4 * R, R, dtype=torch.float64)
    G = X.mT @ X
    eye = torch.eye(R, dtype=torch.float64, device=device)

    def plain() -> tuple[Tensor, Tensor]:
        T = torch.linalg.cholesky_ex(G).L.mT
        return T, torch.linalg.solve_triangular(T, eye.expand_as(T), upper=True)

    def numbers(found: Any) -> list[Tensor]:
        T, Z = found[:2]
        return [T.mT @ T, Z.mT @ G @ Z]

    return Work(
        forms={
            "reference": lambda: gram_factor_reference(G),
            "torch": plain,
            "native": lambda: gram_factor(G),
        },
        exact=lambda: [G, eye.expand_as(G)],
        rtol=1e-12,  # float64, condition number about 10
        numbers=numbers,
        cost=costs.gram_factor(b, R),
    )


def _rank(b: int, R: int, device: torch.device) -> Work:
    S = Draws(device).uniform(b, R).sort(-1, descending=True).values

    def plain() -> Tensor:
        squares = S.double().square()
        return (squares.cumsum(-1) < _ENERGY * squares.sum(-1, keepdim=True)).sum(-1) + 1

    return Work(
        forms={
            "reference": lambda: pick_rank_reference(S, _ENERGY, 1, R),
            "torch": plain,
            "native": lambda: pick_rank(S, _ENERGY),
        },
        exact=lambda: [pick_rank_reference(S.double(), _ENERGY, 1, R)],
        rtol=0.0,
        cost=costs.pick_rank(b, R),
    )


def _split(m: int, n: int, R: int, k: int, dtype: torch.dtype, device: torch.device) -> Work:
    draws = Draws(device)
    U, S, Vh = draws.normal(m, R), draws.uniform(R), draws.normal(R, n)

    def exact() -> list[Tensor]:
        root = S[:k].double().sqrt()
        return [U[:, :k].double() * root, root[:, None] * Vh[:k].double()]

    return Work(
        forms={
            "reference": lambda: scale_write_reference(U, S, Vh, k, dtype),
            "native": lambda: scale_write(U, S, Vh, k, dtype),
        },
        exact=exact,
        rtol=torch.finfo(dtype).eps,  # a root, a product and the rounding to the dtype of the factors
        cost=costs.scale_write(m, n, R, k, 4, dtype.itemsize),
    )
