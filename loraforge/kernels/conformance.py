"""Every operator against its reference on small odd sizes: what `loraforge doctor` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loraforge.kernels import (
    anderson,
    backend,
    consistency,
    core_svd,
    covariance,
    dcs,
    entry_counts,
    entrywise,
    gram_cholesky,
    jacobi,
)

_FLOAT64 = 1e-12  # sums of a few hundred float64 terms taken in another order
_FLOAT32 = 1e-5  # products of a few hundred float32 terms against float64
_EXACT = 0.0  # the same arithmetic in the same order

Case = Callable[[torch.Generator], tuple[Sequence[Tensor], Sequence[Tensor]]]


def _normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    # Drawn on the CPU: the same numbers on every device.
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


def _anderson_dots(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    H, f = _normal(g, 3, 129), _normal(g, 129)
    return [anderson.anderson_dots(H, f)], [anderson.anderson_dots_reference(H, f)]


def _anderson_mix(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    X, F, a = (_normal(g, *shape, dtype=torch.float64) for shape in ((3, 129), (3, 129), (3,)))
    got, want = X.new_empty(129), X.new_empty(129)
    anderson.anderson_mix(X, F, a, 0.7, got)
    anderson.anderson_mix_reference(X, F, a, 0.7, want)
    return [got], [want]


def _dcs_variance(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    Y, root = _normal(g, 97, 7), _normal(g, 7, 7, dtype=torch.float64)
    M = root @ root.T
    return [dcs.dcs_variance(Y, M)], [dcs.dcs_variance_reference(Y, M)]


def _dcs_weights(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    V = _normal(g, 97, dtype=torch.float64).square()
    got = [dcs.dcs_weights(V, 0.1, 0.5, kernel).w for kernel in ("gaussian", "excess")]
    return got, [dcs.dcs_weights_reference(V, 0.1, 0.5, kernel).w for kernel in ("gaussian", "excess")]


def _dcs_batch(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    Y, root, counts = _normal(g, 3, 97, 7), _normal(g, 3, 7, 7, dtype=torch.float64), torch.tensor([97, 33, 0])
    given = (Y, root @ root.mT, counts, 0.1, 0.5)
    return list(dcs.dcs_batch(*given)), list(dcs.dcs_batch_reference(*given))


def _hidden(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    return _normal(g, 33, 97), _normal(g, 33, 97), _normal(g, 33).abs() > 0.5


def _consistency_forward(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    given = _hidden(g)
    got = [consistency.consistency_forward(*given, rule, 0.1) for rule in consistency.RULES]
    return got, [consistency.consistency_forward_reference(*given, rule, 0.1) for rule in consistency.RULES]


def _consistency_backward(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    given = (torch.tensor(0.7, dtype=torch.float64), *_hidden(g))
    got = [consistency.consistency_backward(*given, rule, 0.1) for rule in consistency.RULES]
    return got, [consistency.consistency_backward_reference(*given, rule, 0.1) for rule in consistency.RULES]


def _cov_pack(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    x, weight = _normal(g, 97, 33), _normal(g, 97).abs()
    mask = weight > 0.5
    got = [covariance.cov_pack(x, mask, weight, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return got, [covariance.cov_pack_reference(x, mask, weight, dtype) for dtype in (torch.float32, torch.bfloat16)]


def _cov_fold(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    acc, chunk = _normal(g, 97, 97, dtype=torch.float64), _normal(g, 97, 97)
    got, want = acc.clone(), acc.clone()
    covariance.cov_fold_(got, chunk, symmetric=True)
    covariance.cov_fold_reference(want, chunk, symmetric=True)
    return [got], [want]


def _gram(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    X = _normal(g, 129, 33)
    got, want = torch.zeros(33, 33, dtype=torch.float64), torch.zeros(33, 33, dtype=torch.float64)
    covariance.gram_(got, X)
    covariance.gram_reference(want, X)
    return [got], [want]


def _batched_core_svd(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    cores = [_normal(g, R, 7, dtype=torch.float64) for R in (1, 7, 33)]
    return [(U * S) @ Vh for U, S, Vh in core_svd.batched_core_svd(cores)], cores


def _parts(g: torch.Generator) -> list[entrywise.Part]:
    wide = torch.float64
    return [
        entrywise.Part(_normal(g, 33, r, dtype=wide), _normal(g, r, 97, dtype=wide), 1.0, w, 0.2, 3.0, key=r << 90)
        for r, w in ((1, 1.0), (7, -0.5), (16, 0.3))
    ]


def _entry_merge(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    parts, got, want = _parts(g), [], []
    for elect, limit, dtype in ((False, entrywise.SPAN, torch.float32), (True, 2**31, torch.float64)):
        got.append(entrywise.entry_merge(parts, 3, 33, limit=limit, gain=2.0, elect=elect, dtype=dtype))
        want.append(
            entrywise.entry_merge_reference(parts, 3, 33, limit=limit, gain=2.0, elect=elect, dtype=dtype, step=8)
        )
    return got, want


def _entry_counts(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    rows = _normal(g, 33, 97)
    got, want = (torch.zeros(2, 2**15, dtype=torch.int64) for _ in range(2))
    prefixes, f32 = [0x3F800000 >> 15, 0x3F000000 >> 15], torch.float32  # 1.0 to 1.004, 0.5 to 0.502
    entry_counts.entry_counts_(got, rows, None, dtype=f32, compared=f32, prefixes=prefixes, low=0, high=15)
    entry_counts.entry_counts_reference(want, rows, None, 1.0, f32, f32, prefixes, 0, 15, 8)
    return [got], [want]


def _drop_rescale(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    got = _normal(g, 33, 97)
    want = got.clone()
    entrywise.drop_rescale_(got, 3 << 70, 5, 2**30, 4.0)
    entrywise.drop_rescale_reference(want, 3 << 70, 5, 2**30, 4.0)
    return [got], [want]


def _jacobi_svd(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    C = _normal(g, 3, 33, 7, dtype=torch.float64)
    C[1, :, 3] = C[1, :, 2]
    U, S, Vh, _ = jacobi.jacobi_svd(C)
    return [S, (U * S[:, None]) @ Vh], [jacobi.jacobi_svd_reference(C)[1], C]


def _gram_factor(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    X = _normal(g, 3, 97, 7, dtype=torch.float64)
    X[1, :, 3], X[2, :, 5] = X[1, :, 2], 0.0
    G = X.mT @ X
    return list(gram_cholesky.gram_factor(G)), list(gram_cholesky.gram_factor_reference(G))


def _pick_rank(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    S = _normal(g, 7, 33, dtype=torch.float64).abs().sort(-1, descending=True).values
    return [core_svd.pick_rank(S, 0.9, 1, 20)], [core_svd.pick_rank_reference(S, 0.9, 1, 20)]


def _scale_write(g: torch.Generator) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    U, S, Vh = _normal(g, 33, 7), _normal(g, 7).abs(), _normal(g, 7, 97)
    got = core_svd.scale_write(U, S, Vh, 5, torch.bfloat16)
    return got, core_svd.scale_write_reference(U, S, Vh, 5, torch.bfloat16)


CASES: dict[str, tuple[Case, float]] = {
    "anderson_dots": (_anderson_dots, _FLOAT64),
    "anderson_mix": (_anderson_mix, _FLOAT64),
    "dcs_variance": (_dcs_variance, _FLOAT64),
    "dcs_weights": (_dcs_weights, 1e-10),  # tau is found to 1e-12 and the exponent multiplies its error
    "dcs_batch": (_dcs_batch, 1e-10),
    "consistency_forward": (_consistency_forward, _FLOAT64),
    "consistency_backward": (_consistency_backward, _EXACT),
    "cov_pack": (_cov_pack, _EXACT),
    "cov_fold_": (_cov_fold, _EXACT),
    "gram_": (_gram, _FLOAT32),
    "batched_core_svd": (_batched_core_svd, _FLOAT64),
    "entry_merge": (_entry_merge, 2e-7),  # a rounding to float32
    "entry_counts_": (_entry_counts, _EXACT),
    "drop_rescale_": (_drop_rescale, _EXACT),
    "jacobi_svd": (_jacobi_svd, _FLOAT64),
    "gram_factor": (_gram_factor, _FLOAT64),
    "pick_rank": (_pick_rank, _EXACT),
    "scale_write": (_scale_write, _EXACT),
}


def _error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest deviation, relative to the largest value expected; infinite where a shape or dtype differs or NaN is."""
    worst = 0.0
    for x, y in zip(got, want, strict=True):
        if x.shape != y.shape or x.dtype != y.dtype or not bool(torch.isfinite(x).all()):
            return float("inf")
        worst = max(worst, float((x.double() - y.double()).abs().max() / y.double().abs().max()))
    return worst


def run(device: str | torch.device = "cpu") -> list[dict[str, Any]]:
    """One row an operator: `op`, `device`, `path`, `max_error`, `tolerance`, `ok`.

    Args:
        device: Where the tensors are.
    """
    rows = []
    for op, (case, tolerance) in CASES.items():
        before = backend.kernel_report()["calls"].get(op, {})
        with torch.device(device):
            got, want = case(torch.Generator("cpu").manual_seed(0))
        after = backend.kernel_report()["calls"].get(op, {})
        taken = [path for path, number in after.items() if number > before.get(path, 0)]
        error = _error(got, want)
        rows.append(
            {
                "op": op,
                "device": str(device),
                "path": "+".join(taken),
                "max_error": error,
                "tolerance": tolerance,
                "ok": error <= tolerance,
            }
        )
    return rows
