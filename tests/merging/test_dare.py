from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from loraforge.linalg.draws import Draws
from loraforge.merging.dare import merge_layer
from loraforge.merging.elements_params import DareParams
from loraforge.types import LayerInputs

from .elements import TOLERANCE, Array, array, away, check_checkpoints, check_rows, dense, layer, weigh, with_zero


def merge(inputs, density=0.4, seed=0):
    return merge_layer(inputs, DareParams(density, seed))


def masked(inputs: LayerInputs, density: float, seed: int) -> list[Array]:
    """M_i * D_i / density with one draw an entry in reading order."""
    out = []
    for key, D in zip(inputs.keys, dense(inputs), strict=True):
        uniform = Draws(seed, inputs.module, key).draw(0, D.size).reshape(D.shape) / 2.0**32
        out.append(np.where(uniform < density, D / density, 0.0))
    return out


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("gap", [None, 1])
def test_equals_dense_arithmetic(dtype: torch.dtype, gap: int | None) -> None:
    inputs = layer(dtype=dtype, gap=gap)
    want = sum(weigh(masked(inputs, 0.4, 3), inputs))
    assert away(merge(inputs, seed=3), want) < TOLERANCE[dtype]
    assert away(merge(with_zero(inputs), seed=3), want) < TOLERANCE[dtype]


def test_seed_module_and_key_make_the_mask() -> None:
    inputs = layer((4,), (1.0,))
    mask = array(merge(inputs)) != 0
    assert (mask == (array(merge(inputs)) != 0)).all()
    for other in (
        merge(inputs, seed=1),
        merge(dataclasses.replace(inputs, module="n")),
        merge(dataclasses.replace(inputs, keys=["other"])),
    ):
        agree = float((mask == (array(other) != 0)).mean())
        # Independent masks agree in 0.4^2 + 0.6^2 = 52 % of 391 entries; 5 standard deviations are 13 %.
        assert abs(agree - 0.52) < 0.13


def test_masks_do_not_depend_on_the_other_adapters() -> None:
    inputs = layer()
    back = LayerInputs("m", inputs.factors[::-1], inputs.weights[::-1], inputs.keys[::-1])
    assert away(merge(back), array(merge(inputs))) < 1e-14
    alone = [
        array(merge(LayerInputs("m", [f], [w], [k])))
        for f, w, k in zip(inputs.factors, inputs.weights, inputs.keys, strict=True)
    ]
    assert away(merge(inputs), sum(alone)) < 1e-14


def test_kept_share_and_expectation() -> None:
    inputs = layer((3,), (1.0,), m=400, n=300)
    found = array(merge(inputs, 0.2))
    share = float((found != 0).mean())
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 / found.size) ** 0.5
    D = dense(inputs)[0]
    # <M D / p, D> has mean ||D||^2 and variance (1 - p) / p sum D^4.
    assert abs((found * D).sum() - (D**2).sum()) < 5 * (4.0 * (D**4).sum()) ** 0.5


def test_edges_of_density() -> None:
    inputs = layer()
    assert not array(merge(inputs, 0.0)).any()
    assert away(merge(inputs, 1.0), sum(weigh(dense(inputs), inputs))) < 1e-14


def test_without_keys_adapters_are_told_apart() -> None:
    inputs = layer((4, 4), (1.0, -1.0))
    same = dataclasses.replace(inputs, factors=[inputs.factors[0]] * 2, keys=())
    assert array(merge(same)).any(), "equal masks would cancel"


def test_rows_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    check_rows(merge, monkeypatch)
    check_checkpoints(merge)
