from __future__ import annotations

import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.kernels import gram_factor
from loraforge.kernels.gram_cholesky import CUT, gram_factor_reference
from tests.kernels.emulator import emulate

F64 = torch.float64
SMALL = 8 * torch.finfo(F64).eps


def columns(rng, b, rows, R):
    return torch.randn(b, rows, R, generator=rng, dtype=F64) * torch.logspace(3, -3, R, dtype=F64)


def emulated(G, cut=CUT, kind="plain", shared=0):
    found = emulate("gram_factor", "gram_factor", kind, G=G, cut=cut, shared=shared)
    return found["triangle"], found["solve"], found["rank"], found["condition"]


FORMS = {"operator": gram_factor, "reference": gram_factor_reference, "kernel": emulated}


@pytest.fixture(params=list(FORMS))
def form(request):
    return FORMS[request.param]


def assert_factors(X, triangle, solve, rank, condition):
    """Orthonormal columns to eps cond^2, and the columns themselves to the cut-off."""
    R = X.shape[-1]
    for at, p in enumerate(rank.tolist()):
        Q = X[at] @ solve[at]
        assert not Q[:, p:].any() and not triangle[at, p:].any()
        loss = (torch.linalg.matrix_norm(Q[:, :p].T @ Q[:, :p] - torch.eye(p, dtype=F64))).item()
        assert loss <= R * SMALL * condition[at].item() ** 2
        size = X[at].norm(dim=0).clamp_min(1e-300)
        # What is cut off, and the rounding of the inverse.
        left = (X[at] - Q @ triangle[at]).norm(dim=0) / size
        assert (left <= 2 * CUT**0.5 * (p < R) + R * SMALL * condition[at]).all()


@pytest.mark.parametrize(("rows", "R"), [(1, 1), (9, 2), (40, 7), (97, 33), (200, 64)])
def test_full_rank(form, rng, rows, R):
    X = columns(rng, 3, rows, R)
    triangle, solve, rank, condition = form(X.mT @ X)
    assert rank.tolist() == [R] * 3 and (condition >= 1 - 1e-12).all()
    assert_factors(X, triangle, solve, rank, condition)
    for at in range(3):
        unit = X[at] / X[at].norm(dim=0)
        inverse = torch.linalg.inv(unit.T @ unit)
        assert condition[at].item() == pytest.approx((inverse.trace() / R).sqrt().item(), rel=1e-8)


def test_equal_columns_and_zeros_are_left_out(form, rng):
    X = columns(rng, 4, 60, 12)
    X[0, :, 6:] = X[0, :, :6] * 0.7
    X[1, :, ::3] = 0.0
    X[2] = 0.0
    X[3, :, 6:] = (X[3, :, :6] * 0.7).to(torch.float32).to(F64)  # equal to the rounding of float32
    triangle, solve, rank, condition = form(X.mT @ X)
    assert rank.tolist() == [6, 8, 0, 6] and condition[2] == 1.0
    assert_factors(X, triangle, solve, rank, condition)
    assert not triangle[1, :, ::3].any() and not solve[1, ::3].any()


def test_more_columns_than_rows(form, rng):
    X = columns(rng, 2, 5, 9)
    triangle, solve, rank, condition = form(X.mT @ X)
    assert rank.tolist() == [5, 5]
    assert_factors(X, triangle, solve, rank, condition)


def test_near_columns_are_kept_and_tell_their_condition(form, rng):
    X = columns(rng, 1, 80, 8)
    X[0, :, 7] = X[0, :, 0] * 1e-6 * (1 + 1e-5 * torch.randn(80, generator=rng, dtype=F64))
    triangle, solve, rank, condition = form(X.mT @ X)
    assert rank.item() == 8 and 1e4 < condition.item() < 1e6
    assert_factors(X, triangle, solve, rank, condition)


def test_a_larger_cut_stops_earlier(form, rng):
    X = columns(rng, 1, 50, 6)
    X[0, :, 5] = X[0, :, 0] + 1e-3 * torch.randn(50, generator=rng, dtype=F64) * X[0, :, 0].norm() / 50**0.5
    G = X.mT @ X
    assert [form(G, cut)[2].item() for cut in (1e-14, 1e-4, 1.0)] == [6, 5, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_own_matrix_only(form, rng, value):
    X = columns(rng, 3, 20, 4)
    X[1, 3, 2] = value
    triangle, solve, rank, condition = form(X.mT @ X)
    assert rank.tolist() == [4, 0, 4] and condition[1].isnan()
    assert triangle[1].isnan().all() and solve[1].isnan().all()
    assert_factors(X[[0, 2]], triangle[[0, 2]], solve[[0, 2]], rank[[0, 2]], condition[[0, 2]])


def test_the_forms_agree(rng):
    X = columns(rng, 3, 70, 33)
    X[1, :, 20:] = X[1, :, :13]
    G = X.mT @ X
    wanted = gram_factor_reference(G)
    for found in (gram_factor(G), emulated(G), emulated(G, shared=2000)):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_empty_stacks():
    for shape in ((0, 4, 4), (3, 0, 0)):
        found = gram_factor(torch.zeros(shape, dtype=F64))
        assert found.triangle.shape == shape and found.rank.tolist() == [0] * shape[0]
        assert found.condition.tolist() == [1.0] * shape[0]


def test_refusals():
    for arguments, words in (
        ((torch.zeros(2, 3, 3),), ["tensor G", "float32", "float64"]),
        ((torch.zeros(2, 2, 3, dtype=F64),), ["square", "(2, 2, 3)"]),
        ((torch.zeros(3, 3, dtype=F64),), ["tensor G", "(3, 3)"]),
        ((torch.zeros(1, 3, 3, dtype=F64), -0.5), ["cut", "-0.5"]),
    ):
        with pytest.raises(LoraforgeError) as caught:
            gram_factor(*arguments)
        assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_sanitizers_find_nothing(rng, kind):
    X = columns(rng, 2, 20, 9)
    X[1, :, 5:] = X[1, :, :4]
    for shared in (0, 600):
        found = emulated(X.mT @ X, kind=kind, shared=shared)
        assert found[2].tolist() == [9, 5]
        assert_factors(X, *found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("R", [1, 7, 33, 64, 160, 200])
def test_the_device_gives_the_same(rng, R):
    X = columns(rng, 5, 300, R)
    X[1, :, R // 2 :] = X[1, :, : R - R // 2]
    G = X.mT @ X
    found = gram_factor(G.cuda())
    assert found.triangle.is_cuda
    assert_factors(X, *(part.cpu() for part in found))
    assert torch.equal(found.rank.cpu(), gram_factor(G).rank)
