"""Agreement of factored updates against the dense ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.linalg.agreement import agreement
from loraforge.types import LowRank


def update(m: int, r: int, n: int, seed: int, scaling: float = 1.0, dtype: torch.dtype = torch.float64) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    B, A = torch.randn(m, r, generator=g, dtype=torch.float64), torch.randn(r, n, generator=g, dtype=torch.float64)
    return LowRank(B.to(dtype), A.to(dtype), scaling)


def overlap(D: np.ndarray, E: np.ndarray) -> tuple[float, int]:
    """||Q_1^T Q_2||_F^2 and the smaller dimension, from dense SVDs."""
    bases = []
    for X in (D, E):
        U, S, _ = np.linalg.svd(X)
        bases.append(U[:, : int((S > 1e-10 * S[0]).sum())])
    return float((np.linalg.svd(bases[0].T @ bases[1], compute_uv=False) ** 2).sum()), min(b.shape[1] for b in bases)


def test_equals_the_dense_updates() -> None:
    # The third has a repeated direction: its rank is one less than its factors say. The last two have scale and sign.
    third = update(9, 3, 7, 2)
    third = LowRank(torch.cat([third.B[:, :2], third.B[:, :1]], dim=1), third.A, 2.0)
    updates = [update(9, 2, 7, 0), update(9, 4, 7, 1, 0.5), third, None, update(9, 2, 7, 4, -3.0)]
    found = agreement(updates)
    for i, one in enumerate(updates):
        for j, other in enumerate(updates):
            numbers = [float(getattr(found, key)[i, j]) for key in ("inner", "overlap_out", "overlap_in", "compared")]
            if one is None or other is None:
                assert numbers == [0.0] * 4 and found.shared[i, j] == 0
                continue
            D, E = one.delta().numpy(), other.delta().numpy()
            assert found.shared[i, j] == 1
            assert numbers[0] == pytest.approx(float((D * E).sum()), abs=1e-9)
            for key, dense in (("out", overlap(D, E)), ("in", overlap(D.T, E.T))):
                assert float(getattr(found, f"overlap_{key}")[i, j]) == pytest.approx(dense[0], abs=1e-9)
                assert float(getattr(found, f"dims_{key}")[i, j]) == dense[1]
            assert found.compared[i, j] == 63 and found.differing[i, j] == (np.sign(D) != np.sign(E)).sum()
    assert found.spectra[3] is None
    for one, S in zip(updates, found.spectra, strict=True):
        if one is not None and S is not None:
            exact = np.linalg.svd(one.delta().numpy(), compute_uv=False)[: len(S)]
            assert S.numpy() == pytest.approx(exact, abs=1e-9)


def test_matrices_are_symmetric_to_the_last_bit() -> None:
    found = agreement([update(20, 3, 30, seed, dtype=torch.bfloat16) for seed in range(4)])
    for key in ("inner", "overlap_out", "overlap_in", "differing", "compared"):
        assert torch.equal(getattr(found, key), getattr(found, key).T), key


def test_zeros_have_no_direction_and_no_sign() -> None:
    zero = LowRank(torch.zeros(6, 2), torch.ones(2, 5))
    found = agreement([update(6, 2, 5, 0), zero, LowRank(torch.ones(6, 2), torch.ones(2, 5), 0.0)])
    assert found.dims_out[0].tolist() == [2, 0, 0] and found.compared[0].tolist() == [30, 0, 0]
    assert found.inner[1:].abs().sum() == 0 and found.shared.sum() == 9


def test_updates_of_other_shapes_are_not_compared() -> None:
    found = agreement([update(6, 2, 5, 0), update(6, 2, 4, 1), update(6, 3, 5, 2)])
    assert found.shared.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]] and found.inner[0, 1] == 0


@pytest.mark.parametrize(("m", "n"), [(300, 200), (2000, 30), (30, 2000)])
def test_signs_of_a_grid_estimate_those_of_all(m: int, n: int) -> None:
    updates = [update(m, 4, n, seed) for seed in range(2)]
    found, exact = agreement(updates, entries=20_000), agreement(updates, entries=m * n)
    assert float(exact.compared[0, 1]) == m * n == pytest.approx(float(found.compared[0, 1]))
    share = [float(a.differing[0, 1] / a.compared[0, 1]) for a in (found, exact)]
    assert share[0] != share[1] and share[0] == pytest.approx(share[1], abs=0.03)


def test_signs_in_blocks_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [update(40, 4, 30, seed, (-1.0) ** seed) for seed in range(3)]
    whole = agreement(updates)
    monkeypatch.setattr("loraforge.linalg.agreement._BLOCK", 3 * 30 * 7)
    assert torch.equal(agreement(updates).differing, whole.differing)


def test_gauge_changes_nothing() -> None:
    one, other = update(12, 3, 10, 0), update(12, 3, 10, 1)
    G: Tensor = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    turned = LowRank(one.B @ G, torch.linalg.solve(G, one.A))
    for key in ("inner", "overlap_out", "overlap_in", "differing"):
        torch.testing.assert_close(getattr(agreement([turned, other]), key), getattr(agreement([one, other]), key))


def test_wrong_input() -> None:
    with pytest.raises(LoraforgeError, match="out of range"):
        agreement([update(3, 1, 3, 0)], entries=0)
    with pytest.raises(LoraforgeError, match="NaN or Inf"):
        agreement([LowRank(torch.full((3, 1), float("nan")), torch.ones(1, 3))])
