"""The best subspace in the metric of the outputs, on both sides of the switch to the Gram matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.linalg import metric
from loraforge.linalg.metric import left_subspace
from tests.oracles import iteris as oracle

BELOW, ABOVE = 40, metric._SVD_ROWS + 30


def case(p: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A state (p, d) and a badly scaled SPD metric (d, d)."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * d, d, generator=g, dtype=torch.float64) * torch.logspace(0, -2, d, dtype=torch.float64)
    return torch.randn(p, d, generator=g, dtype=torch.float64), X.mT @ X + 1e-6 * torch.eye(d, dtype=torch.float64)


@pytest.mark.parametrize("p", [BELOW, ABOVE])
@pytest.mark.parametrize("k", [1, 3, 11])
def test_it_is_the_oracles_optimum(p: int, k: int) -> None:
    state, T2 = case(p, 11)
    U, S = left_subspace(state, torch.linalg.cholesky(T2))
    best = U[:, :k] @ (U[:, :k].mT @ state)
    want = oracle.truncate_output(state.numpy(), T2.numpy(), k)
    np.testing.assert_allclose(best.numpy(), want, rtol=0, atol=1e-8 * abs(want).max())
    # The values say what the cut costs in the metric of the outputs.
    missed = state - best
    cost = float((missed @ T2 * missed).sum().clamp_min(0).sqrt())
    assert cost == pytest.approx(float(S[k:].norm()), rel=1e-7, abs=1e-6 * float(S[0]))


@pytest.mark.parametrize("p", [BELOW, ABOVE])
def test_without_a_metric_it_is_the_frobenius_optimum(p: int) -> None:
    state, _ = case(p, 9)
    U, S = left_subspace(state, None)
    np.testing.assert_allclose(S.numpy(), np.linalg.svd(state.numpy(), compute_uv=False), rtol=1e-10)
    best = U[:, :4] @ (U[:, :4].mT @ state)
    np.testing.assert_allclose(best.numpy(), oracle.truncate_frobenius(state.numpy(), 4), atol=1e-9)


@pytest.mark.parametrize(("p", "d"), [(1, 5), (5, 1), (BELOW, 60), (ABOVE, 12), (ABOVE, ABOVE + 20)])
def test_shapes_and_orthonormality(p: int, d: int) -> None:
    U, S = left_subspace(case(p, d)[0], None)
    q = min(p, d)
    assert U.shape == (p, q) and S.shape == (q,)
    torch.testing.assert_close(U.mT @ U, torch.eye(q, dtype=torch.float64), rtol=0, atol=1e-10)
    assert bool((S[:-1] >= S[1:]).all())


def test_the_switch_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    state, T2 = case(50, 13, seed=2)
    L = torch.linalg.cholesky(T2)
    exact, values = left_subspace(state, L)
    monkeypatch.setattr(metric, "_SVD_ROWS", 10)
    found, seen = left_subspace(state, L)
    torch.testing.assert_close(seen, values, rtol=1e-6, atol=0)
    for k in (1, 4, 9):
        torch.testing.assert_close(found[:, :k] @ found[:, :k].mT, exact[:, :k] @ exact[:, :k].mT, rtol=0, atol=1e-8)


@pytest.mark.parametrize("p", [BELOW, ABOVE])
def test_signs_are_fixed(p: int) -> None:
    """The state turned around gives the same vectors: their largest entry is positive."""
    state, T2 = case(p, 8)
    L = torch.linalg.cholesky(T2)
    U, _ = left_subspace(state, L)
    turned, _ = left_subspace(-state, L)
    torch.testing.assert_close(turned, U, rtol=0, atol=1e-9)
    assert bool((U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("p", [BELOW, ABOVE])
def test_a_state_of_low_rank(p: int) -> None:
    g = torch.Generator().manual_seed(3)
    state = torch.randn(p, 2, generator=g, dtype=torch.float64) @ torch.randn(2, 7, generator=g, dtype=torch.float64)
    U, S = left_subspace(state, torch.linalg.cholesky(case(3, 7)[1]))
    assert float(S[2]) < 1e-7 * float(S[0])
    torch.testing.assert_close(U[:, :2] @ (U[:, :2].mT @ state), state, rtol=0, atol=1e-9)
    zero, values = left_subspace(torch.zeros(p, 7, dtype=torch.float64), None)
    assert bool(torch.isfinite(zero).all()) and float(values.abs().max()) == 0.0
