from __future__ import annotations

import pytest
import torch

from loraforge.merging import dare
from loraforge.merging.dare_ties import merge_layer
from loraforge.merging.elements_params import DareParams
from loraforge.types import LayerInputs

from .elements import TOLERANCE, array, away, check_checkpoints, check_rows, dense, elect, layer, weigh


def merge(inputs, density=0.4, seed=0):
    return merge_layer(inputs, DareParams(density, seed))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_elects_among_the_terms_of_dare(dtype: torch.dtype) -> None:
    inputs = layer(dtype=dtype)
    parts = [
        array(dare.merge_layer(LayerInputs("m", [f], [w], [k]), DareParams(0.4, 3)))
        for f, w, k in zip(inputs.factors, inputs.weights, inputs.keys, strict=True)
    ]
    assert away(merge(inputs, seed=3), elect(parts)) < TOLERANCE[dtype]
    lacking = LayerInputs("m", [None, *inputs.factors[1:]], inputs.weights, inputs.keys)
    assert away(merge(lacking, seed=3), elect(parts[1:])) < TOLERANCE[dtype]


def test_edges_of_density() -> None:
    inputs = layer()
    assert not array(merge(inputs, 0.0)).any()
    assert away(merge(inputs, 1.0), elect(weigh(dense(inputs), inputs))) < 1e-14
    one = layer((5,), (1.0,))
    assert away(merge(one, 1.0), dense(one)[0]) < 1e-15


def test_rows_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    check_rows(merge, monkeypatch)
    check_checkpoints(merge)
