"""Core SVDs, ranks and factors on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.kernels import backend, batched_core_svd, core_svd_stack, jacobi, jacobi_svd, pick_rank, scale_write
from loraforge.kernels.core_svd import pick_rank_reference, scale_write_reference
from tests.kernels.matrices import assert_decomposes, hard_matrices

F64 = torch.float64

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _native(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "native")


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("R", [1, 2, 7, 33, 64, 119, 128, 160])
def test_hard_matrices(R, dtype):
    cases = hard_matrices(R, dtype)
    found = jacobi_svd(torch.stack(list(cases.values())).cuda())
    U, S, Vh, info = (part.cpu() for part in found)
    for at, (name, C) in enumerate(cases.items()):
        assert_decomposes(C, U[at], S[at], Vh[at], name)
    assert (info > 0).all() and info.max() <= 16


@pytest.mark.parametrize("shape", [(97, 7), (7, 97), (160, 33), (33, 160), (1, 9), (9, 1)])
def test_tall_wide_and_strided(rng, shape):
    C = torch.randn(300, *shape[::-1], generator=rng, dtype=F64).mT
    U, S, Vh = (part.cpu() for part in core_svd_stack(C.cuda()))
    for at in (0, 150, 299):
        assert_decomposes(C[at], U[at], S[at], Vh[at])


def test_runs_are_equal_to_the_bit_on_any_stream(rng):
    C = torch.randn(40, 64, 64, generator=rng, dtype=F64).cuda()
    first = jacobi_svd(C)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = jacobi_svd(C)
    stream.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_cores_of_mixed_shapes_keep_their_order(rng):
    shapes = [(64, 64), (33, 64), (170, 170), (64, 64), (0, 5), (1, 1), (64, 33)]
    cores = [torch.randn(*shape, generator=rng, dtype=F64) for shape in shapes]
    before = backend.kernel_report()["calls"].get("jacobi_svd", {})
    for C, (U, S, Vh) in zip(cores, batched_core_svd([core.cuda() for core in cores]), strict=True):
        if C.numel():
            assert_decomposes(C, U.cpu(), S.cpu(), Vh.cpu())
        assert U.shape == (C.shape[0], min(C.shape))
    after = backend.kernel_report()["calls"]["jacobi_svd"]
    assert after["library"] == before.get("library", 0) + 1 and after["cuda"] > before.get("cuda", 0)


def test_a_bad_core_is_named(rng):
    C = torch.randn(3, 9, 9, generator=rng, dtype=F64).cuda()
    assert jacobi_svd(C, 1)[3].tolist() == [jacobi.NOT_CONVERGED] * 3
    C[1, 2, 3] = float("nan")
    with pytest.raises(LoraforgeError, match=r"C\[1\]\[2, 3\]"):
        core_svd_stack(C)
    with pytest.raises(LoraforgeError, match=r"cores\[1\]\[2, 3\]"):
        batched_core_svd(list(C))


def test_the_operator_refuses_for_itself():
    with pytest.raises(RuntimeError, match="at most 1024 rows and columns"):
        torch.ops.loraforge.jacobi_svd(torch.zeros(1, 1025, 2, device="cuda"), 9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("R", [0, 1, 33, 129])
def test_ranks(rng, R, dtype):
    S = torch.rand(R, 9, generator=rng, dtype=F64).to(dtype).sort(0, descending=True).values.T
    S[3:5] = 0.0
    for energy, bounds in ((0.9, (1, None)), (1.0, (0, None)), (0.3, (2, 5))):
        most = max(R, bounds[0]) if bounds[1] is None else bounds[1]
        want = pick_rank_reference(S, energy, bounds[0], most)
        assert torch.equal(pick_rank(S.cuda(), energy, *bounds).cpu(), want)
        assert torch.equal(pick_rank(S[0].cuda(), energy, *bounds).cpu(), want[0])


@pytest.mark.parametrize("to", [torch.float32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_factors(rng, dtype, to):
    for m, n, R, rank in ((97, 129, 7, 7), (4096, 33, 64, 20), (1, 1, 1, 1), (7, 5, 4, 0)):
        U, S, Vh = (torch.randn(*shape, generator=rng, dtype=F64).to(dtype) for shape in ((R, m), (R,), (n, R)))
        given = (U.T, S.abs(), Vh.T)
        B, A = scale_write(*(part.cuda() for part in given), rank, to)
        plain_B, plain_A = scale_write_reference(*given, rank, to)
        assert torch.equal(B.cpu(), plain_B) and torch.equal(A.cpu(), plain_A)
        assert B.is_contiguous() and A.is_contiguous()
