"""dcs_variance, dcs_weights and dcs_batch on a GPU, against the CPU forms and a float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.kernels import dcs_batch, dcs_variance, dcs_weights
from tests.kernels.conftest import SIZES
from tests.kernels.test_dcs import _form, _oracle

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("native")]
F64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("S", "R"), [(0, 3), (1, 1), (97, 129), (1024, 64), (65, 256), (5, 0)])
def test_variance(rng, S, R, dtype):
    Y, M = torch.randn(S, R, generator=rng).to(dtype), _form(rng, R)
    got = dcs_variance(Y.cuda(), M.cuda())
    size = dcs_variance(Y.abs(), M.abs())
    assert ((got.cpu() - dcs_variance(Y, M)).abs() <= 16 * torch.finfo(F64).eps * size).all()
    assert torch.equal(got, dcs_variance(Y.cuda(), M.cuda()))


@pytest.mark.parametrize("kernel", ["gaussian", "excess"])
@pytest.mark.parametrize("min_ess", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("S", [*SIZES[1:], 96, 1024, 20_001])
def test_weights_equal_the_oracle(rng, S, min_ess, kernel):
    V = torch.randn(S, generator=rng, dtype=F64).square() * 3
    got = dcs_weights(V.cuda(), 0.5, min_ess, kernel)
    w, sigma, tau, ess = _oracle(V, 0.5, min_ess, kernel, False)
    np.testing.assert_allclose(got.w.cpu().numpy(), w, rtol=1e-8, atol=1e-12)
    assert (got.sigma, got.tau, got.ess) == pytest.approx((sigma, tau, ess), rel=1e-9)
    assert got.sigma == dcs_weights(V, 0.5, min_ess, kernel).sigma  # order statistics: the same bits
    assert torch.equal(got.w, dcs_weights(V.cuda(), 0.5, min_ess, kernel).w)


def test_weights_refuse_what_cannot_be_weighed():
    with pytest.raises(LoraforgeError, match=r"not finite(.|\n)*V\[1\]"):
        dcs_weights(torch.tensor([1.0, float("nan")], dtype=F64, device="cuda"))
    with pytest.raises(LoraforgeError, match="a variance is negative"):
        dcs_weights(torch.tensor([1.0, -1.0], dtype=F64, device="cuda"))


# From 64 modules on one launch does all; below that there are two.
@pytest.mark.parametrize("b", [1, 63, 64, 224])
def test_batches_of_ragged_modules(rng, b):
    Y, M = torch.randn(b, 300, 33, generator=rng).bfloat16(), torch.stack([_form(rng, 33)] * b)
    counts = torch.randint(0, 301, (b,), generator=rng)
    for i, n in enumerate(counts.tolist()):
        Y[i, n:] = float("nan")
    on, want = [t.cuda() for t in (Y, M, counts)], dcs_batch(Y, M, counts, 0.3, 0.5)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            got = dcs_batch(*on, 0.3, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    torch.testing.assert_close(got.w.cpu(), want.w, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(got.stats.cpu(), want.stats, rtol=1e-9, atol=0.0)
    alone = dcs_batch(*(t[:1] for t in on), 0.3, 0.5)
    assert torch.equal(alone.w[0], got.w[0]) and torch.equal(alone.stats[0], got.stats[0])


def test_a_count_out_of_range_and_a_nan_show_in_their_modules(rng):
    Y, M = torch.randn(4, 33, 5, generator=rng).cuda(), torch.stack([_form(rng, 5)] * 4).cuda()
    Y[3, 2, 1] = float("nan")
    got = dcs_batch(Y, M, torch.tensor([33, 34, -1, 33], device="cuda"))
    assert got.w[0].isfinite().all() and got.stats[1:].isnan().all() and got.w[1:].isnan().all()


def test_operands_on_two_devices_are_refused():
    with pytest.raises(RuntimeError, match="M has another device, expected the GPU of Y"):
        torch.ops.loraforge.dcs_variance(torch.zeros(2, 3, device="cuda"), torch.zeros(3, 3))
