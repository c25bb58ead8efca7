from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.linalg.iasad import Budget, Split, input_scale, keep_entries, make_budget, process, split
from tests.oracles.factored import relative


def oracle(
    Z: np.ndarray, k: int, z: float, iters: int, level: str, keep: str, final: bool
) -> tuple[np.ndarray, list[float]]:
    """The published loop on dense float64 matrices: stable ascending sort of |x|, index order."""

    def best(M: np.ndarray) -> np.ndarray:
        U, s, Vh = np.linalg.svd(M, full_matrices=False)
        return (U[:, :k] * s[:k]) @ Vh[:k]

    sparse, residuals = np.zeros_like(Z), []
    for _ in range(iters):
        low = best(Z - sparse)
        rest = Z - low
        sparse = rest.copy() if level == "row" else rest.reshape(1, -1).copy()
        for row in sparse:
            order = np.argsort(np.abs(row), kind="stable")
            count = int(len(row) * z)
            row[order[:count] if keep == "largest" else order[count:]] = 0.0
        sparse = sparse.reshape(Z.shape)
        residuals.append(float(np.linalg.norm(Z - low - sparse)))
    return (best(Z - sparse) if final else low) + sparse, residuals


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("keep", ["largest", "smallest"])
@pytest.mark.parametrize("level", ["row", "element"])
@pytest.mark.parametrize("shape", [(20, 33), (31, 12)])
def test_against_the_loop(shape: tuple[int, int], level: str, keep: str, final: bool) -> None:
    Z = np.random.default_rng(0).standard_normal(shape)
    budget = make_budget(*shape, 0.1, 0.5)
    want, residuals = oracle(Z, budget.k, budget.zeroed, 6, level, keep, final)
    how = Split(budget, 6, level, keep, final)  # type: ignore[arg-type]
    parts = split(torch.tensor(Z), how)
    assert relative(parts.low + parts.sparse, want) < 1e-10
    assert parts.residuals == pytest.approx(residuals, rel=1e-9)
    d = torch.rand(shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    root = d.sqrt().numpy()
    want, _ = oracle(Z * root, budget.k, budget.zeroed, 6, level, keep, final)
    assert relative(process(torch.tensor(Z), d.sqrt(), how), want / root) < 1e-10


def test_above_256_the_gram_matrix_gives_the_same() -> None:
    g = np.random.default_rng(0)
    Z = g.standard_normal((300, 40)) @ g.standard_normal((40, 280)) + 0.1 * g.standard_normal((300, 280))
    want, _ = oracle(Z, 12, 0.775, 2, "row", "largest", True)
    parts = split(torch.tensor(Z), Split(Budget(12, 0.775), 2))
    assert relative(parts.low + parts.sparse, want) < 1e-10


@pytest.mark.parametrize("level", ["row", "element"])
def test_largest_never_raises_the_residual_and_smallest_does(level: str) -> None:
    Z = torch.tensor(np.random.default_rng(3).standard_normal((96, 80)))
    budget = make_budget(96, 80, 0.1, 0.75)
    largest = split(Z, Split(budget, 10, level, "largest")).residuals  # type: ignore[arg-type]
    smallest = split(Z, Split(budget, 10, level, "smallest")).residuals  # type: ignore[arg-type]
    assert all(b <= a + 1e-12 for a, b in zip(largest, largest[1:], strict=False)) and largest[-1] < 0.7 * largest[0]
    assert any(b > a for a, b in zip(smallest, smallest[1:], strict=False))
    assert smallest[-1] > 2 * largest[-1]


def test_budget() -> None:
    assert [make_budget(m, n, 0.1, 0.75).k for m, n in ((768, 768), (4096, 4096), (4096, 11008))] == [259, 1382, 2015]
    assert make_budget(768, 768, 0.1, 0.75).zeroed == pytest.approx(0.775)
    assert make_budget(10, 8, 0.0, 1.0).k == 4 and make_budget(2, 1000, 0.0, 1.0).k == 1  # below min(m, n)
    assert make_budget(10, 8, 0.9, 0.1).k == 1 and make_budget(1, 5, 0.1, 0.75).k == 1
    assert [make_budget(768, 768, 0.1, share, rank=4).k for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1, 1, 2, 3, 4]


def test_entries_by_hand() -> None:
    X = torch.tensor([[3.0, -1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 5.0]])
    assert keep_entries(X, 2, "largest").tolist() == [[3, 0, 0, 2], [0, 0, 0, 5]]
    assert keep_entries(X, 1, "largest").tolist() == [[3, 0, 1, 2], [0, 0, 0, 5]]  # of equal ones the first goes
    assert keep_entries(X, 1, "smallest").tolist() == [[0, -1, 0, 0], [0, 0, 0, 0]]
    assert keep_entries(X, 3, "smallest").tolist() == [[0, -1, 1, 2], [0, 0, 0, 0]]
    for cut, whole in ((0, "largest"), (4, "smallest")):
        other = "smallest" if whole == "largest" else "largest"
        assert torch.equal(keep_entries(X, cut, whole), X) and not keep_entries(X, cut, other).any()  # type: ignore[arg-type]


def test_input_statistics() -> None:
    d = torch.tensor([4.0, 0.0, 8.0])
    found = input_scale(d, 3, "m")
    assert found is not None and found.square().tolist() == pytest.approx([1.0, 1e-6, 2.0])
    again = input_scale(d * 1e-9, 3, "m")
    assert again is not None and torch.allclose(again, found)  # the unit of the statistic is nothing to the result
    assert input_scale(None, 3, "m") is None and input_scale(torch.zeros(3), 3, "m") is None
    with pytest.raises(LoraforgeError, match="does not fit"):
        input_scale(torch.ones(4), 3, "m")
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(LoraforgeError, match="negative, NaN or Inf"):
            input_scale(torch.tensor([1.0, bad, 1.0]), 3, "m")
