from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from loraforge.merging.elements_params import TrimParams
from loraforge.merging.ties import merge_layer, survey
from loraforge.types import Dense, LayerInputs

from .elements import (
    TOLERANCE,
    array,
    away,
    check_checkpoints,
    check_rows,
    dense,
    elect,
    kept,
    kept_over,
    layer,
    weigh,
    with_zero,
)

MODULE = TrimParams(scope="module")


def by_module(inputs, density=0.2):
    return merge_layer(inputs, TrimParams(density, "module"))


def rows(*values: list[float]) -> LayerInputs:
    """Hand-sized adapters of one row each."""
    return LayerInputs("m", [Dense(torch.tensor([v])) for v in values], [1.0] * len(values))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("density", [0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("gap", [None, 1])
def test_equals_dense_arithmetic(dtype: torch.dtype, density: float, gap: int | None) -> None:
    inputs = layer(dtype=dtype, gap=gap)
    want = elect(weigh([kept(D, density) for D in dense(inputs)], inputs))
    assert away(by_module(inputs, density), want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_global_thresholds(dtype: torch.dtype) -> None:
    """One threshold an adapter over modules of unlike sizes and scales, one of which an adapter lacks."""
    modules = [layer(name="a", dtype=dtype), layer(name="b", m=9, n=31, seed=7, dtype=dtype, gap=2)]
    modules[1].factors[0] = dataclasses.replace(modules[1].factors[0], scaling=0.1)
    params = TrimParams(0.3)
    found = survey(lambda: iter(modules), params)
    trimmed = [kept_over(parts, 0.3) for parts in zip(*(dense(x) for x in modules), strict=True)]
    wants = []
    for index, inputs in enumerate(modules):
        wants.append(elect(weigh([parts[index] for parts in trimmed], inputs)))
        merged = merge_layer(dataclasses.replace(inputs, context=found), params)
        assert away(merged, wants[-1]) < TOLERANCE[dtype]
        assert away(by_module(inputs, 0.3), wants[-1]) > 0.01, "the scope must matter, or the test shows nothing"
    full = [with_zero(x) for x in modules]
    assert survey(lambda: iter(full), params) == found, "a module that is missing counts as zeros"
    assert survey(lambda: iter(modules), MODULE) is None
    assert survey(lambda: iter(()), params) == []


def test_mixed_dtypes_of_modules() -> None:
    modules = [layer(name="a", dtype=torch.float32), layer(name="b", seed=8)]
    found = survey(lambda: iter(modules), TrimParams(0.3))
    sizes = [np.abs(np.concatenate([D.ravel() for D in parts])) for parts in zip(*map(dense, modules), strict=True)]
    assert found == pytest.approx([np.sort(s)[-int(0.3 * s.size)] for s in sizes], rel=1e-7)


def test_hand_sized_example() -> None:
    # Column by column: agreement; majority of the sum, not of the count; a sum of 0; one alone; nobody.
    inputs = rows([2.0, 9.0, 3.0, 0.0, 0.0], [4.0, -2.0, -3.0, 5.0, 0.0], [3.0, -3.0, 0.0, 0.0, 0.0])
    assert array(by_module(inputs, 1.0)).tolist() == [[3.0, 9.0, 0.0, 5.0, 0.0]]
    # floor(0.5 * 5) = 2 entries of each are kept.
    assert array(by_module(inputs, 0.5)).tolist() == [[3.5, 9.0, 3.0, 5.0, 0.0]]


def test_weights_decide_the_sign_but_not_the_trim() -> None:
    inputs = rows([1.0, 4.0], [-3.0, 2.0])
    heavy = dataclasses.replace(inputs, weights=[-10.0, 1.0])
    assert array(by_module(heavy, 0.5)).tolist() == [[-3.0, -40.0]]
    silent = dataclasses.replace(inputs, weights=[0.0, 1.0])
    assert array(by_module(silent, 1.0)).tolist() == [[-3.0, 2.0]], "a weight of zero is not counted in the mean"


def test_equal_magnitudes_at_the_threshold_are_all_kept() -> None:
    inputs = rows([5.0, -2.0, 2.0, 2.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0])
    assert array(by_module(inputs, 0.2)).tolist() == [[5.0, -2.0, 2.0, 2.0, 0, 0, 0, 0, 0, 0]]
    assert array(by_module(inputs, 0.19)).tolist() == [[5.0] + [0.0] * 9], "floor(1.9) = 1"


def test_edges_of_density() -> None:
    inputs = layer()
    assert not array(by_module(inputs, 0.0)).any() and not array(by_module(inputs, 0.002)).any()
    one = layer((5,), (1.0,))
    assert away(by_module(one, 1.0), dense(one)[0]) < 1e-15
    zeros = rows([0.0, 0.0], [0.0, 0.0])
    assert not array(merge_layer(dataclasses.replace(zeros, context=[0.0, 0.0]), MODULE)).any()
    assert not array(by_module(zeros, 1.0)).any()


def test_rows_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    check_rows(by_module, monkeypatch)
    check_checkpoints(by_module)
