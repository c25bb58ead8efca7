from __future__ import annotations

import pytest
import torch

from loraforge.linalg.polar import polar


def draw(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_full_rank_is_the_nearest_orthonormal_matrix() -> None:
    X = draw(9, 4)
    Q = polar(X)
    eye = torch.eye(4, dtype=torch.float64)
    assert torch.allclose(Q.T @ Q, eye, atol=1e-13)
    H = Q.T @ X  # X = Q H with H symmetric positive definite
    assert torch.allclose(H, H.T, atol=1e-13) and float(torch.linalg.eigvalsh(H)[0]) > 0
    other = torch.linalg.qr(X + 0.1 * draw(9, 4)).Q
    assert float((X - Q).norm()) < float((X - other).norm())


def test_a_turn_of_the_columns_passes_through() -> None:
    X, T = draw(9, 4), torch.linalg.qr(draw(4, 4)).Q
    assert torch.allclose(polar(X @ T), polar(X) @ T, atol=1e-12)


@pytest.mark.parametrize("noise", [0.0, 1e-13])
def test_dependent_columns_share_what_they_span(noise: float) -> None:
    u = draw(6, 1) / draw(6, 1).norm()
    X = torch.cat([u, u + noise * draw(6, 7)[:, 6:], 2 * u], dim=1)
    want = u @ torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64) / 6**0.5
    assert torch.allclose(polar(X), want, atol=1e-11)
    assert float(torch.linalg.matrix_norm(polar(X), 2)) == pytest.approx(1.0)


def test_rounding_of_float32_inputs_is_no_direction() -> None:
    X = torch.diag(torch.tensor([1.0, 1e-7], dtype=torch.float64))
    assert polar(X, torch.float32).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert torch.allclose(polar(X), torch.eye(2, dtype=torch.float64))


def test_more_columns_than_rows_and_none() -> None:
    X = draw(3, 7)
    Q = polar(X)
    assert Q.shape == (3, 7) and torch.allclose(Q @ Q.T, torch.eye(3, dtype=torch.float64), atol=1e-13)
    assert polar(torch.zeros(4, 2, dtype=torch.float64)).tolist() == [[0.0] * 2] * 4
    assert polar(torch.zeros(4, 0, dtype=torch.float64)).shape == (4, 0)
