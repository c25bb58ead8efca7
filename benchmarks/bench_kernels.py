"""Operators against their PyTorch reference and against what a PyTorch user would write, on the CPU.

    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 pytest benchmarks/bench_kernels.py --benchmark-only \
        --benchmark-group-by=group --benchmark-columns=median,min,rounds

On a machine that other work shares, add `--benchmark-timer=time.process_time` (one thread: processor time is then the
time of the call alone). Every timing is followed by a comparison of its result with the reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from loraforge.kernels import anderson, backend, core_svd, covariance, dcs

F64 = torch.float64
FORMS = ("native", "reference", "torch")


@dataclass(frozen=True)
class Case:
    """One operator on one size.

    Attributes:
        native: The operator; runs with LORAFORGE_KERNELS=native.
        reference: Its PyTorch form, which runs where nothing was built.
        torch: The best library calls for the same numbers, where they differ from the reference.
        rtol: Deviation allowed from the reference, relative to its largest value.
        rounds: Timings taken.
        setup: Runs before every timing, outside of it.
    """

    native: Callable[[], Sequence[Tensor]]
    reference: Callable[[], Sequence[Tensor]]
    torch: Callable[[], Sequence[Tensor]] | None = None
    rtol: float = 1e-10
    rounds: int = 15
    setup: Callable[[], None] | None = None


def _dots() -> Case:
    H, f = torch.randn(5, 4_000_000), torch.randn(4_000_000)

    def plain() -> Sequence[Tensor]:
        wide = f.double()
        return [torch.cat([H.double() @ wide, (wide @ wide)[None]])]

    return Case(
        lambda: [anderson.anderson_dots(H, f)], lambda: [anderson.anderson_dots_reference(H, f)], plain, rounds=7
    )


def _dots_float32() -> Case:
    """Against the float32 product: as fast, but with float64 sums."""
    H, f = torch.randn(5, 4_000_000), torch.randn(4_000_000)
    return Case(
        lambda: [anderson.anderson_dots(H, f)],
        lambda: [anderson.anderson_dots_reference(H, f)],
        lambda: [torch.cat([H @ f, (f @ f)[None]]).double()],
        rtol=1e-3,
        rounds=7,
    )


def _mix() -> Case:
    X, F, a = torch.randn(5, 4_000_000), torch.randn(5, 4_000_000), torch.randn(5, dtype=F64)
    out, narrow = torch.empty(4_000_000), a.float()

    def run(function: Callable[..., None]) -> Sequence[Tensor]:
        function(X, F, a, 0.7, out)
        return [out]

    return Case(
        lambda: run(anderson.anderson_mix),
        lambda: run(anderson.anderson_mix_reference),
        lambda: [torch.addmm((narrow @ X)[None], (narrow * 0.7)[None], F)[0]],
        rtol=1e-5,
        rounds=7,
    )


def _variance(S: int, R: int) -> Case:
    Y, root = torch.randn(S, R), torch.randn(R, R, dtype=F64)
    M = root @ root.T
    narrow = M.float()
    return Case(
        lambda: [dcs.dcs_variance(Y, M)],
        lambda: [dcs.dcs_variance_reference(Y, M)],
        lambda: [((Y @ narrow) * Y).sum(-1).clamp_min(0).double()],
        rtol=1e-5,
    )


def _weights(S: int, scale: float) -> Case:
    V = torch.randn(S, dtype=F64).square()
    return Case(lambda: [dcs.dcs_weights(V, scale).w], lambda: [dcs.dcs_weights_reference(V, scale, 0.25).w], rtol=1e-8)


def _pack(dtype: torch.dtype, to: torch.dtype, weighted: bool) -> Case:
    x, mask = torch.randn(8192, 768).to(dtype), torch.arange(8192) % 512 < 256  # half of it padding
    weight = torch.rand(8192) if weighted else None
    return Case(
        lambda: [covariance.cov_pack(x, mask, weight, to)],
        lambda: [covariance.cov_pack_reference(x, mask, weight, to)],
        rtol=0.0,
    )


def _fold(d: int, symmetric: bool) -> Case:
    chunk, acc = torch.randn(d, d), torch.zeros(d, d, dtype=F64)

    def run(function: Callable[..., None]) -> Sequence[Tensor]:
        function(acc, chunk, symmetric)
        return [acc]

    def setup() -> None:
        acc.zero_()

    return Case(lambda: run(covariance.cov_fold_), lambda: run(covariance.cov_fold_reference), rtol=0.0, setup=setup)


def _gram(d: int, masked: bool) -> Case:
    """One hook call: 4096 rows of bfloat16; masked: half of them padding, which the full-length product zeroes."""
    X, mask = torch.randn(4096, d).bfloat16(), torch.arange(4096) % 512 < 256

    def ours() -> Sequence[Tensor]:
        acc = torch.zeros(d, d, dtype=F64)
        covariance.gram_(acc, covariance.cov_pack(X, mask, None, torch.float32) if masked else X)
        return [acc]

    def reference() -> Sequence[Tensor]:
        acc = torch.zeros(d, d, dtype=F64)
        covariance.gram_reference(acc, X[mask] if masked else X)
        return [acc]

    def plain() -> Sequence[Tensor]:
        rows = X.float() * mask[:, None] if masked else X.float()
        return [torch.zeros(d, d, dtype=F64).add_(rows.T @ rows)]

    return Case(ours, reference, plain, rtol=1e-5, rounds=5)


def _svd(R: int, modules: int) -> Case:
    cores = [torch.randn(R, R) for _ in range(modules)]
    stack = torch.stack(cores)

    def plain() -> Sequence[Tensor]:
        U, S, Vh = torch.linalg.svd(stack, full_matrices=False)
        return [S]

    return Case(
        lambda: [S for _, S, _ in core_svd.batched_core_svd(cores)][-1:],
        lambda: [S for _, S, _ in core_svd.batched_core_svd_reference(cores)][-1:],
        lambda: [plain()[0][-1]],
        rtol=1e-5,
        rounds=7,
    )


def _rank() -> Case:
    S = torch.rand(224, 64).sort(-1, descending=True).values
    return Case(
        lambda: [core_svd.pick_rank(S, 0.9)],
        lambda: [core_svd.pick_rank_reference(S, 0.9, 1, 64)],
        lambda: [(S.square().cumsum(-1) < 0.9 * S.square().sum(-1, keepdim=True)).sum(-1) + 1],
        rtol=1.0 / 32,
    )


def _split() -> Case:
    U, S, Vh = torch.linalg.svd(torch.randn(128, 128))
    return Case(
        lambda: core_svd.scale_write(U, S, Vh, 64, torch.bfloat16),
        lambda: core_svd.scale_write_reference(U, S, Vh, 64, torch.bfloat16),
        rtol=0.0,
    )


CASES: dict[str, Callable[[], Case]] = {
    "anderson_dots m=5 P=4M": _dots,
    "anderson_dots m=5 P=4M, torch in float32": _dots_float32,
    "anderson_mix m=5 P=4M": _mix,
    "dcs_variance S=1024 R=64": lambda: _variance(1024, 64),
    "dcs_variance S=24000 R=32": lambda: _variance(24_000, 32),
    "dcs_variance S=4096 R=256": lambda: _variance(4096, 256),
    "dcs_weights S=1024, floor acts": lambda: _weights(1024, 0.01),
    "dcs_weights S=24000, floor acts": lambda: _weights(24_000, 0.01),
    "dcs_weights S=24000, floor idle": lambda: _weights(24_000, 10.0),
    "cov_pack 8192x768 half, fp32": lambda: _pack(torch.float32, torch.float32, False),
    "cov_pack 8192x768 half, fp32, weight": lambda: _pack(torch.float32, torch.float32, True),
    "cov_pack 8192x768 half, bf16 to fp32, weight": lambda: _pack(torch.bfloat16, torch.float32, True),
    "cov_fold_ d=1024": lambda: _fold(1024, False),
    "cov_fold_ d=1024 symmetric": lambda: _fold(1024, True),
    "gram_ 4096x768 bf16": lambda: _gram(768, False),
    "gram_ 4096x768 bf16, half padding": lambda: _gram(768, True),
    "gram_ 4096x2048 bf16": lambda: _gram(2048, False),
    "batched_core_svd 56 x R=32": lambda: _svd(32, 56),
    "batched_core_svd 56 x R=64": lambda: _svd(64, 56),
    "batched_core_svd 14 x R=128": lambda: _svd(128, 14),
    "pick_rank 224 x 64": _rank,
    "scale_write 128x128 k=64 bf16": _split,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", list(CASES))
def test_kernel(benchmark, monkeypatch, name: str, form: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    function = getattr(case, form)
    if function is None:
        pytest.skip("the reference is what a PyTorch user would write")
    if form == "native":
        if not backend.native_available():
            pytest.skip(f"loraforge._C is not built: {backend.BUILD_COMMAND}")
        monkeypatch.setenv(backend.VARIABLE, "native")
    benchmark.group = name
    benchmark.extra_info.update(case=name, form=form, threads=torch.get_num_threads())
    got = [t.clone() for t in benchmark.pedantic(function, setup=case.setup, rounds=case.rounds, warmup_rounds=2)]
    if case.setup is not None:
        case.setup()
    for mine, exact in zip(got, case.reference(), strict=True):
        assert (mine.double() - exact.double()).abs().max() <= case.rtol * exact.double().abs().max()
