from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loraforge.merging.breadcrumbs import merge_layer
from loraforge.merging.elements_params import BreadcrumbsParams
from loraforge.types import Dense, LayerInputs

from .elements import TOLERANCE, array, away, check_checkpoints, check_rows, dense, layer, weigh, with_zero


def merge(inputs, density=0.6, gamma=0.1):
    return merge_layer(inputs, BreadcrumbsParams(density, gamma))


def between(D: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """By sorting: the floor(gamma n) largest go, of the rest the floor(density n) largest stay."""
    order = np.argsort(-np.abs(D), axis=None)
    first = math.floor(gamma * D.size)
    out = np.zeros(D.size)
    stay = order[first : first + math.floor(density * D.size)]
    out[stay] = D.ravel()[stay]
    return out.reshape(D.shape)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("density", "gamma"), [(0.6, 0.1), (0.9, 0.01), (0.3, 0.0), (1.0, 0.0), (0.25, 0.75)])
def test_equals_dense_arithmetic(dtype: torch.dtype, density: float, gamma: float) -> None:
    for gap in (None, 1):
        inputs = layer(dtype=dtype, gap=gap)
        want = sum(weigh([between(D, density, gamma) for D in dense(inputs)], inputs))
        assert away(merge(inputs, density, gamma), want) < TOLERANCE[dtype]
        assert away(merge(with_zero(inputs), density, gamma), want) < TOLERANCE[dtype]


def test_hand_sized_example() -> None:
    row = Dense(torch.tensor([[5.0, -4.0, 3.0, 3.0, 2.0, 1.0, 0.5, 0.0, 0.0, 0.0]]))
    inputs = LayerInputs("m", [row], [1.0])
    assert array(merge(inputs, 0.3, 0.1)).tolist() == [[0, -4, 3, 3, 0, 0, 0, 0, 0, 0]]
    assert array(merge(inputs, 0.2, 0.1)).tolist() == [[0, -4, 3, 3, 0, 0, 0, 0, 0, 0]], "equal ones at the cut stay"
    assert array(merge(inputs, 0.1, 0.3)).tolist() == [[0, 0, 3, 3, 0, 0, 0, 0, 0, 0]], "at the other cut as well"
    assert array(merge(inputs, 0.3, 0.0)).tolist() == [[5, -4, 3, 3, 0, 0, 0, 0, 0, 0]], "gamma 0 drops no outlier"
    assert not array(merge(inputs, 0.0, 0.1)).any() and not array(merge(inputs, 0.09, 0.0)).any()


def test_rows_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    check_rows(merge, monkeypatch)
    check_checkpoints(merge)
