from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.merging.spectral_params import WudiParams
from loraforge.merging.wudi import merge_layer
from loraforge.types import Dense, LayerInputs, LowRank
from tests.oracles.factored import relative

from .spectra import SHAPES, check_invariants, check_zeros, deltas, dense, layer, result


def grams(parts: list[np.ndarray]) -> list[np.ndarray]:
    return [D.T @ D / np.linalg.norm(D) ** 2 for D in parts]


def oracle(parts: list[np.ndarray], ridge: float) -> np.ndarray:
    G = grams(parts)
    H = sum(G) + ridge * np.eye(G[0].shape[0])
    return sum(D @ g for D, g in zip(parts, G, strict=True)) @ np.linalg.pinv(H, rcond=1e-13, hermitian=True)


def objective(W: np.ndarray, parts: list[np.ndarray]) -> float:
    return sum(np.linalg.norm((W - D) @ D.T) ** 2 / np.linalg.norm(D) ** 2 for D in parts)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
@pytest.mark.parametrize(("m", "n", "ranks"), SHAPES)
def test_against_dense_arithmetic(m: int, n: int, ranks: tuple[int, ...], ridge: float) -> None:
    inputs = layer(m, n, ranks, weights=[(-0.5) ** i for i in range(len(ranks))])
    want = oracle(deltas(inputs), ridge)
    for kind in (inputs, dense(inputs)):
        # The oracle squares the condition of the stack, so it is the one that holds fewer digits.
        assert relative(result(merge_layer, kind, WudiParams(ridge=ridge)), want) < 1e-9
    rough = layer(m, n, ranks, dtype=torch.float32)
    assert relative(result(merge_layer, rough, WudiParams(ridge=1.0)), oracle(deltas(rough), 1.0)) < 2e-6


def test_by_hand() -> None:
    """[2, 0] and [0, 4] have apart inputs: [2, 4]. [2, 0] and [4, 0] share theirs: the mean, 3."""

    def one(row: list[float]) -> LowRank:
        return LowRank(torch.ones(1, 1).double(), torch.tensor([row]).double())

    for rows, want in (([[2.0, 0.0], [0.0, 4.0]], [[2.0, 4.0]]), ([[2.0, 0.0], [4.0, 0.0]], [[3.0, 0.0]])):
        inputs = LayerInputs("m", [one(r) for r in rows], [1.0, 1.0])
        assert np.allclose(result(merge_layer, inputs, WudiParams()), want, atol=1e-14)
    inputs = LayerInputs("m", [one([2.0, 0.0])], [1.0])  # 2 * 1 / (1 + ridge)
    assert np.allclose(result(merge_layer, inputs, WudiParams(ridge=1.0)), [[1.0, 0.0]], atol=1e-14)


def test_independent_inputs_are_interpolated() -> None:
    inputs = layer(30, 40, (3, 5, 4))
    W = result(merge_layer, inputs, WudiParams())
    for D, (_, f) in zip(deltas(inputs), inputs.present, strict=True):
        X = f.A.numpy().T  # inputs of the task's own row space
        assert relative(W @ X, D @ X) < 1e-10


def test_no_other_update_has_a_smaller_objective() -> None:
    g = np.random.default_rng(2)
    parts = [g.standard_normal((12, 10)) for _ in range(4)]
    W = result(merge_layer, LayerInputs("m", [Dense(torch.tensor(D)) for D in parts], [1.0] * 4), WudiParams())
    best = objective(W, parts)
    for _ in range(20):
        assert objective(W + 1e-3 * g.standard_normal(W.shape), parts) > best
    assert best < objective(sum(parts), parts) and best < objective(sum(parts) / 4, parts)


@pytest.mark.parametrize("ranks", [(3, 2, 4), (1, 8), (5,)])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_invariants(ranks: tuple[int, ...], ridge: float) -> None:
    check_invariants(merge_layer, WudiParams(ridge=ridge), layer(ranks=ranks))
    check_zeros(merge_layer, WudiParams(ridge=ridge))


def test_one_adapter_and_identical_ones_come_back() -> None:
    one = layer(ranks=(5,))
    for count in (1, 3):
        same = LayerInputs("m", one.factors * count, [1.0] * count)
        assert relative(result(merge_layer, same, WudiParams()), deltas(one)[0]) < 1e-12


def test_tiny_and_huge_deltas() -> None:
    inputs = layer()
    want = result(merge_layer, inputs, WudiParams())
    for scale in (1e-120, 1e120):
        scaled = LayerInputs("m", inputs.factors, [scale] * 3)
        assert relative(result(merge_layer, scaled, WudiParams()) / scale, want) < 1e-10
