"""Anderson operators on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from loraforge.kernels import anderson_dots, anderson_mix, backend
from loraforge.kernels.anderson import anderson_dots_reference
from tests.kernels.conftest import SIZES

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _native(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "native")


def _history(m, P, dtype):
    torch.manual_seed(m + P)
    return torch.randn(m, P, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("P", [0, *SIZES, 8192, 70_001])
@pytest.mark.parametrize("m", [0, 1, 5, 9])
def test_dots_and_mix_equal_the_cpu(m, P, dtype):
    H, F, a = _history(m, P, dtype), _history(m, P, dtype), torch.randn(m, dtype=torch.float64)
    f, out, here = _history(1, P, dtype)[0], torch.empty(P, dtype=dtype), torch.empty(P, dtype=dtype, device="cuda")
    dots = anderson_dots(H.cuda(), f.cuda())
    size = anderson_dots_reference(H.abs(), f.abs())  # sums of the absolute terms bound what rounding can do
    assert ((dots.cpu() - anderson_dots(H, f)).abs() <= 64 * torch.finfo(torch.float64).eps * size).all()
    assert torch.equal(dots, anderson_dots(H.cuda(), f.cuda()))
    anderson_mix(H, F, a, 0.7, out)
    anderson_mix(H.cuda(), F.cuda(), a.cuda(), 0.7, here)
    torch.testing.assert_close(here.cpu(), out, rtol=2 * torch.finfo(dtype).eps, atol=1e-14)


def test_small_rows_that_lie_apart_and_another_stream():
    ring = _history(6, 300, torch.float32).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = ring * 2.0
        got = anderson_dots(late[::2, 21:150], late[1, 21:150])
        out = late[:, 0].clone()
        anderson_mix(late[:3].T[:6].T, late[3:].T[:6].T, torch.ones(3, dtype=torch.float64, device="cuda"), 1.0, out)
    stream.synchronize()
    torch.testing.assert_close(got.cpu(), anderson_dots((2 * ring)[::2, 21:150].cpu(), (2 * ring)[1, 21:150].cpu()))
    torch.testing.assert_close(out, 2.0 * ring[:, :6].sum(0))


def test_operands_on_two_devices_are_refused():
    with pytest.raises(RuntimeError, match="anderson_dots: f has another device, expected the GPU of H"):
        torch.ops.loraforge.anderson_dots(torch.zeros(2, 3, device="cuda"), torch.zeros(3))


def test_opcheck():
    H = _history(3, 97, torch.float32).cuda()
    assert set(torch.library.opcheck(torch.ops.loraforge.anderson_dots.default, (H, H[0])).values()) == {"SUCCESS"}
