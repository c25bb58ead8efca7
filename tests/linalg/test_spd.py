"""The ladder of solves: Cholesky, growing jitter, eigenvectors; and what each step says of itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.linalg.spd import factor_spd


def rotated(values: list[float], seed: int = 0) -> torch.Tensor:
    """A symmetric matrix with these eigenvalues."""
    g = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64))
    matrix = (Q * torch.tensor(values, dtype=torch.float64)) @ Q.mT
    return (matrix + matrix.mT) / 2


def rows(p: int, d: int) -> torch.Tensor:
    return torch.randn(p, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def check_lower(L: torch.Tensor) -> None:
    assert torch.equal(L, L.tril()) and bool((L.diagonal() > 0).all())


@pytest.mark.parametrize("d", [1, 2, 7, 33])
def test_positive_definite_is_solved_as_by_numpy(d: int) -> None:
    matrix = rotated([10.0**-k for k in np.linspace(0, 4, d)])
    factor, T = factor_spd(matrix, "m"), rows(3, d)
    want = np.linalg.solve(matrix.numpy(), T.numpy().T).T
    np.testing.assert_allclose(factor.solve_right(T).numpy(), want, rtol=1e-9, atol=1e-9 * abs(want).max())
    assert (factor.info.solver, factor.info.jitter) == ("cholesky", 0.0)
    check_lower(factor.L)
    # A lower bound, as documented: never more than the true condition number.
    assert 1.0 <= factor.info.condition <= float(torch.linalg.cond(matrix)) * (1 + 1e-9)


def test_singular_takes_the_smallest_jitter_that_works() -> None:
    matrix = torch.ones(5, 5, dtype=torch.float64)
    factor = factor_spd(matrix, "m")
    assert factor.info.solver == "cholesky+jitter" and 1e-15 < factor.info.jitter < 1e-12
    # What lies in the range is solved; the jitter is too small to be seen in it.
    T = torch.full((2, 5), 3.0, dtype=torch.float64)
    torch.testing.assert_close(factor.solve_right(T) @ matrix, T, rtol=1e-6, atol=0)
    shifted = matrix + factor.info.jitter * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(factor.L @ factor.L.mT, shifted, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("negative", "jitter"), [(-3e-9, 1e-8), (-3e-6, 1e-5), (-3e-4, 1e-3)])
def test_the_jitter_is_the_first_power_of_ten_above_the_negative_part(negative: float, jitter: float) -> None:
    matrix = rotated([1.0, 1.0, 1.0, 1.0, 1.0, negative])
    factor = factor_spd(matrix, "m")
    assert factor.info.solver == "cholesky+jitter"
    assert factor.info.jitter == pytest.approx(jitter)
    scale = float(matrix.diagonal().mean())
    lower = matrix + 0.1 * jitter * scale * torch.eye(6, dtype=torch.float64)
    assert int(torch.linalg.cholesky_ex(lower)[1]) != 0


def test_the_matrix_itself_is_left_alone() -> None:
    for matrix in (rotated([1.0, 1.0, -3e-6]), rotated([2.0, 1.0, -0.5]), torch.ones(3, 3, dtype=torch.float64)):
        before = matrix.clone()
        factor_spd(matrix, "m")
        assert torch.equal(matrix, before)


def test_indefinite_ends_at_the_eigenvectors() -> None:
    values = [4.0, 2.0, 1.0, -0.5]
    matrix = rotated(values)
    factor = factor_spd(matrix, "m")
    assert (factor.info.solver, factor.info.jitter) == ("eigh", 1e-3)
    check_lower(factor.L)
    floor = 1e-3 * float(matrix.diagonal().mean())
    torch.testing.assert_close(factor.L @ factor.L.mT, rotated([4.0, 2.0, 1.0, floor]), rtol=0, atol=1e-12)
    assert factor.info.condition == pytest.approx(4.0 / floor)


def test_zero_keeps_zero() -> None:
    factor = factor_spd(torch.zeros(4, 4, dtype=torch.float64), "m")
    T = rows(2, 4)
    assert torch.equal(factor.solve_right(0 * T), 0 * T) and torch.equal(factor.solve_right(T), T)
    assert np.isfinite(factor.info.condition)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_names_the_module(value: float) -> None:
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[2, 0] = matrix[0, 2] = value
    with pytest.raises(LoraforgeError, match="NaN or Inf") as caught:
        factor_spd(matrix, "layers.3.q_proj")
    assert caught.value.where == "layers.3.q_proj" and caught.value.exit_code == 3


def test_panels_give_the_factor_of_lapack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes around the panel, and a matrix that fails in a late panel."""
    monkeypatch.setattr("loraforge.linalg.spd._PANEL", 8)
    for d in (7, 8, 9, 16, 29):
        matrix = rotated([10.0**-k for k in np.linspace(0, 3, d)])
        factor = factor_spd(matrix, "m")
        torch.testing.assert_close(factor.L, torch.linalg.cholesky(matrix), rtol=0, atol=1e-14)
        check_lower(factor.L)
    late = torch.diag(torch.tensor([1.0] * 20 + [-1e-6] + [1.0] * 8, dtype=torch.float64))
    assert factor_spd(late, "m").info == factor_spd(late.clone(), "m").info
    assert factor_spd(late, "m").info.solver == "cholesky+jitter"


def test_half_solves_are_the_rows_in_the_metric_and_back() -> None:
    matrix, T = rotated([10.0**-k for k in np.linspace(0, 2, 9)]), rows(4, 9)
    factor = factor_spd(matrix, "m")
    M = factor.half_solve_right(T)
    torch.testing.assert_close(M, factor.solve_right(T) @ factor.L, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(factor.other_half_right(M), factor.solve_right(T), rtol=0, atol=0)
