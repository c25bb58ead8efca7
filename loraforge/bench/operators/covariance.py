"""Cases of the operators that collect Grams of activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from loraforge.bench import costs
from loraforge.bench.cases import Case, Draws, Work
from loraforge.kernels import covariance

# (T, d)
_ROWS = {"tiny": ((97, 33),), "default": ((4096, 768),), "full": ((4096, 768), (8192, 4096))}
# d
_FOLDS = {"tiny": (97,), "default": (1024,), "full": (1024, 4096)}
_GRAMS = {"tiny": ((129, 33),), "default": ((4096, 768), (4096, 1024)), "full": ((4096, 768), (8192, 4096))}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_SUMS = 2e-6  # float32 sums of 4096 products
_CUT_SUMS = 2e-5  # the same on tensor cores, which cut sums off instead of rounding them: all errors have one sign
_PAGE = 512  # tokens of a padded sample, half of it padding


def cases(size: str) -> list[Case]:
    """`cov_pack`, `cov_fold_` and `gram_`."""
    found = []
    for T, d in _ROWS[size]:
        for dtype, weighted in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True)):
            label = f"{T}x{d} half, {_NAMES[dtype]}{', weight' if weighted else ''}"
            found.append(Case("cov_pack", label, {"T": T, "d": d}, partial(_pack, T, d, dtype, weighted)))
    for d in _FOLDS[size]:
        for symmetric in (False, True):
            label = f"d={d}{' symmetric' if symmetric else ''}"
            found.append(Case("cov_fold_", label, {"d": d}, partial(_fold, d, symmetric)))
    for T, d in _GRAMS[size]:
        for masked in (False, True) if (T, d) == _GRAMS[size][0] else (False,):
            label = f"{T}x{d} bf16{', half padding' if masked else ''}"
            found.append(Case("gram_", label, {"T": T, "d": d}, partial(_gram, T, d, masked)))
    return found


def _half(T: int, device: torch.device) -> Tensor:
    """(T,) mask: the first half of every sample counts."""
    page = min(_PAGE, T)
    return torch.arange(T, device=device) % page < page // 2


def _pack(T: int, d: int, dtype: torch.dtype, weighted: bool, device: torch.device) -> Work:
    draws = Draws(device)
    x, mask = draws.normal(T, d, dtype=dtype), _half(T, device)
    weight = draws.uniform(T) if weighted else None
    kept = int(mask.sum())  # known to who made the mask

    def exact() -> list[Tensor]:
        rows = x[mask].double()
        return [rows if weight is None else rows * weight[mask].double()[:, None]]

    return Work(
        forms={
            "reference": lambda: covariance.cov_pack_reference(x, mask, weight, torch.float32),
            "native": lambda: covariance.cov_pack(x, mask, weight, torch.float32, rows=kept),
        },
        exact=exact,
        rtol=2.0**-24 if weighted else 0.0,  # one rounding of the product
        cost=costs.cov_pack(T, d, kept, x.itemsize, 4, weighted),
    )


def _fold(d: int, symmetric: bool, device: torch.device) -> Work:
    chunk = Draws(device).normal(d, d)
    accs = {name: torch.zeros(d, d, dtype=torch.float64, device=device) for name in ("reference", "native")}

    def run(name: str, function: Callable[..., None]) -> Tensor:
        function(accs[name], chunk, symmetric)
        return accs[name]

    def exact() -> list[Tensor]:
        wide = chunk.double()
        return [wide.triu() + wide.triu(1).T if symmetric else wide]

    return Work(
        forms={
            "reference": lambda: run("reference", covariance.cov_fold_reference),
            "native": lambda: run("native", covariance.cov_fold_),
        },
        exact=exact,
        rtol=0.0,
        before=lambda name: accs[name].zero_(),
        cost=costs.cov_fold_(d, d, symmetric),
    )


def _gram(T: int, d: int, masked: bool, device: torch.device) -> Work:
    """One hook call; masked: half of the rows are padding, which the full-length product zeroes."""
    X, mask = Draws(device).normal(T, d, dtype=torch.bfloat16), _half(T, device)
    kept = int(mask.sum()) if masked else T
    narrow = X.dtype if device.type == "cuda" else torch.float32  # a GPU multiplies 16-bit rows as they are
    accs = {
        name: torch.zeros(d, d, dtype=torch.float64, device=device)
        for name in ("reference", "torch", "native", "exact")
    }

    def ours() -> Tensor:
        covariance.gram_(accs["native"], covariance.cov_pack(X, mask, None, narrow, rows=kept) if masked else X)
        return accs["native"]

    def reference(name: str = "reference") -> Tensor:
        covariance.gram_reference(accs[name], X[mask] if masked else X)
        return accs[name]

    def plain() -> Tensor:
        if device.type == "cuda":  # 16-bit products with float32 sums and results; rows that are zero add nothing
            rows = X * mask[:, None] if masked else X
            return accs["torch"].add_(torch.mm(rows.T, rows, out_dtype=torch.float32))
        wide = X.float() * mask[:, None] if masked else X.float()
        return accs["torch"].add_(wide.T @ wide)

    return Work(
        forms={"reference": reference, "torch": plain, "native": ours},
        exact=lambda: [reference("exact")],
        rtol=_SUMS if device.type == "cpu" else _CUT_SUMS,
        before=lambda name: accs[name].zero_(),
        cost=costs.gram_(T, d, 2, kept),
    )
