from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.kernels import anderson_dots, anderson_mix
from tests.kernels.conftest import SIZES


def _history(rng, m, P, dtype):
    return torch.randn(m, P, generator=rng, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("P", [0, *SIZES, 8191, 8193, 70_001])
@pytest.mark.parametrize("m", [0, 1, 5])
def test_dots_are_no_worse_than_twice_torch(path, rng, m, P, dtype):
    H, f = _history(rng, m, P, dtype), _history(rng, 1, P, dtype)[0]
    got = anderson_dots(H, f)
    rows = torch.cat([H, f[None]])
    terms = rows.numpy().astype(np.longdouble) * f.numpy().astype(np.longdouble)
    exact, plain = terms.sum(-1), (rows @ f).numpy()
    assert got.dtype == torch.float64 and got.shape == (m + 1,)
    # A lane adds 256 products of a block before blocks are added: 32 roundings of the sum of absolute terms are ample
    # for random signs, and a float32 sum of 97 terms or more is far beyond them.
    noise = 32 * np.finfo(float).eps * np.abs(terms).sum(-1)
    assert (
        np.abs(got.numpy() - exact) <= np.maximum(noise, 2 * np.abs(plain - exact) * (dtype == torch.float64))
    ).all()


def test_dots_keep_what_float32_sums_lose(path):
    # 2^24 + 1 + 1 ... : float32 accumulation stops growing at 2^24.
    f = torch.ones(1001)
    H = torch.ones(1, 1001)
    H[0, 0] = 2.0**24
    assert anderson_dots(H, f).tolist() == [2.0**24 + 1000, 1001.0]


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_dots_of_tiny_and_huge_float32_neither_vanish_nor_overflow(path, scale):
    f = torch.full((97,), scale)
    assert anderson_dots(f[None], f)[0].item() == pytest.approx(97 * scale**2, rel=1e-6)


def test_dots_take_rows_that_lie_apart(path, rng):
    ring, wide = _history(rng, 6, 300, torch.float32), _history(rng, 129, 3, torch.float32)
    for H, f in ((ring[::2, 20:149], ring[1, 20:149]), (wide.T, wide[:, 1])):
        # BLAS may add in another order for another stride: a few roundings of 129 products.
        torch.testing.assert_close(
            anderson_dots(H, f), anderson_dots(H.contiguous(), f.contiguous()), rtol=1e-13, atol=1e-13
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("P", [0, *SIZES, 8191, 70_001])
@pytest.mark.parametrize("m", [0, 1, 5])
def test_mix_is_no_worse_than_twice_torch(path, rng, m, P, dtype):
    X, F = _history(rng, m, P, dtype), _history(rng, m, P, dtype)
    a = torch.randn(m, generator=rng, dtype=torch.float64)
    out = torch.full((P,), float("nan"), dtype=dtype)
    assert anderson_mix(X, F, a, 0.7, out) is None
    exact = a @ X.double() + 0.7 * (a @ F.double())
    plain = (a.to(dtype) @ X + 0.7 * (a.to(dtype) @ F)).double()
    assert out.isfinite().all()
    # float64 against itself: a rounding of each of 2 m terms; float32 must not exceed twice the plain formula's error.
    floor = 4 * torch.finfo(dtype).eps * (a.abs() @ X.abs().double() + a.abs() @ F.abs().double())
    worst = (out.double() - exact).abs()
    assert (worst <= floor).all()
    if P:
        assert worst.max() <= 2 * (plain - exact).abs().max() + torch.finfo(torch.float64).eps * 40


def test_mix_writes_through_a_strided_result_and_over_its_own_history(path, rng):
    X, F = _history(rng, 3, 129, torch.float32), _history(rng, 3, 129, torch.float32)
    a = torch.tensor([0.5, -1.0, 1.5], dtype=torch.float64)
    want = torch.empty(129)
    anderson_mix(X, F, a, 1.0, want)
    apart = torch.zeros(129, 2)
    anderson_mix(X, F, a, 1.0, apart[:, 0])
    assert torch.equal(apart[:, 0], want) and not apart[:, 1].any()
    anderson_mix(X, F, a, 1.0, X[1])
    assert torch.equal(X[1], want)


def test_mix_of_one_iterate_with_weight_one_is_the_damped_step(path):
    X, F, out = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 0.0, -2.0]]), torch.empty(3)
    anderson_mix(X, F, torch.ones(1, dtype=torch.float64), 0.5, out)
    assert out.tolist() == [3.0, 2.0, 2.0]


def test_results_do_not_depend_on_the_thread_count(native, rng, threads):
    H, f = _history(rng, 5, 200_003, torch.float32), _history(rng, 1, 200_003, torch.float32)[0]
    a = torch.randn(5, generator=rng, dtype=torch.float64)
    found = []
    for count in (1, 2, 3):
        threads(count)
        out = torch.empty_like(f)
        anderson_mix(H, H, a, 0.3, out)
        found.append((anderson_dots(H, f), out))
    assert all(torch.equal(x, found[0][0]) and torch.equal(y, found[0][1]) for x, y in found)


def test_gradients_do_not_flow_on_either_path(path, rng):
    f = _history(rng, 1, 7, torch.float32)[0].requires_grad_()
    assert not anderson_dots(f[None], f).requires_grad


@pytest.mark.parametrize(
    ("H", "f", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(4), ["anderson_dots", "tensor f", "(4,)", "(3,)"]),
        (torch.zeros(3), torch.zeros(3), ["tensor H", "(3,)", "(m, P)"]),
        (torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(3), ["tensor H", "bfloat16", "float32 or float64"]),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.float64), ["tensor f", "float64", "float32"]),
    ],
)
def test_dots_refuse_what_does_not_fit(path, H, f, words):
    with pytest.raises(LoraforgeError) as caught:
        anderson_dots(H, f)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("name", ["X", "F", "a", "out"])
def test_mix_names_the_tensor_that_does_not_fit(path, name):
    good = {
        "X": torch.zeros(2, 3),
        "F": torch.zeros(2, 3),
        "a": torch.zeros(2, dtype=torch.float64),
        "out": torch.zeros(3),
    }
    bad = good | {name: torch.zeros(5, 5, 5)}
    with pytest.raises(LoraforgeError, match=f"tensor {name} has the wrong shape"):
        anderson_mix(bad["X"], bad["F"], bad["a"], 1.0, bad["out"])
    bad = good | {name: good[name].to(torch.int32)}
    with pytest.raises(LoraforgeError, match=r"tensor \w+ has the wrong dtype"):
        anderson_mix(bad["X"], bad["F"], bad["a"], 1.0, bad["out"])
