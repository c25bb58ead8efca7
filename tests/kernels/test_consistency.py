from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from loraforge.errors import LoraforgeError, UsageError
from loraforge.kernels import consistency_backward, consistency_forward, consistency_loss, consistency_sum
from loraforge.kernels.consistency import (
    RULES,
    consistency_backward_reference,
    consistency_forward_reference,
)
from tests.kernels.conftest import SIZES

F64 = torch.float64
DTYPES = [torch.float32, F64, torch.bfloat16, torch.float16]


def _oracle(P, S, mask, rule, threshold, longest=np.longdouble):
    """Section 1.5 in numpy: R is P where it is kept and S elsewhere, D = (P - R)^2. The sum and its gradient for P."""
    p, s = (t.detach().double().numpy().astype(longest) for t in (P, S))
    m = np.ones(p.shape[:-1]) if mask is None else mask.double().numpy()
    keep = {
        "elementwise": p > s,
        "margin": p - s > threshold,
        "deadband": s - p <= threshold,
        "none": np.zeros(p.shape, dtype=bool),
    }[rule]
    R = np.where(keep, p, s)
    counted = m != 0
    D = ((p - R) ** 2)[counted].sum(-1)
    slope = np.zeros_like(p)
    slope[counted] = 2 * m[counted][:, None] * (p - R)[counted]
    return float((m[counted] * D).sum()), slope.astype(np.float64)


def _plain(P, S, mask, rule, threshold):
    """What one would write in PyTorch, in the inputs' own dtype."""
    P = P.detach().clone().requires_grad_()
    keep = {
        "elementwise": lambda: P > S,
        "margin": lambda: P - S > threshold,
        "deadband": lambda: S - P <= threshold,
        "none": lambda: torch.zeros_like(P, dtype=torch.bool),
    }[rule]()
    D = (P - torch.where(keep, P.detach(), S)).square()
    total = (D if mask is None else D * mask.to(D.dtype)[..., None]).sum()
    total.backward()
    return total.item(), P.grad


def _hidden(rng, *shape, dtype=torch.float32, scale=1.0):
    return [(torch.randn(*shape, generator=rng, dtype=F64) * scale).to(dtype) for _ in range(2)]


def _weights(rng, kind, *shape):
    drawn = torch.rand(*shape, generator=rng, dtype=F64)
    return {"none": None, "bool": drawn > 0.4, "float": drawn * (drawn > 0.4)}[kind]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", SIZES)
def test_sum_and_gradient_equal_the_oracle(path, rng, H, dtype, kind, rule):
    P, S = _hidden(rng, 3, 7, H, dtype=dtype)
    mask = _weights(rng, kind, 3, 7)
    # A threshold that no difference of 16-bit numbers meets: rounding cannot change what is kept.
    total, slope = _oracle(P, S, mask, rule, 0.3001)
    plain, plain_slope = _plain(P, S, mask, rule, 0.3001)
    P.requires_grad_()
    got = consistency_sum(P, S, mask, rule, 0.3001)
    (0.5 * got).backward()
    assert got.dtype == F64 and got.shape == () and P.grad.dtype == dtype
    # One rounding a difference to the dtype that it is taken in; sums are in float64.
    floor = 2 * (torch.finfo(F64 if dtype == F64 else torch.float32).eps) * abs(total)
    assert abs(got.item() - total) <= max(floor, 2 * abs(plain - total))
    error = (P.grad.double() - torch.from_numpy(0.5 * slope)).abs()
    assert error.max() <= 2 * (0.5 * plain_slope.double() - torch.from_numpy(0.5 * slope)).abs().max() + floor


@pytest.mark.parametrize("rule", RULES)
def test_a_hand_sized_example(path, rule):
    # d = -2, -0.5, 0, 0.5, 2 and a token that does not count.
    S = torch.zeros(2, 5)
    P = torch.tensor([[-2.0, -0.5, 0.0, 0.5, 2.0], [9.0] * 5], requires_grad=True)
    got = consistency_sum(P, S, torch.tensor([1, 0]), rule, 1.0)
    got.backward()
    want = {
        "elementwise": (4.25, [-4.0, -1.0, 0.0, 0.0, 0.0]),
        "margin": (4.5, [-4.0, -1.0, 0.0, 1.0, 0.0]),
        "deadband": (4.0, [-4.0, 0.0, 0.0, 0.0, 0.0]),
        "none": (8.5, [-4.0, -1.0, 0.0, 1.0, 4.0]),
    }[rule]
    assert got.item() == want[0] and P.grad.tolist() == [want[1], [0.0] * 5]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_difference_at_the_threshold(path, dtype):
    # P - S = 0.5 is not above a margin of 0.5 and costs; S - P = 0.5 is within a deadband of 0.5 and is kept.
    high, low = torch.full((1, 3), 1.0, dtype=dtype), torch.full((1, 3), 0.5, dtype=dtype)
    assert consistency_sum(high, low, None, "margin", 0.5).item() == 0.75
    assert consistency_sum(low, high, None, "deadband", 0.5).item() == 0.0
    assert consistency_sum(low, high, None, "deadband", 0.5 - 2**-20).item() == 0.75
    assert consistency_sum(high, high, None, "deadband", 0.0).item() == 0.0


@pytest.mark.parametrize("rule", RULES)
def test_gradcheck(path, rng, rule):
    P, S = _hidden(rng, 5, 7, dtype=F64)
    for edge in (0.0, 0.3, -0.3):  # finite differences see the kinks
        P = torch.where(((P - S) - edge).abs() < 1e-3, P + 0.01, P)
    mask = _weights(rng, "float", 5)
    assert torch.autograd.gradcheck(lambda p: consistency_sum(p, S, mask, rule, 0.3), P.requires_grad_())


def test_the_gradient_reaches_the_plastic_side_only(path, rng):
    P, S = (t.requires_grad_() for t in _hidden(rng, 7, 5))
    mask = torch.ones(7, requires_grad=True)
    consistency_sum(P, S, mask, "none").backward()
    torch.testing.assert_close(P.grad, 2 * (P - S).detach())
    assert S.grad is None and mask.grad is None


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_in_masked_tokens_does_not_matter(path, rng, rule, poison, dtype):
    P, S = _hidden(rng, 9, 33, dtype=dtype)
    mask = torch.arange(9) % 3 > 0
    clean = P.clone().requires_grad_()
    expected = consistency_sum(clean, S, mask, rule, 0.1)
    expected.backward()
    P[~mask], S[~mask] = poison, -poison
    P.requires_grad_()
    for weights in (mask, mask.float()):
        P.grad = None
        got = consistency_sum(P, S, weights, rule, 0.1)
        got.backward()
        assert torch.equal(got, expected) and torch.equal(P.grad, clean.grad)
        assert (P.grad[~mask] == 0).all()


@pytest.mark.parametrize("shape", [(4, 5), (0, 5), (4, 0), (0, 0), (2, 0, 3)])
def test_no_token_counts(path, shape):
    P, S = torch.full(shape, float("nan"), requires_grad=True), torch.zeros(shape)
    got = consistency_sum(P, S, torch.zeros(shape[:-1]))
    got.backward()
    assert got.item() == 0.0 and P.grad.shape == shape and (P.grad == 0).all()
    assert consistency_loss([P], [S], torch.zeros(shape[:-1], dtype=torch.bool)).item() == 0.0


@pytest.mark.parametrize("rule", RULES)
def test_a_nan_that_counts_is_seen(path, rule):
    for side in (0, 1):
        pair = [torch.ones(3, 5), torch.zeros(3, 5)]
        pair[side][1, 2] = float("nan")
        assert consistency_sum(*pair, None, rule, 0.1).isnan()


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e30), (torch.float32, 1e-30), (torch.bfloat16, 1e36),
                                              (torch.bfloat16, 1e-36), (torch.float16, 6e4), (torch.float16, 1e-6),
                                              (F64, 1e150), (F64, 1e-150)])  # fmt: skip
def test_extremes(path, rng, dtype, scale):
    P, S = (t.clamp(-scale, scale).to(dtype) for t in _hidden(rng, 7, 97, dtype=F64, scale=scale / 2))
    total, slope = _oracle(P, S, None, "elementwise", 0.0)
    P.requires_grad_()
    got = consistency_sum(P, S)
    got.backward(torch.tensor(1e-3, dtype=F64))
    assert got.item() == pytest.approx(total, rel=1e-6)
    want = torch.from_numpy(1e-3 * slope)
    spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((P.grad.double() - want).abs() <= 2 * torch.finfo(dtype).eps * want.abs() + spacing).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compiled_form_rounds_as_pytorch_does(native, rng, dtype):
    # grad = 1/2 and S = 0 give P back: every 16-bit number goes in and out. Then roundings into all of the range.
    P = (
        torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        if dtype.itemsize == 2
        else _hidden(rng, 99)[0].to(dtype)
    )
    P = P.reshape(-1, 1 if dtype.itemsize == 4 else 11 if dtype == F64 else 64)
    zero, half = torch.zeros_like(P), torch.tensor(0.5, dtype=F64)
    got = consistency_backward(half, P, zero, None, "none", 0.0)
    assert torch.equal(got.isnan(), P.isnan()) and torch.equal(got[~P.isnan()], P[~P.isnan()])
    P = torch.where(P.isfinite(), P, 1.0)
    for factor in (0.37, 1e-3, 3e-5, 1.7, 3e4):
        grad = torch.tensor(factor, dtype=F64)
        want = consistency_backward_reference(grad, P, zero, None, "none", 0.0)
        assert torch.equal(consistency_backward(grad, P, zero, None, "none", 0.0), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_forms_agree(native, rng, rule, dtype):
    P, S = _hidden(rng, 301, 257, dtype=dtype)
    mask, grad = _weights(rng, "float", 301).float(), torch.tensor(0.01, dtype=F64)
    unit = torch.tensor(0.7, dtype=F64)
    given = (P, S, mask, rule, 0.3, unit)
    torch.testing.assert_close(
        consistency_forward(*given), consistency_forward_reference(*given), rtol=1e-14, atol=0.0
    )  # the same numbers added in another order
    assert torch.equal(consistency_backward(grad, *given), consistency_backward_reference(grad, *given))


def test_non_contiguous_states(path, rng):
    P, S = _hidden(rng, 7, 6, 10)
    views = [lambda t: t[:, 1:, ::2], lambda t: t.transpose(0, 1), lambda t: t[..., :1].expand(7, 6, 5)]
    for view in views:
        found = []
        for p, s in ((view(P), view(S)), (view(P).contiguous(), view(S).contiguous())):
            p = p.detach().requires_grad_()
            total = consistency_sum(p, s, view(P)[..., 0] > 0)
            total.backward()
            found.append((total, p.grad))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_states_of_two_dtypes_meet_in_the_wider(path, rng):
    P, S = _hidden(rng, 7, 5)
    half = P.bfloat16().requires_grad_()
    total = consistency_sum(half, S)
    total.backward()
    assert torch.equal(total, consistency_sum(P.bfloat16().float(), S)) and half.grad.dtype == torch.bfloat16


def test_results_do_not_depend_on_the_thread_count(native, rng, threads):
    (P, S), found = _hidden(rng, 515, 301), []
    mask = _weights(rng, "float", 515)
    for count in (1, 2, 3):
        threads(count)
        p = P.clone().requires_grad_()
        total = consistency_sum(p, S, mask)
        total.backward()
        found.append((total.detach(), p.grad))
    assert all(torch.equal(a, found[0][0]) and torch.equal(b, found[0][1]) for a, b in found)


def test_a_second_derivative_is_refused(path, rng):
    P, S = _hidden(rng, 3, 5)
    (slope,) = torch.autograd.grad(consistency_sum(P.requires_grad_(), S), P, create_graph=True)
    with pytest.raises(LoraforgeError, match="consistency_sum has no second derivative(.|\n)*create_graph"):
        slope.sum().backward()


def _trained(rng_seed, wrap):
    """Gradient of a small network with the loss on top, called through `wrap`."""
    torch.manual_seed(rng_seed)
    x, layer, S = torch.randn(7, 5), torch.nn.Linear(5, 5), torch.randn(7, 5)
    mask = torch.arange(7) > 2
    loss = wrap(lambda x: consistency_sum(layer(x).tanh(), S.to(layer(x).dtype), mask, "margin", 0.1) * 0.5)(x)
    loss.backward()
    return loss.detach(), layer.weight.grad


# A warning about how the tracer itself handles autograd functions.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_checkpointing_autocast_and_compiling_change_nothing(path):
    plain = _trained(0, lambda f: f)
    for wrap in (
        lambda f: lambda x: checkpoint(f, x, use_reentrant=False),
        lambda f: torch.compile(f, backend="aot_eager", fullgraph=True),
    ):
        got = _trained(0, wrap)
        assert torch.equal(got[0], plain[0]) and torch.equal(got[1], plain[1])
    P, S = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = consistency_sum(P, S)
    assert torch.equal(inside, consistency_sum(P, S)) and inside.dtype == F64


def test_the_backward_pass_is_left_the_states_and_nothing_else(path, rng):
    P, S = _hidden(rng, 7, 5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        consistency_sum(P.requires_grad_(), S)
    assert {t.data_ptr() for t in kept} == {P.data_ptr(), S.data_ptr()}


def _peak(run):
    """Largest number of bytes that tensors held at once beyond those from before `run`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_a_third_of_the_eager_form_at_most(native, rng, dtype):
    P, S = _hidden(rng, 64, 1024, dtype=dtype)
    mask = _weights(rng, "bool", 64)

    def eager():
        p, s = P.detach().requires_grad_(), S
        wide, stable = p.float(), s.float()
        D = (wide - torch.where(wide > stable, wide.detach(), stable)).square() * mask[:, None]
        D.sum().backward()

    fused = _peak(lambda: consistency_sum(P.detach().requires_grad_(), S, mask).backward())
    gradient = P.numel() * dtype.itemsize
    assert gradient <= fused <= gradient + 4096
    assert 3 * fused <= _peak(eager)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"S": torch.zeros(3, 4)}, ["tensor S", "(3, 4)", "(3, 5)"]),
        ({"mask": torch.ones(5)}, ["tensor mask", "(5,)", "(3,)"]),
        ({"P": torch.zeros(3, 5, dtype=torch.int64), "S": torch.zeros(3, 5, dtype=torch.int64)}, ["P", "int64"]),
        ({"mask": torch.ones(3, device="meta")}, ["tensor mask", "another device", "meta", "cpu, as P"]),
        ({"unit": torch.ones(1)}, ["tensor unit", "(1,)", "()"]),
        ({"threshold": -0.1}, ["threshold", "-0.1", "at least 0"]),
        ({"threshold": float("nan")}, ["threshold", "nan"]),
    ],
)
def test_what_does_not_fit_is_refused(path, change, words):
    with pytest.raises(LoraforgeError) as caught:
        consistency_sum(**({"P": torch.zeros(3, 5), "S": torch.zeros(3, 5)} | change))
    assert all(word in str(caught.value) for word in words)


def test_an_unknown_rule_is_refused(path):
    with pytest.raises(UsageError, match="did you mean 'margin'"):
        consistency_sum(torch.zeros(3, 5), torch.zeros(3, 5), None, "margn")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(3), None, 0, 0.0, None), r"P has shape \(3,\), expected shape \(T, H\)"),
        ((torch.zeros(3, 2), torch.zeros(3, 2).half(), None, 0, 0.0, None), "S has dtype Half, expected dtype Float"),
        ((torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(2), 0, 0.0, None), "expected size 3 along axis 0"),
        ((torch.zeros(3, 2), torch.zeros(3, 2), None, 4, 0.0, None), "rule has value 4, expected 0 to 3"),
    ],
)
def test_the_compiled_form_checks_for_itself(native, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.loraforge.consistency_forward(*arguments)
