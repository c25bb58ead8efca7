from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError, UsageError
from loraforge.kernels import dcs_variance, dcs_weights
from tests.kernels.conftest import SIZES

F64 = torch.float64


def _oracle(V, scale, min_ess, kernel, consistent):
    """The formulas of 2.3 in numpy, tau by bisection on tau itself over a bracket that grows."""
    V = np.asarray(V, dtype=np.float64)
    middle = np.median(V)
    sigma = np.median(np.abs(V - middle)) * scale * (1.4826 if consistent or kernel == "excess" else 1.0)
    exponent = np.maximum(0.0, V - middle) / sigma if kernel == "excess" else (V - V.min()) / sigma**2

    def share(tau):
        w = np.exp(-exponent / tau)
        return w.sum() ** 2 / (w**2).sum() / len(V)

    tau = 1.0
    if share(1.0) < min_ess:
        low = high = 1.0
        while share(high) < min_ess:
            low, high = high, 2 * high
        for _ in range(200):
            mid = 0.5 * (low + high)
            low, high = (low, mid) if share(mid) >= min_ess else (mid, high)
        tau = high
    w = np.exp(-exponent / tau)
    return w / w.mean(), sigma, tau, share(tau)


def _form(rng, R):
    root = torch.randn(R, R + 2, generator=rng, dtype=F64)
    return root @ root.T


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("S", "R"), [(0, 3), (1, 1), (7, 7), (97, 129), (129, 97), (33, 4), (16, 5), (5, 0)])
def test_variance_is_the_quadratic_form(path, rng, S, R, dtype):
    Y, M = torch.randn(S, R, generator=rng, dtype=F64).to(dtype), _form(rng, R)
    got = dcs_variance(Y, M)
    y = Y.double().numpy()
    exact = np.einsum("si,ij,sj->s", y, M.numpy(), y)
    size = np.einsum("si,ij,sj->s", np.abs(y), np.abs(M.numpy()), np.abs(y))
    assert got.dtype == F64 and got.shape == (S,)
    assert (np.abs(got.numpy() - exact) <= 8 * np.finfo(float).eps * size).all()
    plain = ((Y.float() @ M.float()) * Y.float()).sum(-1).double().numpy()
    if S and R > 1:
        assert np.abs(got.numpy() - exact).max() <= 2 * np.abs(plain - exact).max()


def test_variance_takes_a_float32_form_and_any_strides(path, rng):
    Y, M = torch.randn(7, 97, generator=rng).T, _form(rng, 7).float()
    assert torch.equal(dcs_variance(Y, M), dcs_variance(Y.contiguous(), M.double()))
    assert torch.equal(dcs_variance(Y[::3], M), dcs_variance(Y, M)[::3])


def test_variance_of_equal_adapters_is_zero_not_negative(path, rng):
    # M of two equal adapters: y^T M y = ||K^{1/2} (y_1 - y_2)||^2 / 4, which is 0 where y_1 = y_2.
    K = _form(rng, 7)
    M = torch.cat([torch.cat([K, -K], 1), torch.cat([-K, K], 1)]) / 4
    y = torch.randn(97, 7, generator=rng)
    V = dcs_variance(torch.cat([y, y], 1), M)
    assert (V >= 0).all()
    assert V.max() <= 1e-12 * float((y.double() @ K * y).sum(-1).max())


def test_variance_matches_the_dense_definition(path, rng):
    N, r, d_out, d_in, S = 3, 2, 11, 9, 20
    Bs = [torch.randn(d_out, r, generator=rng, dtype=F64) for _ in range(N)]
    As = [torch.randn(r, d_in, generator=rng, dtype=F64) for _ in range(N)]
    X = torch.randn(S, d_in, generator=rng, dtype=F64)
    K = torch.cat(Bs, 1).T @ torch.cat(Bs, 1)
    M = torch.block_diag(*(K[i * r : i * r + r, i * r : i * r + r] for i in range(N))) / N - K / N**2
    outputs = torch.stack([X @ (B @ A).T for B, A in zip(Bs, As, strict=True)])
    dense = (outputs - outputs.mean(0)).square().sum(-1).mean(0)
    torch.testing.assert_close(dcs_variance(X @ torch.cat(As).T, M), dense, rtol=1e-12, atol=1e-12)


def test_variance_shows_a_nan_in_its_own_row_only(path, rng):
    Y = torch.randn(33, 5, generator=rng)
    Y[17, 2] = float("nan")
    V = dcs_variance(Y, _form(rng, 5))
    assert V.isnan().nonzero().flatten().tolist() == [17]


@pytest.mark.parametrize("kernel", ["gaussian", "excess"])
@pytest.mark.parametrize("consistent", [False, True])
@pytest.mark.parametrize("min_ess", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("S", [*SIZES[1:], 96, 20_001])
def test_weights_equal_the_oracle(path, rng, S, min_ess, consistent, kernel):
    V = torch.randn(S, generator=rng, dtype=F64).square() * 3
    got = dcs_weights(V, 0.5, min_ess, kernel, consistent)
    w, sigma, tau, ess = _oracle(V, 0.5, min_ess, kernel, consistent)
    np.testing.assert_allclose(got.w.numpy(), w, rtol=1e-8, atol=1e-12)
    assert (got.sigma, got.tau, got.ess) == pytest.approx((sigma, tau, ess), rel=1e-9)
    assert got.ess >= min_ess and got.w.mean().item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(("values", "sigma"), [([1.0, 2.0, 4.0, 8.0], 1.5), ([1.0, 2.0, 4.0], 1.0)])
def test_medians_average_the_two_middle_values(path, values, sigma):
    # 4 values: median 3, distances 2, 1, 1, 5, MAD (1 + 2) / 2. 3 values: median 2, distances 1, 0, 2, MAD 1.
    got = dcs_weights(torch.tensor(values, dtype=F64), 1.0, 0.0)
    assert got.sigma == sigma
    assert (got.w[1] / got.w[0]).item() == pytest.approx(math.exp(-1.0 / sigma**2), rel=1e-14)


@pytest.mark.parametrize("kernel", ["gaussian", "excess"])
@pytest.mark.parametrize("V", [[], [3.0], [0.0, 0.0, 0.0], [2.5] * 97])
def test_equal_variances_give_equal_weights(path, V, kernel):
    got = dcs_weights(torch.tensor(V, dtype=F64), 1.0, 0.25, kernel)
    assert got.w.tolist() == [1.0] * len(V)
    assert (got.sigma, got.tau, got.ess) == (0.0, 1.0, 1.0)


def test_a_mad_of_zero_is_the_limit_of_small_sigma(path):
    V = torch.tensor([1.0, 1.0, 1.0, 1.0, 5.0, 9.0], dtype=F64)
    got = dcs_weights(V, 1.0, 0.25)
    assert got.w.tolist() == [1.5, 1.5, 1.5, 1.5, 0.0, 0.0]
    assert got.sigma == 0.0 and got.tau == 1.0 and got.ess == pytest.approx(4 / 6)
    near = dcs_weights(V + torch.tensor([0, 1e-9, 0, 1e-9, 0, 0], dtype=F64), 6e7, 0.0)
    assert near.w.tolist() == pytest.approx(got.w.tolist(), rel=1e-5)


def test_the_floor_acts_on_a_mad_of_zero(path):
    V = torch.tensor([1.0] * 6 + [0.0, 3.0, 4.0, 5.0], dtype=F64)  # the least value is alone
    got = dcs_weights(V, 1.0, 0.5)
    assert got.sigma == 0.0 and 1e300 < got.tau < math.inf
    assert got.ess == pytest.approx(0.5, rel=1e-9) and got.w.isfinite().all()


def test_all_weights_underflowing_leaves_the_least_variance(path):
    V = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=F64) * 1e-6 + 1.0
    got = dcs_weights(V, 1e-3, 0.0)  # every exp(-V / sigma^2) is 0 in float64
    assert got.w.tolist() == [5.0, 0.0, 0.0, 0.0, 0.0]
    assert got.ess == pytest.approx(0.2)


@pytest.mark.parametrize("factor", [1e-250, 1e-12, 1.0, 1e12, 1e250])
@pytest.mark.parametrize("kernel", ["gaussian", "excess"])
def test_the_floor_holds_at_any_scale(path, rng, factor, kernel):
    V = torch.randn(1001, generator=rng, dtype=F64).square() * factor
    got = dcs_weights(V, 1.0, 0.25, kernel)
    assert got.w.isfinite().all() and got.ess >= 0.25
    assert got.w.mean().item() == pytest.approx(1.0, rel=1e-12)
    if kernel == "excess":
        assert got.tau == 1.0  # free of units


def test_a_floor_of_one_makes_weights_equal(path, rng):
    got = dcs_weights(torch.randn(97, generator=rng, dtype=F64).square(), 0.01, 1.0)
    assert got.ess == pytest.approx(1.0, abs=1e-11) and (got.w - 1).abs().max() < 1e-4


def test_weights_do_not_depend_on_order_or_a_common_offset(path, rng):
    V = torch.randn(997, generator=rng, dtype=F64).square()
    order = torch.randperm(997, generator=rng)
    base = dcs_weights(V, 0.3, 0.4)
    torch.testing.assert_close(dcs_weights(V[order], 0.3, 0.4).w, base.w[order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dcs_weights(V + 8.0, 0.3, 0.4).w, base.w, rtol=1e-9, atol=1e-12)
    assert torch.equal(dcs_weights(V.repeat_interleave(2)[::2], 0.3, 0.4).w, base.w)


def test_the_compiled_exponential_is_exact_to_the_last_places(native):
    # sigma = 1 and the floor off: w_s / w_0 = exp(-(V_s - V_0)), down to where it becomes 0.
    V = torch.cat([torch.tensor([0.0]), torch.linspace(0, 700, 4001)]).double()
    unit = dcs_weights(V, 1.0, 0.0)
    got = dcs_weights(V, 1.0 / unit.sigma, 0.0).w
    np.testing.assert_allclose((got / got[0]).numpy(), np.exp(-V.numpy()), rtol=1e-12)


def test_results_do_not_depend_on_the_thread_count(native, rng, threads):
    Y, M, found = torch.randn(30_011, 13, generator=rng), _form(rng, 13), []
    for count in (1, 2, 3):
        threads(count)
        V = dcs_variance(Y, M)
        found.append((V, dcs_weights(V, 0.01, 0.25).w))
    assert all(torch.equal(V, found[0][0]) and torch.equal(w, found[0][1]) for V, w in found)


@pytest.mark.parametrize(
    ("V", "options", "words"),
    [
        (torch.zeros(3), {}, ["tensor V", "float32", "float64"]),
        (torch.zeros(3, 1, dtype=F64), {}, ["tensor V", "(3, 1)", "(S,)"]),
        (torch.tensor([0.0, float("nan")], dtype=F64), {}, ["V[1]", "nan", "finite"]),
        (torch.tensor([0.0, -1.0], dtype=F64), {}, ["negative", "-1.0"]),
        (torch.zeros(3, dtype=F64), {"scale": 0.0}, ["scale", "0.0", "above 0"]),
        (torch.zeros(3, dtype=F64), {"scale": float("nan")}, ["scale", "nan"]),
        (torch.zeros(3, dtype=F64), {"min_ess": 1.5}, ["min_ess", "1.5", "0 to 1"]),
    ],
)
def test_weights_refuse_what_does_not_fit(path, V, options, words):
    with pytest.raises(LoraforgeError) as caught:
        dcs_weights(V, **({"scale": 1.0, "min_ess": 0.25} | options))
    assert all(word in str(caught.value) for word in words)


def test_weights_refuse_an_unknown_kernel(path):
    with pytest.raises(UsageError, match="did you mean 'gaussian'"):
        dcs_weights(torch.zeros(3, dtype=F64), 1.0, 0.25, "gausian")


def test_variance_refuses_what_does_not_fit(path):
    with pytest.raises(LoraforgeError, match=r"tensor M has the wrong shape(.|\n)*\(3, 3\)(.|\n)*\(4, 4\)"):
        dcs_variance(torch.zeros(2, 4), torch.zeros(3, 3))
    with pytest.raises(LoraforgeError, match=r"tensor Y has the wrong dtype(.|\n)*int64"):
        dcs_variance(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(4, 4))
