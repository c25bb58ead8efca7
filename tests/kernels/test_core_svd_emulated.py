"""The text of csrc/cuda/jacobi_svd.cu and factors.cu on the thread emulator."""

from __future__ import annotations

import pytest
import torch

from loraforge.kernels.core_svd import pick_rank_reference, scale_write_reference
from loraforge.kernels.jacobi import NOT_CONVERGED, NOT_FINITE, SWEEPS
from tests.kernels.emulator import emulate
from tests.kernels.matrices import assert_decomposes, hard_matrices, orthogonality

F64 = torch.float64


def _svd(C, kind="plain", sweeps=SWEEPS, shared=0):
    return emulate("jacobi_svd", "jacobi_svd", kind, C=C, sweeps=sweeps, shared=shared)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("R", [1, 2, 7, 33, 64])
def test_hard_matrices(R, dtype):
    cases = hard_matrices(R, dtype)
    names = list(cases) if R < 64 else ["normal", "graded", "equal columns", "zero columns", "triangles"]
    found = _svd(torch.stack([cases[name] for name in names]))
    for at, name in enumerate(names):
        assert_decomposes(cases[name], found["U"][at], found["S"][at], found["Vh"][at], name)
    # The QR in front keeps graded and rank-deficient matrices from taking dozens of sweeps.
    assert (found["info"] > 0).all() and found["info"].max() <= 12


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", [(97, 7), (7, 97), (33, 32), (1, 9), (9, 1), (34, 33)])
def test_tall_and_wide(rng, shape, dtype):
    C = torch.randn(2, *shape, generator=rng, dtype=F64).to(dtype)
    C[1, :, : shape[1] // 2] = 0.0
    found = _svd(C)
    for at in range(2):
        assert_decomposes(C[at], found["U"][at], found["S"][at], found["Vh"][at])


def test_null_directions_are_exact_zeros_with_orthonormal_vectors(rng):
    C = torch.zeros(4, 33, 33, dtype=F64)
    C[1, 4, 5] = -3.0
    C[2, :, ::2] = torch.randn(33, 17, generator=rng, dtype=F64)
    C[3] = torch.diag(torch.arange(33).to(F64) % 5)
    found = _svd(C)
    for at, rank in enumerate((0, 1, 17, 26)):
        assert (found["S"][at] > 0).sum() == rank
        assert orthogonality(found["U"][at]) < 1e-14 and orthogonality(found["Vh"][at].mT) < 1e-14
    assert found["S"][1, 0] == 3.0 and found["S"][3].tolist() == sorted((float(i % 5) for i in range(33)), reverse=True)


@pytest.mark.parametrize(("dtype", "scales"), [(torch.float32, (1e-40, 3e37)), (F64, (1e-310, 1e307))])
def test_scale_does_not_matter(rng, dtype, scales):
    """Powers of two commute with every step, so only the rounding of denormal input shows."""
    C = torch.randn(7, 7, generator=rng, dtype=F64).to(dtype)
    for scale in scales:
        scaled = (C.double() * scale).to(dtype) if dtype == torch.float32 else C * scale
        found = _svd(scaled[None])
        exact = torch.linalg.svdvals(scaled.double() / scale)
        got = found["S"][0].double() / scale
        # Denormals have steps of 1.4e-45 and 4.9e-324: of their largest that is less than 1e-4 here.
        rounding = 1e-4 if scale < 1 else 8 * torch.finfo(dtype).eps
        assert (got - exact).abs().max() <= rounding * exact[0]
        assert orthogonality(found["U"][0]) <= 8 * torch.finfo(dtype).eps


def test_what_is_not_finite_and_what_does_not_converge(rng):
    C = torch.randn(4, 9, 5, generator=rng, dtype=F64)
    C[1, 8, 4], C[2, 0, 0] = float("inf"), float("nan")
    found = _svd(C)
    assert found["info"][[1, 2]].tolist() == [NOT_FINITE] * 2 and (found["info"][[0, 3]] > 0).all()
    assert found["U"][1].isnan().all() and found["S"][2].isnan().all() and found["Vh"][2].isnan().all()
    assert_decomposes(C[3], found["U"][3], found["S"][3], found["Vh"][3])
    assert _svd(C[[0]], sweeps=1)["info"].tolist() == [NOT_CONVERGED]


def test_arrays_in_global_memory_give_the_same_bits(rng):
    """Little shared memory stands for many columns: one array outside, then both."""
    C = torch.randn(2, 40, 33, generator=rng, dtype=F64)
    whole = _svd(C)
    for shared in (20_000, 5_000):
        found = _svd(C, shared=shared)
        assert found["scratch"].numel() > whole["scratch"].numel()
        assert all(torch.equal(found[part], whole[part]) for part in ("U", "S", "Vh", "info"))


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_sanitizers_find_nothing_in_the_svd(rng, kind):
    C = torch.randn(2, 9, 5, generator=rng, dtype=F64)
    C[1, :, 2], C[1, :, 4] = C[1, :, 1], 0.0
    found = _svd(C, kind)
    for at in range(2):
        assert_decomposes(C[at], found["U"][at], found["S"][at], found["Vh"][at])
    wide = _svd(C.mT.to(torch.float32), kind, shared=1000)
    assert (wide["S"].double() - found["S"]).abs().max() < 1e-6
    assert _svd(torch.full((1, 2, 3), float("nan")), kind)["info"].tolist() == [NOT_FINITE]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("R", [1, 31, 33, 200])
def test_pick_rank(rng, R, dtype):
    S = torch.rand(9, R, generator=rng, dtype=F64).to(dtype).sort(-1, descending=True).values
    S[3], S[4, 1:] = 0.0, 0.0
    S[5] *= 1e-30
    for energy, least, most in ((0.9, 1, R), (1.0, 0, R), (0.0, 0, R), (0.5, 2, 5)):
        want = pick_rank_reference(S, energy, least, most)
        given = {"energy": energy, "least": least, "most": min(most, R)}
        assert torch.equal(emulate("pick_rank", "factors", S=S, across=0, **given)["ranks"], want)
        across = emulate("pick_rank", "factors", S=S.T.contiguous(), across=1, **given)["ranks"]
        assert torch.equal(across, want)


def test_ties_at_the_threshold_count(rng):
    S = torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 0.0]], dtype=F64)
    ranks = emulate("pick_rank", "factors", S=S, across=0, energy=0.9, least=0, most=2)["ranks"]
    assert ranks.tolist() == [1, 2, 1]


@pytest.mark.parametrize("to", [torch.float32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_scale_write(rng, dtype, to):
    for m, n, R, rank in ((97, 129, 7, 7), (97, 129, 7, 3), (1, 1, 1, 1), (7, 5, 4, 0)):
        U, S, Vh = (torch.randn(*shape, generator=rng, dtype=F64).to(dtype) for shape in ((m, R), (R,), (R, n)))
        given = {"U": U.T.contiguous(), "S": S.abs(), "Vh": Vh, "rank": rank, "to": torch.zeros(1, dtype=to)}
        found = emulate("scale_write", "factors", **given)
        B, A = scale_write_reference(U, S.abs(), Vh, rank, to)
        assert torch.equal(found["B"], B) and torch.equal(found["A"], A)


def test_the_address_sanitizer_finds_nothing_in_the_factors(rng):
    kind = "address"  # threads share no memory there
    S = torch.rand(3, 33, generator=rng, dtype=F64).sort(-1, descending=True).values
    got = emulate("pick_rank", "factors", kind, S=S, across=0, energy=0.9, least=1, most=33)["ranks"]
    assert torch.equal(got, pick_rank_reference(S, 0.9, 1, 33))
    U, Vh = torch.randn(3, 5, generator=rng, dtype=F64), torch.randn(3, 7, generator=rng, dtype=F64)
    given = {"U": U, "S": S[0, :3], "Vh": Vh, "rank": 2, "to": torch.zeros(1, dtype=torch.bfloat16)}
    assert emulate("scale_write", "factors", kind, **given)["B"].shape == (5, 2)
