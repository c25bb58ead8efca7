from __future__ import annotations

import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.kernels import batched_core_svd, core_svd_stack, jacobi, jacobi_svd
from tests.kernels.matrices import assert_decomposes, hard_matrices, orthogonality

F64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("R", [1, 2, 7, 33, 129])
def test_hard_matrices(path, R, dtype):
    cases = hard_matrices(R, dtype)
    U, S, Vh, info = jacobi_svd(torch.stack(list(cases.values())))
    for at, (name, C) in enumerate(cases.items()):
        assert_decomposes(C, U[at], S[at], Vh[at], name)
    assert (info > 0).all()


@pytest.mark.parametrize("shape", [(97, 7), (7, 97), (129, 128), (1, 9), (9, 1)])
def test_tall_wide_and_strided(path, rng, shape):
    stack = torch.randn(3, *shape[::-1], generator=rng, dtype=F64).mT
    before = stack.clone()
    U, S, Vh, _ = jacobi_svd(stack)
    for at in range(3):
        assert_decomposes(stack[at], U[at], S[at], Vh[at])
    assert torch.equal(stack, before)


def test_null_directions_are_exact_zeros(native, rng):
    C = torch.zeros(3, 9, 9, dtype=F64)
    C[1, :, ::2] = torch.randn(9, 5, generator=rng, dtype=F64)
    C[2, 3, 4] = -2.0
    U, S, Vh, _ = jacobi_svd(C)
    assert [(row > 0).sum().item() for row in S] == [0, 5, 1] and S[2, 0] == 2.0
    assert all(orthogonality(U[at]) < 1e-14 and orthogonality(Vh[at].mT) < 1e-14 for at in range(3))


@pytest.mark.parametrize("factor", [2.0**-1040, 2.0**1000])
def test_a_power_of_two_changes_no_bit(native, rng, factor):
    C = torch.randn(2, 9, 5, generator=rng, dtype=F64).round(decimals=1)  # few bits: denormals hold them all
    U, S, Vh, _ = jacobi_svd((C * 8).round())
    other = jacobi_svd((C * 8).round() * factor)
    assert torch.equal(other[0], U) and torch.equal(other[2], Vh)
    torch.testing.assert_close(other[1] / factor, S, rtol=1e-10, atol=0)


def test_what_went_wrong_stands_in_info(path, rng):
    C = torch.randn(3, 9, 5, generator=rng, dtype=F64)
    C[1, 0, 3] = float("inf")
    U, S, Vh, info = jacobi_svd(C)
    assert info[1] == jacobi.NOT_FINITE and info[0] > 0 and info[2] > 0
    assert U[1].isnan().all() and S[1].isnan().all() and Vh[1].isnan().all()
    assert_decomposes(C[2], U[2], S[2], Vh[2])


def test_too_few_sweeps_are_told(native, rng):
    C = torch.randn(2, 9, 9, generator=rng, dtype=F64)
    C[1] = torch.eye(9, dtype=F64)
    assert jacobi_svd(C, 1)[3].tolist() == [jacobi.NOT_CONVERGED, 1]


def test_empty_stacks(path):
    for shape in ((0, 4, 3), (2, 0, 3), (2, 3, 0)):
        U, S, Vh, info = jacobi_svd(torch.zeros(shape))
        k = min(shape[1:])
        assert (U.shape, S.shape, Vh.shape) == ((shape[0], shape[1], k), (shape[0], k), (shape[0], k, shape[2]))
        assert info.shape == (shape[0],) and info.dtype == torch.int32


def test_refusals():
    for arguments, words in (
        ((torch.zeros(2, 3),), ["tensor C", "(2, 3)"]),
        ((torch.zeros(1, 2, 3).half(),), ["tensor C", "float16"]),
        ((torch.zeros(1, 2, 3), 0), ["sweeps", "0", "1 to 1000"]),
    ):
        with pytest.raises(LoraforgeError) as caught:
            jacobi_svd(*arguments)
        assert all(word in str(caught.value) for word in ["jacobi_svd", *words])


def test_a_stack_gives_what_its_cores_give(path, rng):
    C = torch.randn(4, 9, 7, generator=rng, dtype=F64)
    for stacked, alone in zip(zip(*core_svd_stack(C), strict=True), batched_core_svd(list(C)), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(stacked, alone, strict=True))
    assert [part.shape for part in core_svd_stack(C[:0])] == [(0, 9, 7), (0, 7), (0, 7, 7)]
    C[2, 1, 1] = float("nan")
    with pytest.raises(LoraforgeError, match=r"cores\[2\]\[1, 1\]"):
        core_svd_stack(C)


def test_a_core_is_named_by_what_the_device_says_of_it(monkeypatch, rng):
    """The way of a GPU, run on the CPU: grouped by shape, one look at all `info`s."""
    from loraforge.kernels import core_svd

    cores = [torch.randn(*shape, generator=rng, dtype=F64) for shape in ((5, 5), (3, 4), (5, 5), (170, 2))]
    for C, (U, S, Vh) in zip(cores, core_svd._on_device(cores), strict=True):
        assert_decomposes(C, U, S, Vh)
    cores[2][4, 0] = float("nan")
    with pytest.raises(LoraforgeError, match=r"cores\[2\]\[4, 0\]"):
        core_svd._on_device(cores)
    plain = jacobi.jacobi_svd
    monkeypatch.setattr(jacobi, "jacobi_svd", lambda C: (*plain(C)[:3], torch.full((len(C),), -1, dtype=torch.int32)))
    with pytest.raises(LoraforgeError, match=r"cores\[1\](.|\n)*no convergence after 40 sweeps"):
        core_svd._on_device([torch.zeros(170, 1), torch.zeros(2, 2)])
