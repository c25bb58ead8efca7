from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.merging.spectral_params import SvcParams
from loraforge.merging.svc import merge_layer
from loraforge.types import LayerInputs, LowRank
from tests.oracles.factored import relative

from .spectra import SHAPES, check_invariants, check_zeros, deltas, dense, layer, result, thin


def oracle(parts: list[np.ndarray], alpha: float) -> np.ndarray:
    U, s, Vh = thin(sum(parts))
    out = np.zeros_like(parts[0])
    for r in range(len(s)):
        c = s[r] * Vh[r]
        found = []
        for D in parts:
            a = U[:, r] @ D
            if np.linalg.norm(a) > 1e-10 * np.linalg.norm(D):
                found.append(max(alpha, float(c @ a / (a @ a))))
        out += len(found) / sum(found) * s[r] * np.outer(U[:, r], Vh[r])
    return out


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0])
@pytest.mark.parametrize(("m", "n", "ranks"), SHAPES)
def test_against_dense_arithmetic(m: int, n: int, ranks: tuple[int, ...], alpha: float) -> None:
    inputs = layer(m, n, ranks, weights=[(-0.5) ** i for i in range(len(ranks))])
    want = oracle(deltas(inputs), alpha)
    for kind in (inputs, dense(inputs)):
        assert relative(result(merge_layer, kind, SvcParams(alpha=alpha)), want) < 1e-10
    rough = layer(m, n, ranks, dtype=torch.float32)
    assert relative(result(merge_layer, rough, SvcParams(alpha=alpha)), oracle(deltas(rough), alpha)) < 2e-6


def test_by_hand() -> None:
    """Rows 2 and 1 of one direction: the sum 3 holds them 3/2 and 3 times, so it becomes 3 * 2 / (3/2 + 3) = 4/3."""
    parts = [LowRank(torch.tensor([[x]]).double(), torch.tensor([[1.0, 0.0]]).double()) for x in (2.0, 1.0)]
    found = result(merge_layer, LayerInputs("m", parts, [1.0, 1.0]), SvcParams())
    assert np.allclose(found, [[4 / 3, 0.0]], atol=1e-14)
    # A task that is alone in a direction keeps it.
    parts[1] = LowRank(torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[0.0, 1.0]]).double())
    parts[0] = LowRank(torch.tensor([[2.0], [0.0]]).double(), torch.tensor([[1.0, 0.0]]).double())
    found = result(merge_layer, LayerInputs("m", parts, [1.0, 1.0]), SvcParams())
    assert np.allclose(found, np.diag([2.0, 1.0]), atol=1e-14)


@pytest.mark.parametrize("ranks", [(3, 2, 4), (1, 8), (5,)])
def test_invariants(ranks: tuple[int, ...]) -> None:
    check_invariants(merge_layer, SvcParams(), layer(ranks=ranks))
    check_zeros(merge_layer, SvcParams())


def test_one_adapter_and_identical_ones_come_back() -> None:
    one = layer(ranks=(5,))
    for count in (1, 4):
        same = LayerInputs("m", one.factors * count, [1.0] * count)
        assert relative(result(merge_layer, same, SvcParams()), deltas(one)[0]) < 1e-12
