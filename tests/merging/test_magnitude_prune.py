from __future__ import annotations

import dataclasses

import pytest
import torch

from loraforge.merging.elements_params import TrimParams
from loraforge.merging.magnitude_prune import merge_layer, survey

from .elements import (
    TOLERANCE,
    array,
    away,
    check_checkpoints,
    check_rows,
    dense,
    kept,
    kept_over,
    layer,
    weigh,
    with_zero,
)


def by_module(inputs, density=0.2):
    return merge_layer(inputs, TrimParams(density, "module"))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("gap", [None, 1])
def test_equals_dense_arithmetic(dtype: torch.dtype, density: float, gap: int | None) -> None:
    inputs = layer(dtype=dtype, gap=gap)
    want = sum(weigh([kept(D, density) for D in dense(inputs)], inputs))
    assert away(by_module(inputs, density), want) < TOLERANCE[dtype]
    if gap is not None:
        assert away(by_module(with_zero(inputs), density), want) < TOLERANCE[dtype]


def test_global_thresholds() -> None:
    modules = [layer(name="a"), layer(name="b", m=9, n=31, seed=7, gap=0)]
    params = TrimParams(0.4)
    found = survey(lambda: iter(modules), params)
    trimmed = [kept_over(parts, 0.4) for parts in zip(*(dense(x) for x in modules), strict=True)]
    for index, inputs in enumerate(modules):
        want = sum(weigh([parts[index] for parts in trimmed], inputs))
        assert away(merge_layer(dataclasses.replace(inputs, context=found), params), want) < 1e-12
    assert survey(lambda: iter(modules), TrimParams(scope="module")) is None


def test_edges_of_density() -> None:
    assert not array(by_module(layer(), 0.0)).any()
    one = layer((5,), (-2.0,))
    assert away(by_module(one, 1.0), -2.0 * dense(one)[0]) < 1e-15


def test_rows_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    check_rows(by_module, monkeypatch)
    check_checkpoints(by_module)
