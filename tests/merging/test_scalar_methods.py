"""slerp, karcher and model-stock: one coefficient an adapter, from inner products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError, UsageError
from loraforge.merging import karcher, model_stock, slerp
from loraforge.merging.scalar_params import KarcherParams, ModelStockParams, SlerpParams
from loraforge.types import Dense, LayerInputs, LowRank
from tests.oracles import factored as oracle

from .layers import layer

METHODS = [(slerp, SlerpParams), (karcher, KarcherParams), (model_stock, ModelStockParams)]
every = pytest.mark.parametrize(("method", "params"), METHODS, ids=["slerp", "karcher", "model-stock"])


def two(gap: int | None = None, dtype: torch.dtype = torch.float64) -> LayerInputs:
    """Two adapters with something in common, so that their angle is not about 90 degrees."""
    inputs = layer((4, 4), (0.5, 0.5), dtype)
    one, other = inputs.factors
    near = LowRank(torch.cat([one.B, other.B], 1), torch.cat([one.A, 0.3 * other.A]), one.scaling)
    return LayerInputs("m", [None if i == gap else f for i, f in enumerate((one, near))], [0.5, 0.5], ("x", "y"))


def deltas(inputs: LayerInputs) -> list[np.ndarray]:
    zero = np.zeros(inputs.shape)
    return [zero if f is None else f.delta(torch.float64).numpy() for f in inputs.factors]


def merged(method: Any, params: Any, inputs: LayerInputs) -> np.ndarray:
    return method.merge_layer(inputs, params).delta(torch.float64).numpy()


def dense_slerp(found: list[np.ndarray], t: float) -> np.ndarray:
    one, other = found
    theta = np.arccos((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))
    return (np.sin((1 - t) * theta) * one + np.sin(t * theta) * other) / np.sin(theta)


def dense_stock(found: list[np.ndarray]) -> np.ndarray:
    units = [d.ravel() / np.linalg.norm(d) for d in found]
    c = np.mean([units[i] @ units[j] for i in range(len(units)) for j in range(i)])
    return len(found) * c / (1 + (len(found) - 1) * c) * np.mean(found, axis=0)


def dense_karcher(found: list[np.ndarray]) -> np.ndarray:
    units = [d.ravel() / np.linalg.norm(d) for d in found]
    m = np.sum(units, axis=0) / np.linalg.norm(np.sum(units, axis=0))
    for _ in range(200):
        logs = [np.arccos(u @ m) / np.sqrt(1 - (u @ m) ** 2) * (u - (u @ m) * m) for u in units]
        step = np.mean(logs, axis=0)
        size = np.linalg.norm(step)
        if size < 1e-15:
            break
        m = np.cos(size) * m + np.sin(size) * step / size
    return np.mean([np.linalg.norm(d) for d in found]) * m.reshape(found[0].shape)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
@pytest.mark.parametrize(
    ("method", "params", "want"),
    [
        (slerp, SlerpParams(), lambda d: dense_slerp(d, 0.5)),
        (slerp, SlerpParams(t=0.2), lambda d: dense_slerp(d, 0.2)),
        (karcher, KarcherParams(), dense_karcher),
        (model_stock, ModelStockParams(), dense_stock),
    ],
)
def test_dense_forms(
    method: Any, params: Any, want: Callable[[list[np.ndarray]], np.ndarray], dtype: torch.dtype, tolerance: float
) -> None:
    inputs = two(dtype=dtype)
    assert oracle.relative(merged(method, params, inputs), want(deltas(inputs))) < tolerance
    assert method.merge_layer(inputs, params).rank == 12
    dense = LayerInputs("m", [Dense(torch.from_numpy(d)) for d in deltas(inputs)], inputs.weights)
    assert oracle.relative(merged(method, params, dense), want(deltas(inputs))) < 1e-10


@pytest.mark.parametrize(("method", "want"), [(karcher, dense_karcher), (model_stock, dense_stock)])
def test_three_adapters(method: Any, want: Callable[[list[np.ndarray]], np.ndarray]) -> None:
    one, near = two().factors
    third = LowRank(torch.cat([one.B, near.B], 1), torch.cat([one.A, -0.2 * near.A]), 1.0)
    inputs = LayerInputs("m", [one, near, third], [1 / 3] * 3)
    params = dict(METHODS)[method]()
    assert oracle.relative(merged(method, params, inputs), want(deltas(inputs))) < 1e-10


@every
def test_invariants(method: Any, params: Any) -> None:
    inputs = two()
    plain = merged(method, params(), inputs)
    swapped = LayerInputs("m", inputs.factors[::-1], inputs.weights[::-1])
    assert oracle.relative(merged(method, params(), swapped), plain) < 1e-10
    scaled = LayerInputs("m", [LowRank(f.B * 4, f.A, f.scaling) for f in inputs.factors], inputs.weights)
    assert oracle.relative(merged(method, params(), scaled), 4 * plain) < 1e-10
    one = inputs.factors[0]
    alone = LayerInputs("m", [one], [1.0])
    same = LayerInputs("m", [one, LowRank(one.B * -2, one.A / -2, one.scaling)], [0.5, 0.5])
    for case in (alone, same):
        assert oracle.relative(merged(method, params(), case), one.delta().numpy()) < 1e-10


@every
def test_a_missing_module_is_a_delta_of_zero(method: Any, params: Any) -> None:
    gap = two(gap=0)
    zero = LayerInputs("m", [LowRank(torch.zeros(23, 2), torch.ones(2, 17)), gap.factors[1]], gap.weights)
    assert oracle.relative(merged(method, params(), zero), merged(method, params(), gap)) < 1e-12
    assert oracle.relative(merged(method, params(), gap), 0.5 * deltas(gap)[1]) < 1e-12
    nothing = LayerInputs("m", [LowRank(torch.zeros(3, 1), torch.ones(1, 4))] * 2, [0.5, 0.5])
    assert not merged(method, params(), nothing).any()
    opposite = LayerInputs("m", [gap.factors[1], LowRank(-gap.factors[1].B, gap.factors[1].A, 1.0)], gap.weights)
    assert np.isfinite(merged(method, params(), opposite)).all()


@every
@pytest.mark.parametrize("scope", ["module", "global"])
def test_a_missing_module_may_be_as_if_not_there(method: Any, params: Any, scope: str) -> None:
    gap = two(gap=0)
    wide = params(scope=scope)
    context = method.survey(lambda: iter([two(), gap]), wide)
    absent = LayerInputs("m", gap.factors, [1.0, 1.0], gap.keys, context=context, only_present=True)
    assert oracle.relative(merged(method, wide, absent), deltas(gap)[1]) < 1e-12


@every
def test_the_scope_of_whole_adapters(method: Any, params: Any) -> None:
    """One Gram matrix for all modules: what counts is the angle of the modules laid side by side."""
    first, second = two(), two(gap=0)
    wide = params(scope="global")
    assert method.survey(lambda: iter(()), params()) is None
    context = method.survey(lambda: iter([first, second]), wide)
    results = [
        merged(method, wide, LayerInputs("m", x.factors, x.weights, x.keys, context=context)) for x in (first, second)
    ]
    both = [np.concatenate(pair) for pair in zip(deltas(first), deltas(second), strict=True)]
    side = LayerInputs("m", [Dense(torch.from_numpy(d)) for d in both], first.weights)
    assert oracle.relative(np.concatenate(results), merged(method, params(), side)) < 1e-10
    assert oracle.relative(results[0], merged(method, params(), first)) > 1e-3


def test_weights() -> None:
    inputs = two()
    heavier = LayerInputs("m", inputs.factors, [0.2, 0.8])
    for method, params in METHODS[1:]:
        assert oracle.relative(merged(method, params(), heavier), merged(method, params(), inputs)) > 1e-2
    assert (
        oracle.relative(
            merged(karcher, KarcherParams(), LayerInputs("m", inputs.factors, [0.0, 1.0])), deltas(inputs)[1]
        )
        < 1e-10
    )
    doubled = LayerInputs("m", inputs.factors, [0.4, 1.6])
    assert oracle.relative(merged(karcher, KarcherParams(), doubled), merged(karcher, KarcherParams(), heavier)) < 1e-12
    for wrong in ([1.0, -0.1], [0.0, 0.0]):
        with pytest.raises(UsageError, match="no such weights"):
            karcher.merge_layer(LayerInputs("m", inputs.factors, wrong), KarcherParams())


def test_what_is_refused() -> None:
    with pytest.raises(LoraforgeError, match="slerp merges two adapters"):
        slerp.merge_layer(layer(), SlerpParams())
    for cls, wrong in (
        (SlerpParams, {"t": 1.5}), (SlerpParams, {"t": "a"}), (SlerpParams, {"scope": "all"}),
        (KarcherParams, {"max_iter": 1.5}), (KarcherParams, {"tol": -1.0}), (ModelStockParams, {"scope": "x"}),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            cls(**wrong)
