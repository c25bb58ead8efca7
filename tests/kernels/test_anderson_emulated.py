"""The text of csrc/cuda/anderson.cu on the thread emulator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.kernels.anderson import anderson_mix_reference
from tests.kernels.conftest import SIZES
from tests.kernels.emulator import emulate


def _rows(rng, m, P, dtype, scale=1.0):
    return (torch.randn(m, P, generator=rng, dtype=torch.float64) * scale).to(dtype)


def _dots_are_exact(H, f, got):
    rows = torch.cat([H[:, : f.shape[0]], f[None]])
    terms = rows.numpy().astype(np.longdouble) * f.numpy().astype(np.longdouble)
    # A thread adds 32 products, threads and blocks are added in trees: the roundings of a few dozen sums.
    noise = 32 * np.finfo(float).eps * np.abs(terms).sum(-1)
    assert (np.abs(got.numpy() - terms.sum(-1)) <= noise).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("P", [0, *SIZES, 8192, 20_001])
@pytest.mark.parametrize("m", [0, 1, 9])
def test_dots(rng, m, P, dtype):
    H, f = _rows(rng, m, P + P % 3, dtype), _rows(rng, 1, P, dtype)[0]  # rows of another length: a ring buffer's
    found = emulate("anderson_dots", "anderson", H=H, f=f)
    _dots_are_exact(H, f, found["out"])
    assert found["ticket"].item() == 0
    assert torch.equal(emulate("anderson_dots", "anderson", H=H, f=f)["out"], found["out"])


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_dots_of_tiny_and_huge_float32(rng, scale):
    f = _rows(rng, 1, 129, torch.float32, scale)[0]
    _dots_are_exact(f[None], f, emulate("anderson_dots", "anderson", H=f[None], f=f)["out"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("P", [0, *SIZES, 1024, 5001])
@pytest.mark.parametrize("m", [0, 1, 5])
def test_mix(rng, m, P, dtype):
    X, F, a = _rows(rng, m, P + 4, dtype), _rows(rng, m, P + 1, dtype), _rows(rng, 1, m, torch.float64)[0]
    got = emulate("anderson_mix", "anderson", X=X, F=F, a=a, beta=0.7, P=P)["out"]
    assert got.shape == (P,) and got.dtype == dtype
    if P == 0:
        return
    X, F, b = X[:, :P], F[:, :P], a * 0.7
    exact = sum(
        (x.numpy().astype(np.longdouble) * w for w, x in zip([*a.tolist(), *b.tolist()], [*X, *F], strict=True)),
        np.zeros(P),
    )
    plain = (a.to(dtype) @ X + b.to(dtype) @ F).numpy()
    # One rounding of the result to its dtype, and one a term in double.
    terms = (a.abs() @ X.double().abs() + b.abs() @ F.double().abs()).numpy()
    floor = 0.5 * torch.finfo(dtype).eps * np.abs(exact) + (2 * m + 2) * np.finfo(float).eps * terms
    error = np.abs(got.numpy() - exact)
    assert (error <= np.maximum(floor, 2 * np.abs(plain - exact))).all()
    want = torch.empty(P, dtype=dtype)
    anderson_mix_reference(X, F, a, 0.7, want)
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=float(floor.max()))


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_sanitizers_find_nothing(rng, kind):
    H, f = _rows(rng, 5, 8195, torch.float32), _rows(rng, 1, 8195, torch.float32)[0]
    _dots_are_exact(H, f, emulate("anderson_dots", "anderson", kind, H=H, f=f)["out"])
    a = torch.ones(3, dtype=torch.float64)
    got = emulate("anderson_mix", "anderson", kind, X=H[:3], F=H[2:], a=a, beta=1.0, P=1030)["out"]
    torch.testing.assert_close(got, (H[:3] + H[2:]).sum(0)[:1030], rtol=1e-5, atol=1e-5)
