from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.merging.spectral_params import TsvParams
from loraforge.merging.tsv import merge_layer
from loraforge.types import Dense, LayerInputs, LowRank
from tests.oracles.factored import relative

from .spectra import SHAPES, check_invariants, check_zeros, deltas, dense, layer, nudged, polar, result, thin


def oracle(parts: list[np.ndarray], k: int | None) -> np.ndarray:
    found = [thin(D, k) for D in parts]
    left, right = polar(np.hstack([U for U, _, _ in found])), polar(np.vstack([Vh for _, _, Vh in found]))
    return left @ np.diag(np.concatenate([s for _, s, _ in found])) @ right


@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize(("m", "n", "ranks"), SHAPES)
def test_against_dense_arithmetic(m: int, n: int, ranks: tuple[int, ...], k: int | None) -> None:
    inputs = layer(m, n, ranks, weights=[(-0.5) ** i for i in range(len(ranks))])
    want = oracle(deltas(inputs), k)
    assert relative(result(merge_layer, inputs, TsvParams(k=k)), want) < 1e-10
    want = oracle(deltas(inputs), k or max(1, min(m, n) // len(ranks)))
    assert relative(result(merge_layer, dense(inputs), TsvParams(k=k)), want) < 1e-10
    rough = layer(m, n, ranks, dtype=torch.float32)
    if sum(ranks) <= min(m, n):  # beyond it, how the whitening shares directions is decided by the weakest of them
        assert relative(result(merge_layer, rough, TsvParams(k=k)), oracle(deltas(rough), k)) < 2e-6


def test_by_hand() -> None:
    """e1 (2) and the unit vector between e1 and e2 (1), inputs apart: the whitened pair is symmetric to both."""
    h = 0.5**0.5
    one = LowRank(torch.tensor([[2.0], [0.0]]).double(), torch.tensor([[1.0, 0.0]]).double())
    two = LowRank(torch.tensor([[h], [h]]).double(), torch.tensor([[0.0, 1.0]]).double())
    found = result(merge_layer, LayerInputs("m", [one, two], [1.0, 1.0]), TsvParams())
    # The bisector of the two stays at 22.5 degrees; the nearest orthonormal pair lies at 45 degrees on both sides.
    c, s = np.cos(np.pi / 8), np.sin(np.pi / 8)
    assert np.allclose(found, [[2 * c, s], [-2 * s, c]], atol=1e-14)


@pytest.mark.parametrize("ranks", [(3, 2, 4), (1, 8), (5,)])
@pytest.mark.parametrize("k", [None, 2])
def test_invariants(ranks: tuple[int, ...], k: int | None) -> None:
    check_invariants(merge_layer, TsvParams(k=k), layer(ranks=ranks))
    check_zeros(merge_layer, TsvParams(k=k))


def test_one_adapter_and_identical_ones_come_back() -> None:
    one = layer(ranks=(5,))
    assert relative(result(merge_layer, one, TsvParams()), deltas(one)[0]) < 1e-12
    assert relative(result(merge_layer, dense(one), TsvParams()), deltas(one)[0]) < 1e-12
    three = LayerInputs("m", one.factors * 3, [1.0] * 3)
    assert relative(result(merge_layer, three, TsvParams()), deltas(one)[0]) < 1e-12
    # Orthogonal tasks do not interfere: the sum.
    apart = [LowRank(torch.eye(9)[:, i : i + 3].double(), torch.eye(9)[i : i + 3].double(), i + 1.0) for i in (0, 3, 6)]
    inputs = LayerInputs("m", apart, [1.0] * 3)
    assert relative(result(merge_layer, inputs, TsvParams()), sum(deltas(inputs))) < 1e-12


def test_near_copies_are_copies() -> None:
    inputs = layer(30, 20, (4, 4), shared=0)
    twice = LayerInputs("m", [*inputs.factors, inputs.factors[0]], [1.0, 1.0, 1.0])
    found = result(merge_layer, twice, TsvParams())
    assert relative(found, result(merge_layer, inputs, TsvParams())) > 1e-2
    assert relative(result(merge_layer, nudged(twice), TsvParams()), found) < 1e-9


def test_checkpoints_share_the_directions_as_published() -> None:
    g = np.random.default_rng(4)
    parts = [g.standard_normal((14, 20)) for _ in range(3)]
    inputs = LayerInputs("m", [Dense(torch.tensor(D)) for D in parts], [1.0] * 3)
    assert relative(result(merge_layer, inputs, TsvParams()), oracle(parts, 4)) < 1e-10  # int(14 / 3)


def test_the_published_rule_moves_with_the_rounding_and_this_one_does_not() -> None:
    inputs = layer(96, 80, (4,) * 4)

    def literal(parts: list[np.ndarray]) -> np.ndarray:
        found = [np.linalg.svd(D, full_matrices=False) for D in parts]
        left = np.linalg.svd(np.hstack([f[0][:, :20] for f in found]), full_matrices=False)
        right = np.linalg.svd(np.vstack([f[2][:20] for f in found]), full_matrices=False)
        return (left[0] @ left[2] * np.concatenate([f[1][:20] for f in found])) @ (right[0] @ right[2])

    assert relative(literal(deltas(nudged(inputs))), literal(deltas(inputs))) > 0.1
    ours = [result(merge_layer, x, TsvParams()) for x in (inputs, nudged(inputs))]
    assert relative(ours[1], ours[0]) < 1e-9
