"""consistency_forward and consistency_backward on a GPU, against the CPU form."""

from __future__ import annotations

import pytest
import torch

from loraforge.kernels import consistency_backward, consistency_forward, consistency_loss, consistency_sum
from loraforge.kernels.consistency import RULES

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("native")]
F64 = torch.float64
DTYPES = [torch.float32, F64, torch.bfloat16, torch.float16]


def _hidden(rng, *shape, dtype=torch.float32):
    return [torch.randn(*shape, generator=rng).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 97), (129, 1032), (515, 4096)])
def test_it_agrees_with_the_cpu(rng, shape, dtype, rule):
    P, S = _hidden(rng, *shape, dtype=dtype)
    mask, grad = torch.rand(shape[0], generator=rng), torch.tensor(0.3, dtype=F64)
    mask[::3] = 0.0
    P[mask == 0] = float("nan")
    on = [t.cuda() for t in (P, S, mask)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got, again = (consistency_forward(*on, rule, 0.3001) for _ in range(2))
        slope = consistency_backward(grad.cuda(), *on, rule, 0.3001)
    torch.cuda.synchronize()
    assert torch.equal(got, again)
    # The same terms in float64, added in another order.
    torch.testing.assert_close(got.cpu(), consistency_forward(P, S, mask, rule, 0.3001), rtol=1e-13, atol=0.0)
    assert torch.equal(slope.cpu(), consistency_backward(grad, P, S, mask, rule, 0.3001))


def test_unaligned_and_non_contiguous_states(rng):
    P, S = (t.cuda() for t in _hidden(rng, 33, 130, dtype=torch.bfloat16))
    for view in (lambda t: t[:, 1:129], lambda t: t.mT, lambda t: t.reshape(-1)[2:4098].reshape(32, 128)):
        p, s = view(P), view(S)
        got = consistency_sum(p, s, None, "none")
        torch.testing.assert_close(got.cpu(), consistency_sum(p.cpu(), s.cpu(), None, "none"), rtol=1e-13, atol=0.0)


def test_gradcheck(rng):
    P, S = (t.cuda() for t in _hidden(rng, 5, 7, dtype=F64))
    assert torch.autograd.gradcheck(lambda p: consistency_sum(p, S, None, "none"), P.requires_grad_())


def test_a_step_waits_for_nothing_and_holds_no_temporary(rng):
    P, S = (t.cuda() for t in _hidden(rng, 64, 1024))
    P.requires_grad_()
    mask = torch.ones(64, device="cuda")

    def step():
        P.grad = None
        consistency_loss([P], [S], mask, "margin", 0.1).backward()

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # The old gradient goes before the new one comes; scalars and partial sums are a few KiB.
    assert torch.cuda.max_memory_allocated() - before <= 64 * 1024
    assert P.grad.abs().max() > 0


def test_other_devices_are_refused_by_name(rng):
    P, S = _hidden(rng, 3, 5)
    with pytest.raises(RuntimeError, match="S has another device"):
        torch.ops.loraforge.consistency_forward(P.cuda(), S, None, 0, 0.0, None)
