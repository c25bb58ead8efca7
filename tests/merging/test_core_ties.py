from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from loraforge.linalg.core import core_of
from loraforge.merging.core_ties import merge_layer, survey
from loraforge.merging.elements_params import TrimParams
from loraforge.types import LayerInputs

from .elements import Array, array, away, dense, elect, kept, kept_over, layer, with_zero

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-10}


def by_module(inputs, density=0.3):
    return merge_layer(inputs, TrimParams(density, "module"))


def bases(inputs: LayerInputs) -> tuple[Array, Array, list[Array]]:
    """Left vectors of the stacked w s B, right ones of the stacked A, and the blocks between them, by dense SVD."""
    pairs = [(w * f.scaling * f.B.double().numpy(), f.A.double().numpy()) for w, f in inputs.present]
    left = np.linalg.svd(np.concatenate([B for B, _ in pairs], axis=1), full_matrices=False)[0]
    right = np.linalg.svd(np.concatenate([A for _, A in pairs]), full_matrices=False)[2].T
    sides = []
    for Q, rank in ((left, inputs.shape[0]), (right, inputs.shape[1])):
        k = min(rank, sum(A.shape[0] for _, A in pairs))
        sides.append(Q[:, :k])
    return sides[0], sides[1], [sides[0].T @ B @ A @ sides[1] for B, A in pairs]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("gap", [None, 1])
def test_equals_dense_arithmetic(dtype: torch.dtype, gap: int | None) -> None:
    inputs = layer(dtype=dtype, gap=gap)
    left, right, blocks = bases(inputs)
    want = left @ elect([kept(block, 0.3) for block in blocks]) @ right.T
    found = by_module(inputs)
    assert found.rank <= left.shape[1] and found.B.dtype == dtype
    assert away(found, want) < TOLERANCE[dtype]
    assert away(by_module(with_zero(inputs)), want) < TOLERANCE[dtype], "zeros have no say in the bases"
    silent = dataclasses.replace(inputs, weights=[0.0, *inputs.weights[1:]])
    lacking = dataclasses.replace(inputs, factors=[None, *inputs.factors[1:]])
    assert away(by_module(silent), array(by_module(lacking))) < TOLERANCE[dtype]


def test_global_thresholds() -> None:
    modules = [layer(name="a"), layer(name="b", m=19, n=31, seed=7, gap=2)]
    params = TrimParams(0.3)
    found = survey(lambda: iter(modules), params)
    cores = [core_of(inputs) for inputs in modules]
    blocks = [[np.zeros(core.present[0].shape) if b is None else b.numpy() for b in core.blocks] for core in cores]
    trimmed = [kept_over(parts, 0.3) for parts in zip(*blocks, strict=True)]
    for index, (inputs, core) in enumerate(zip(modules, cores, strict=True)):
        want = core.left.numpy() @ elect([parts[index] for parts in trimmed]) @ core.right.numpy().T
        assert away(merge_layer(dataclasses.replace(inputs, context=found), params), want) < 1e-10
    assert survey(lambda: iter(modules), TrimParams(scope="module")) is None


def test_edges() -> None:
    one = layer((5,), (1.0,))
    assert away(by_module(one, 1.0), dense(one)[0]) < 1e-12
    assert not array(by_module(layer(), 0.0)).any()
    none = with_zero(layer((3, 3), (1.0, 1.0), gap=0))
    assert not array(by_module(dataclasses.replace(none, factors=[none.factors[0]] * 2))).any()
