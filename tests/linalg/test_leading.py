"""Leading singular vectors by Krylov steps against the full decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraforge.linalg import leading
from loraforge.linalg.leading import leading_subspace


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(kind: str, p: int, d: int) -> Tensor:
    low, noise = draw(0, p, 12) @ draw(1, 12, d), draw(2, p, d)
    fading = torch.arange(1, d + 1, dtype=torch.float64).rsqrt()
    return {"flat": noise, "low rank": low, "both": low + 0.5 * noise, "slow": noise * fading}[kind]


@pytest.mark.parametrize("kind", ["flat", "low rank", "both", "slow"])
@pytest.mark.parametrize(("p", "d"), [(300, 420), (420, 300)])
def test_keeps_what_the_best_subspace_keeps(kind: str, p: int, d: int) -> None:
    M, k = matrix(kind, p, d), 10
    U, S = leading_subspace(M, k)
    assert U.shape == (p, k) and S.shape == (k + 1,)
    torch.testing.assert_close(U.mT @ U, torch.eye(k, dtype=torch.float64), atol=1e-12, rtol=0)
    values = torch.linalg.svdvals(M)
    total = float(M.square().sum())
    kept, best = float((U.mT @ M).square().sum()), float(values[:k].square().sum())
    assert (best - kept) / total < leading.TOLERANCE, "the steps end at this gain; the error is far below it"
    assert float(S[:k].square().sum()) == pytest.approx(kept, rel=1e-12)
    assert float(S.square().sum()) == pytest.approx(total, rel=1e-12)
    assert (S[: k - 1] >= S[1:k]).all()
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


def test_single_vectors_where_the_spectrum_has_gaps() -> None:
    Q, _ = torch.linalg.qr(draw(3, 200, 8))
    M = (Q * 2.0 ** -torch.arange(8, dtype=torch.float64)) @ torch.linalg.qr(draw(4, 300, 8)).Q.mT
    U, S = leading_subspace(M, 5)
    torch.testing.assert_close((U.mT @ Q[:, :5]).abs(), torch.eye(5, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(S[:5], 2.0 ** -torch.arange(5, dtype=torch.float64), atol=1e-9, rtol=0)
    assert float(S[5]) == pytest.approx(float((4.0 ** -torch.arange(5.0, 8.0)).sum().sqrt()), rel=1e-6)


def test_zero_and_small_sides() -> None:
    U, S = leading_subspace(torch.zeros(40, 50, dtype=torch.float64), 3)
    assert float(S.abs().max()) == 0.0 and torch.isfinite(U).all()
    M = draw(5, 6, 90)
    U, S = leading_subspace(M, 6)
    torch.testing.assert_close(U @ (U.mT @ M), M, atol=1e-12, rtol=0)
    torch.testing.assert_close(S[:6], torch.linalg.svdvals(M), atol=1e-10, rtol=0)


def test_the_same_every_time() -> None:
    M = draw(6, 100, 120)
    for a, b in zip(leading_subspace(M, 7), leading_subspace(M, 7), strict=True):
        assert torch.equal(a, b)
