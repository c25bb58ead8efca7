"""The pretended GPU behaves as a real one: what is refused, what is allowed, what waits; with a GPU, on both."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from loraforge.kernels import backend
from loraforge.kernels.anderson import anderson_dots
from loraforge.linalg.flatten import support
from tests.device.machine import pretend_gpu
from tests.device.pretend import DeviceTensor, Pretend, is_near

Pair = Callable[[Tensor, Tensor], Any]
SAME_DEVICE = "same device"
# (near (4, 3) on the GPU, far (4, 3) on the CPU) -> what must not work, and a part of PyTorch's message.
REFUSED: dict[str, tuple[Pair, str]] = {
    "add": (lambda near, far: near + far, SAME_DEVICE),
    "add to the CPU": (lambda near, far: far.add_(near), SAME_DEVICE),
    "add to a number of the CPU": (lambda near, far: far[0, 0].add_(near[0, 0]), SAME_DEVICE),
    "mm": (lambda near, far: near @ far.T, "device"),
    "linear": (lambda near, far: nn.functional.linear(near, far), "device"),
    "cat": (lambda near, far: torch.cat([near, far]), "device"),
    "stack": (lambda near, far: torch.stack([near, far]), "device"),
    "stack of numbers": (lambda near, far: torch.stack([near[0, 0], far[0, 0]]), "device"),
    "where": (lambda near, far: torch.where(near > 0, near, far), "device"),
    "where by the CPU": (lambda near, far: torch.where(far > 0, near, near), "device"),
    "masked fill": (lambda near, far: near.masked_fill(far > 0, 0.0), "device"),
    "out": (lambda near, far: torch.mul(near, near, out=far), "device"),
    "index of the CPU's": (lambda near, far: far[near[:, 0].long().clamp(0, 1)], "indices should be either on cpu"),
    "mask of the CPU's": (lambda near, far: far[near > 0], "indices should be either on cpu"),
    "index select": (lambda near, far: near.index_select(0, torch.tensor([0, 1])), "device"),
    "gather": (lambda near, far: near.gather(0, torch.zeros(1, 3, dtype=torch.int64)), "device"),
    "embedding": (lambda near, far: nn.functional.embedding(torch.tensor([1]), near), "device"),
    "equal": (lambda near, far: torch.equal(near, far), "device"),
    "values put": (lambda near, far: near.index_put_((torch.tensor([0]),), far[0]), "device"),
    "numpy": (lambda near, far: near.numpy(), "can't convert cuda"),
    "asarray": (lambda near, far: np.asarray(near), "can't convert cuda"),
    "generator": (
        lambda near, far: torch.randn(2, device="cuda", generator=torch.Generator().manual_seed(0)),
        "Expected a 'cuda' device type for generator",
    ),
    "generator in place": (
        lambda near, far: near.normal_(generator=torch.Generator().manual_seed(0)),
        "Expected a 'cuda' device type for generator",
    ),
    "least squares by gelsd": (lambda near, far: torch.linalg.lstsq(near, near, driver="gelsd"), "gels"),
    "product of integers": (lambda near, far: near.long() @ near.long().T, "not implemented"),
    "second GPU": (lambda near, far: far.to("cuda:63"), "invalid device ordinal"),
}  # fmt: skip
ALLOWED: dict[str, tuple[Pair, bool]] = {
    "number of the CPU": (lambda near, far: near + far[0, 0], True),
    "number of the GPU and a matrix of the CPU": (lambda near, far: near.sum() * far[0, 0], True),
    "fill": (lambda near, far: near.clone().fill_(far[0, 0]), True),
    "where with a number": (lambda near, far: torch.where(near > 0, near, far[0, 0]), True),
    "masked fill with a number": (lambda near, far: near.masked_fill(near > 0, far[0, 0]), True),
    "index by the CPU": (lambda near, far: near[torch.tensor([0, 2])], True),
    "index by a list": (lambda near, far: near[[0, 2]], True),
    "mask of the CPU": (lambda near, far: near[far > 0], True),
    "one value put": (lambda near, far: near.clone().index_put_((torch.tensor([0]),), far[0, 0]), True),
    "copy here": (lambda near, far: near.clone().copy_(far), True),
    "copy there": (lambda near, far: far.clone().copy_(near), False),
    "zeros like": (lambda near, far: torch.zeros_like(near), True),
    "zeros like on the CPU": (lambda near, far: torch.zeros_like(near, device="cpu"), False),
    "new tensor": (lambda near, far: near.new_tensor([1.0]), True),
    "as another": (lambda near, far: far.to(near), True),
    "as another back": (lambda near, far: near.to(far), False),
    "cpu": (lambda near, far: near.cpu(), False),
    "squeeze in place": (lambda near, far: near[:1].clone().squeeze_(0), True),
    "vector by matrix": (lambda near, far: near[:, 0] @ near, True),
    "einsum": (lambda near, far: torch.einsum("ij,kj->ik", near, near), True),
    "qr": (lambda near, far: torch.linalg.qr(near).R.abs(), True),
    "sort": (lambda near, far: near.sort(dim=0).values, True),
}  # fmt: skip


def pair() -> tuple[Tensor, Tensor]:
    far = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    return far.to("cuda"), far


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_cuda_refuses(name: str, gpu: Pretend | None) -> None:
    call, message = REFUSED[name]
    with pytest.raises((RuntimeError, TypeError), match=f"(?i){message}"):
        call(*pair())


@pytest.mark.parametrize("name", ALLOWED)
def test_allows_what_cuda_allows_with_the_cpu_s_numbers(name: str, gpu: Pretend | None) -> None:
    call, there = ALLOWED[name]
    near, far = pair()
    found = call(near, far)
    assert (found.device.type == "cuda") == there
    torch.testing.assert_close(found.cpu(), call(far, far))


def test_views_share_memory_and_results_in_place_are_the_tensor_itself(gpu: Pretend | None) -> None:
    near, far = pair()
    row = near[1:3].T
    assert row.mul_(2.0) is row
    near.diagonal().zero_()
    far[1:3] *= 2.0
    far.diagonal().zero_()
    assert torch.equal(near.cpu(), far) and torch.equal(row.cpu(), far[1:3].T)
    out = torch.empty(4, 3, device="cuda")
    assert torch.add(near, near, out=out) is out and torch.equal(out.cpu(), far + far)
    near.view(-1)[:2] = 7.0
    assert near.cpu()[0].tolist()[:2] == [7.0, 7.0]
    assert near.data_ptr() == near.view(12).data_ptr() != near.clone().data_ptr()


def test_a_copy_to_the_gpu_is_a_copy(gpu: Pretend | None) -> None:
    near, far = pair()
    far.zero_()
    assert float(near.abs().sum()) > 0.0
    held = near.cpu()
    near.zero_()
    assert float(held.abs().sum()) > 0.0


def test_a_model_moves_with_its_ties(gpu: Pretend | None) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    want = model(torch.tensor([1, 2])).detach()
    model.to(device="cuda", dtype=torch.float64).requires_grad_(False)
    assert model[1].weight is model[0].weight and model[0].weight.device.type == "cuda"
    found = model(torch.tensor([1, 2], device="cuda"))
    torch.testing.assert_close(found.cpu(), want.double())


def test_threads_have_the_device_too(gpu: Pretend | None) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda k: torch.full((3,), float(k), device="cuda"), range(4)))
    assert [t.cpu().tolist() for t in found] == [[float(k)] * 3 for k in range(4)]


@pytest.mark.parametrize(
    "ask",
    [
        lambda t: float(t[0, 0]),
        lambda t: bool(t.any()),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: torch.linalg.svd(t),
        lambda t: torch.empty(4, 3).copy_(t),
        lambda t: torch.cuda.synchronize(),
    ],
    ids=["float", "bool", "tolist", "cpu", "nonzero", "mask", "svd", "copy_", "synchronize"],
)
def test_counts_waits(ask: Callable[[Tensor], Any], pretended: Pretend) -> None:
    near, _ = pair()
    (near @ near.T).sum(dim=0, keepdim=True).mul_(2.0)
    assert sum(pretended.waits.values()) == 0
    ask(near)
    assert sum(pretended.waits.values()) == 1


def test_names_the_line_that_waited(pretended: Pretend) -> None:
    assert support(torch.tensor([2.0, 1.0], device="cuda")) == 2
    [((what, site), count)] = pretended.waits.items()
    assert (what, count) == ("tolist", 1) and site.startswith("linalg/flatten.py:") and site.endswith(" support")


def test_notes_operators_on_the_cpu(pretended: Pretend) -> None:
    near, far = pair()
    near @ near.T
    assert pretended.host_ops == {}
    far.T @ far
    assert pretended.host_ops == {("mm", "outside"): 12}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: nothing is pretended")
def test_memory_is_accounted_for_and_runs_out() -> None:
    with pretend_gpu(capacity=10_000) as gpu:
        kept = torch.zeros(1000, device="cuda")
        view = kept[10:]
        assert (gpu.live, gpu.allocations) == (4000, 1)
        other = kept + 1.0
        assert gpu.live == gpu.peak == 8000 == torch.cuda.max_memory_allocated()
        assert torch.cuda.mem_get_info() == (2000, 10_000)
        with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory. Tried to allocate 0.00 MiB"):
            kept + other
        del other, kept
        gc.collect()
        assert gpu.live == 4000, "the view holds the memory"
        del view
        gc.collect()
        assert (gpu.live, gpu.peak) == (0, 8000)
    with pretend_gpu(fail_at=2):
        first = torch.zeros(1, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            first + 1.0
        assert float(first + 2.0) == 2.0


def test_compiled_operators_are_asked_for_on_the_device(pretended: Pretend) -> None:
    if not backend.native_available():
        pytest.skip("loraforge._C was not built")
    H, f = torch.randn(3, 20), torch.randn(20)
    before = backend.kernel_report()["calls"].get("anderson_dots", {}).get("cuda", 0)
    found = anderson_dots(H.to("cuda"), f.to("cuda"))
    assert is_near(found) and pretended.native == {"anderson_dots": 1}
    assert backend.kernel_report()["calls"]["anderson_dots"]["cuda"] == before + 1
    assert torch.equal(found.cpu(), anderson_dots(H, f))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: nothing is pretended")
def test_puts_everything_back() -> None:
    before = torch.cuda.is_available(), torch.cuda.device_count()
    with pytest.raises(ZeroDivisionError), pretend_gpu():
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        kept = torch.ones(2, device="cuda")
        assert isinstance(kept, DeviceTensor)
        raise ZeroDivisionError
    assert (torch.cuda.is_available(), torch.cuda.device_count()) == before
    if not before[0]:
        for call in (lambda: torch.ones(2, device="cuda"), lambda: torch.ones(2).to("cuda")):
            with pytest.raises((AssertionError, RuntimeError), match="not compiled with CUDA|No CUDA GPUs"):
                call()
