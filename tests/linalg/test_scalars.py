from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loraforge.linalg import scalars
from loraforge.types import Dense, LayerInputs, LowRank


def gram(*vectors: tuple[float, ...]) -> torch.Tensor:
    V = torch.tensor(vectors, dtype=torch.float64)
    return V @ V.T


def combine(coefficients: list[float], *vectors: tuple[float, ...]) -> np.ndarray:
    return np.array(coefficients) @ np.array(vectors)


def test_gram_of_factors_of_dense_and_of_gaps() -> None:
    g = torch.Generator().manual_seed(0)
    low = [LowRank(torch.randn(6, r, generator=g), torch.randn(r, 5, generator=g), s) for r, s in ((2, 1.5), (3, -0.5))]
    dense = [Dense(f.delta(torch.float64)) for f in low]
    want = torch.stack([d.weight.flatten() for d in dense])
    want = want @ want.T
    for pair in (low, dense):
        G = scalars.gram(LayerInputs("m", [pair[0], None, pair[1]], [1.0, 7.0, 2.0]))
        assert torch.allclose(G[[0, 2]][:, [0, 2]], want, rtol=1e-6)
        assert not G[1].any() and not G[:, 1].any()


def test_sums_over_modules_go_by_key() -> None:
    one, two = LowRank(torch.ones(2, 1), torch.ones(1, 2)), LowRank(torch.ones(2, 1), torch.ones(1, 2), 3.0)
    layers = [
        LayerInputs("a", [one, two], [1.0, 1.0], ("x", "y")),
        LayerInputs("b", [two, None], [1.0, 1.0], ("x", "y")),
        LayerInputs("c", [two], [1.0], ("y",)),
    ]
    table = scalars.sum_grams(layers)
    assert table == {("x", "x"): 40.0, ("x", "y"): 12.0, ("y", "x"): 12.0, ("y", "y"): 72.0}
    found = scalars.gram_of(LayerInputs("c", [two], [1.0], ("y",), context=table))
    assert found.tolist() == [[72.0]]


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_moves_along_the_arc(t: float) -> None:
    angle = 0.7
    u, v = (1.0, 0.0), (math.cos(angle), math.sin(angle))
    point = combine(scalars.slerp(gram(u, v), t), u, v)
    assert np.allclose(point, [math.cos(t * angle), math.sin(t * angle)], rtol=0, atol=1e-14)


def test_slerp_at_its_limits() -> None:
    assert scalars.slerp(gram((2.0, 1.0), (2.0, 1.0)), 0.3) == pytest.approx([0.7, 0.3], abs=1e-7)
    assert scalars.slerp(gram((2.0, 1.0), (-4.0, -2.0)), 0.3) == [0.7, 0.3]
    assert scalars.slerp(gram((2.0, 1.0), (0.0, 0.0)), 0.3) == [0.7, 0.3]
    assert scalars.slerp(gram((0.0, 0.0), (0.0, 0.0)), 0.5) == [0.5, 0.5]


def test_karcher_is_where_the_logarithms_cancel() -> None:
    g = np.random.default_rng(1)
    vectors = g.normal(size=(4, 6)) + 0.8
    weights = [0.1, 0.4, 0.3, 0.2]
    point = combine(scalars.karcher(gram(*map(tuple, vectors)), weights, 100, 1e-12), *vectors)
    norms = np.linalg.norm(vectors, axis=1)
    assert np.isclose(np.linalg.norm(point), np.dot(weights, norms), rtol=1e-12)
    m = point / np.linalg.norm(point)
    logs = []
    for u in vectors / norms[:, None]:
        away = u - (u @ m) * m
        logs.append(math.acos(u @ m) * away / np.linalg.norm(away))
    assert np.linalg.norm(np.dot(weights, logs)) < 1e-12

    # Nearer than any neighbour by the sum of squared angles.
    def cost(x: np.ndarray) -> float:
        return float(np.dot(weights, np.arccos(vectors @ (x / np.linalg.norm(x)) / norms) ** 2))

    assert all(cost(m) < cost(m + 1e-3 * g.normal(size=6)) for _ in range(20))


def test_karcher_of_two_of_one_length_is_slerp() -> None:
    G = gram((1.0, 0.0, 0.2), (0.2, 1.0, 0.0))
    assert scalars.karcher(G, [0.7, 0.3], 100, 1e-12) == pytest.approx(scalars.slerp(G, 0.3), abs=1e-12)


def test_karcher_at_its_limits() -> None:
    one = (2.0, 1.0)
    alone = scalars.karcher(gram(one), [1.0], 10, 1e-12)
    assert alone == pytest.approx([1.0], abs=1e-15)
    three = scalars.karcher(gram(one, one, one), [1 / 3] * 3, 10, 1e-12)
    assert combine(three, one, one, one) == pytest.approx(one, abs=1e-14)
    # No direction of its own, but a third of the norm's weights.
    padded = scalars.karcher(gram(one, (0.0, 0.0), one), [1 / 3] * 3, 10, 1e-12)
    assert combine(padded, one, (0.0, 0.0), one) == pytest.approx([4 / 3, 2 / 3], abs=1e-14)
    opposite = scalars.karcher(gram(one, (-2.0, -1.0)), [0.5, 0.5], 10, 1e-12)
    assert opposite == [0.5, 0.5]
    assert scalars.karcher(gram((0.0, 0.0)), [1.0], 10, 0.0) == [1.0]
    leaning = scalars.karcher(gram((1.0, 0.0), (-1.0, 1e-3)), [0.5, 0.5], 100, 1e-12)
    assert all(map(math.isfinite, leaning))


def test_model_stock() -> None:
    """N = 2 with 60 degrees: t = 2 * .5 / 1.5."""
    sixty = (math.cos(math.pi / 3), math.sin(math.pi / 3))
    assert scalars.model_stock(gram((1.0, 0.0), sixty)) == pytest.approx(2 / 3, abs=1e-14)
    assert scalars.model_stock(gram((1.0, 0.0), (5 * sixty[0], 5 * sixty[1]))) == pytest.approx(2 / 3, abs=1e-14)
    assert scalars.model_stock(gram((1.0, 0.0), sixty, (0.0, 0.0))) == pytest.approx(3 * 0.5 / 2, abs=1e-14)
    assert scalars.model_stock(gram((3.0, 4.0))) == 1.0
    assert scalars.model_stock(gram((3.0, 4.0), (0.0, 0.0))) == 1.0
    assert scalars.model_stock(gram((3.0, 4.0), (6.0, 8.0))) == pytest.approx(1.0, abs=1e-14)
    assert scalars.model_stock(gram((1.0, 0.0), (0.0, 1.0))) == 0.0
    assert scalars.model_stock(gram((1.0, 0.0), (-1.0, 0.1))) == 0.0
