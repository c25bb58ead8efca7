"""The text of csrc/cuda/dcs.cu on the thread emulator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.kernels.dcs import dcs_batch_reference, dcs_variance_reference, dcs_weights_reference
from tests.kernels.conftest import SIZES
from tests.kernels.emulator import emulate
from tests.kernels.test_dcs import _form, _oracle

F64 = torch.float64


def _weights(V, scale=1.0, min_ess=0.25, kernel="gaussian", consistent=False, kind="plain"):
    found = emulate(
        "dcs_weights", "dcs", kind, V=V, scale=scale, min_ess=min_ess, excess=int(kernel == "excess"),
        mad_consistent=int(consistent),
    )  # fmt: skip
    return found["w"], found["stats"]


def _batch(Y, M, counts=None, scale=1.0, min_ess=0.25, kernel="gaussian", kind="plain", case="dcs_batch"):
    found = emulate(
        case, "dcs", kind, Y=Y, M=M, counts=counts, scale=scale, min_ess=min_ess, excess=int(kernel == "excess"),
        mad_consistent=0,
    )  # fmt: skip
    return found["w"], found["stats"]


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("S", "R"), [(0, 3), (1, 1), (7, 7), (97, 129), (129, 97), (64, 32), (65, 33), (5, 0)])
def test_variance(rng, S, R, dtype):
    Y, M = torch.randn(S, R, generator=rng, dtype=F64).to(dtype), _form(rng, R)
    M = M + torch.triu(torch.ones(R, R, dtype=F64), 1) - torch.tril(torch.ones(R, R, dtype=F64), -1)  # skew: no part
    got = emulate("dcs_variance", "dcs", Y=Y, M=M)["v"]
    y = Y.double().numpy().astype(np.longdouble)
    exact = np.einsum("si,ij,sj->s", y, M.numpy(), y)
    size = np.einsum("si,ij,sj->s", np.abs(y), np.abs(M.numpy()), np.abs(y))
    assert (np.abs(got.numpy() - exact) <= 8 * np.finfo(float).eps * size).all()
    if S and R > 1:
        plain = dcs_variance_reference(Y, M).numpy()
        assert np.abs(got.numpy() - exact).max() <= 2 * np.abs(plain - exact).max() + np.finfo(float).eps * exact.max()
    narrow = M.float()
    torch.testing.assert_close(
        emulate("dcs_variance", "dcs", Y=Y, M=narrow)["v"], dcs_variance_reference(Y, narrow), rtol=1e-12, atol=1e-12
    )


def test_variance_shows_a_nan_in_its_own_row_only(rng):
    Y = torch.randn(97, 40, generator=rng)
    Y[70, 35] = float("nan")
    assert emulate("dcs_variance", "dcs", Y=Y, M=_form(rng, 40))["v"].isnan().nonzero().flatten().tolist() == [70]


@pytest.mark.parametrize("kernel", ["gaussian", "excess"])
@pytest.mark.parametrize("S", [*SIZES, 2, 96, 257, 3001])
def test_weights_equal_the_oracle(rng, S, kernel):
    V = torch.randn(S, generator=rng, dtype=F64).square() * 3
    for min_ess, consistent in ((0.0, True), (0.25, False), (0.9, False)):
        w, stats = _weights(V, 0.5, min_ess, kernel, consistent)
        if S == 1:
            assert w.tolist() == [1.0] and stats.tolist() == [0.0, 1.0, 1.0]
            continue
        want, *numbers = _oracle(V, 0.5, min_ess, kernel, consistent)
        np.testing.assert_allclose(w.numpy(), want, rtol=1e-8, atol=1e-12)
        assert stats.tolist() == pytest.approx(numbers, rel=1e-9)
        plain = dcs_weights_reference(V, 0.5, min_ess, kernel, consistent)
        assert stats[0].item() == plain.sigma  # order statistics: the same bits


@pytest.mark.parametrize(
    "values",
    [
        [],
        [3.0],
        [0.0, 0.0, 0.0],
        [-0.0, 0.0],
        [2.5] * 97,
        [1.0, 2.0, 4.0, 8.0],
        [1.0, 1.0, 1.0, 1.0, 5.0, 9.0],
        [1.0] * 6 + [0.0, 3.0, 4.0, 5.0],
        [5e-324, 0.0, 1e-310, 2e-310, 1e-300],
        [1e308, 1.7e308, 3.0, 1e300, 0.0, 2.0],
        [1.0 + k * 2.0**-52 for k in range(9)],
        [0.0] * 300 + [1e-200, 1e200],
    ],
)
def test_weights_of_special_values(values):
    V = torch.tensor(values, dtype=F64)
    for kernel in ("gaussian", "excess"):
        for min_ess in (0.0, 0.5):
            w, stats = _weights(V, 1.0, min_ess, kernel)
            want = dcs_weights_reference(V, 1.0, min_ess, kernel)
            torch.testing.assert_close(w, want.w, rtol=1e-9, atol=1e-12)
            assert stats.tolist() == pytest.approx(want[1:], rel=1e-9)


@pytest.mark.parametrize("factor", [1e-250, 1e-12, 1e12, 1e250])
def test_the_floor_holds_at_any_scale(rng, factor):
    V = torch.randn(1001, generator=rng, dtype=F64).square() * factor
    for kernel in ("gaussian", "excess"):
        w, stats = _weights(V, 1.0, 0.25, kernel)
        assert w.isfinite().all() and stats[2] >= 0.25 and w.mean().item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -1e-300, -float("nan")])
def test_weights_of_what_has_none_are_nan(bad):
    w, stats = _weights(torch.tensor([1.0, bad, 2.0], dtype=F64))
    assert w.isnan().all() and stats.isnan().all()


def test_order_statistics_are_exact(rng):
    # Values that differ in few bits, in many, and in the first; every number of them up to two digits' worth.
    for S in (2, 3, 255, 256, 257, 700):
        for V in (
            torch.randint(0, 4, (S,), generator=rng).double(),
            torch.randint(0, 2**40, (S,), generator=rng).double() * 2.0**-20,
            torch.randn(S, generator=rng, dtype=F64).mul(200).exp(),
        ):
            _, stats = _weights(V, 1.0, 0.0)
            assert stats[0].item() == np.median(np.abs(V.numpy() - np.median(V.numpy())))


# From 64 modules on one launch does all; below that there are two. Both give the same bits.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_of_few_and_of_many_modules(rng, dtype):
    Y = torch.randn(64, 70, 7, generator=rng).to(dtype)
    M, counts = torch.stack([_form(rng, 7)] * 64), torch.randint(0, 71, (64,), generator=rng)
    counts[:3] = torch.tensor([0, 1, 70])
    for i, n in enumerate(counts.tolist()):
        Y[i, n:] = float("nan")
    w, stats = _batch(Y, M, counts, 0.3, 0.5)
    want = dcs_batch_reference(Y, M, counts, 0.3, 0.5)
    torch.testing.assert_close(w, want.w, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(stats, want.stats, rtol=1e-9, atol=0.0)
    few = _batch(Y[:5], M[:5], counts[:5], 0.3, 0.5)
    assert torch.equal(few[0], w[:5]) and torch.equal(few[1], stats[:5])


def test_a_module_that_cannot_be_weighed_spoils_no_other(rng):
    Y, M = torch.randn(4, 33, 5, generator=rng), torch.stack([_form(rng, 5)] * 4)
    clean = _batch(Y, M)
    Y[1, 30, 2] = float("nan")
    w, stats = _batch(Y, M, torch.tensor([33, 31, 34, -1]))
    assert torch.equal(w[0], clean[0][0]) and stats[1:].isnan().all()
    assert w[1, :31].isnan().all() and (w[1, 31:] == 0).all() and w[2:].isnan().all()


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_sanitizers_find_nothing(rng, kind):
    Y, M = torch.randn(1, 66, 33, generator=rng), _form(rng, 33)[None]
    want = _batch(Y, M, torch.tensor([65]), 0.01, 0.9, "excess")
    w, stats = _batch(Y, M, torch.tensor([65]), 0.01, 0.9, "excess", kind, "dcs_batch_at_once")
    torch.testing.assert_close(w, want[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(stats, want[1], rtol=1e-9, atol=0.0)
    for found in (_batch(Y[:, :8], M, kind=kind), _weights(torch.arange(300.0).double(), min_ess=0.0, kind=kind)):
        assert found[0].mean().item() == pytest.approx(1.0)
