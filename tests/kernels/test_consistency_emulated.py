"""The text of csrc/cuda/consistency.cu on the thread emulator."""

from __future__ import annotations

import pytest
import torch

from loraforge.kernels.consistency import (
    RULES,
    consistency_backward_reference,
    consistency_forward_reference,
)
from tests.kernels.emulator import emulate

F64 = torch.float64
DTYPES = [torch.float32, F64, torch.bfloat16, torch.float16]


def _hidden(rng, T, H, dtype):
    return [torch.randn(T, H, generator=rng, dtype=F64).to(dtype) for _ in range(2)]


def _both(P, S, mask, rule, kind="plain", threshold=0.3, unit=None):
    """The kernels' sum and gradient beside the reference's."""
    given = {"P": P, "S": S, "mask": mask, "rule": RULES.index(rule), "threshold": threshold, "unit": unit}
    grad = torch.tensor(0.37, dtype=F64)
    forward = emulate("consistency_forward", "consistency", kind, **given)
    backward = emulate("consistency_backward", "consistency", kind, **given, grad=grad.reshape(1))
    assert forward["ticket"].item() == 0
    want = consistency_forward_reference(P, S, mask, rule, threshold, unit)
    slope = consistency_backward_reference(grad, P, S, mask, rule, threshold, unit)
    return forward["out"][0], want, backward["out"], slope


def _agree(got, want, slope, expected):
    # The same terms in float64 added in another order; the same roundings of the gradient.
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0.0)
    assert torch.equal(slope, expected)


# Widths: an entry, odd (loads of one entry), a multiple of 16 bytes in one piece, several pieces with a short last one.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "H"), [(1, 1), (7, 97), (97, 129), (129, 8), (5, 1040), (3, 2051)])
def test_sum_and_gradient(rng, T, H, dtype):
    P, S = _hidden(rng, T, H, dtype)
    mask = torch.rand(T, generator=rng) > 0.4
    for rule, weights in zip(RULES, (mask, mask.float() * 0.3, mask.double() * 0.7, None), strict=True):
        _agree(*_both(P, S, weights, rule))


@pytest.mark.parametrize("rule", RULES)
def test_masked_tokens_are_never_read(rng, rule):
    P, S = _hidden(rng, 33, 40, torch.bfloat16)
    mask = torch.arange(33) % 4 > 0
    P[~mask], S[~mask] = float("nan"), float("inf")
    got, want, slope, expected = _both(P, S, mask, rule)
    assert got.isfinite() and (slope[~mask] == 0).all()
    _agree(got, want, slope, expected)
    none = _both(P, S, torch.zeros(33), rule)
    assert none[0].item() == 0.0 and (none[2] == 0).all()
    P[1, 3] = float("nan")
    assert _both(P, S, mask, rule)[0].isnan()


def test_a_threshold_times_a_number_on_the_device(rng):
    P, S = _hidden(rng, 7, 33, torch.float32)
    for rule in ("margin", "deadband"):
        _agree(*_both(P, S, None, rule, unit=torch.tensor(1.7, dtype=F64)))


def test_more_rows_than_warps_and_the_same_bits_again(rng):
    P, S = _hidden(rng, 1056 * 8 + 77, 3, torch.float32)
    got, want, slope, expected = _both(P, S, None, "elementwise")
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0.0)
    assert torch.equal(slope, expected)
    again = emulate("consistency_forward", "consistency", P=P, S=S, rule=0, threshold=0.0)
    assert torch.equal(again["out"][0], got)


@pytest.mark.parametrize(("T", "H"), [(0, 5), (4, 0)])
def test_nothing(T, H):
    P = torch.zeros(T, H)
    found = emulate("consistency_forward", "consistency", P=P, S=P, rule=0, threshold=0.0)
    assert found["out"].item() == 0.0
    grad = torch.ones(1, dtype=F64)
    found = emulate("consistency_backward", "consistency", P=P, S=P, rule=0, threshold=0.0, grad=grad)
    assert found["out"].shape == (T, H)


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_sanitizers_find_nothing(rng, kind):
    mask = torch.arange(10) % 3 > 0
    for H, dtype in ((97, torch.bfloat16), (248, F64)):
        P, S = _hidden(rng, 10, H, dtype)
        _agree(*_both(P, S, mask, "deadband", kind))
