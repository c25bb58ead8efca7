from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.linalg.draws import Draws
from loraforge.merging.della import merge_layer
from loraforge.merging.elements_params import DellaParams
from loraforge.types import Dense, LayerInputs

from .elements import TOLERANCE, Array, array, away, check_checkpoints, check_rows, dense, layer, weigh, with_zero


def merge(inputs, density=0.4, epsilon=0.2, rescale="inverse", seed=0):
    return merge_layer(inputs, DellaParams(density, epsilon, rescale, seed))


def dropped(inputs: LayerInputs, density: float, epsilon: float, rescale: str, seed: int) -> list[Array]:
    out = []
    for key, D in zip(inputs.keys, dense(inputs), strict=True):
        n = D.shape[1]
        ranks = np.argsort(np.argsort(np.abs(D), axis=1, kind="stable"), axis=1)
        chance = density - epsilon + 2 * epsilon * ranks / (n - 1)
        uniform = Draws(seed, inputs.module, key).draw(0, D.size).reshape(D.shape) / 2.0**32
        kept = np.where(uniform < chance, D, 0.0)
        if rescale == "inverse":
            out.append(kept / np.where(uniform < chance, chance, 1.0))
        else:
            out.append(kept * np.abs(D).sum() / max(np.abs(kept).sum(), 1e-300))
    return out


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("rescale", ["inverse", "l1"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.4, 0.2), (0.3, 0.3), (0.7, 0.0)])
def test_equals_dense_arithmetic(dtype: torch.dtype, rescale: str, density: float, epsilon: float) -> None:
    for gap in (None, 1):
        inputs = layer(dtype=dtype, gap=gap)
        want = sum(weigh(dropped(inputs, density, epsilon, rescale, 3), inputs))
        assert away(merge(inputs, density, epsilon, rescale, 3), want) < TOLERANCE[dtype]
        assert away(merge(with_zero(inputs), density, epsilon, rescale, 3), want) < TOLERANCE[dtype]


def test_l1_keeps_the_norm_of_each_module() -> None:
    inputs = layer((4,), (1.0,))
    assert np.abs(array(merge(inputs, rescale="l1"))).sum() == pytest.approx(np.abs(dense(inputs)[0]).sum(), rel=1e-12)


def test_larger_entries_are_kept_more_often() -> None:
    """1000 equal rows: the k-th smallest of 11 is kept with 0.2 + 0.04 k."""
    row = torch.tensor([3.0, -1.0, 2.0, 11.0, -10.0, 9.0, 4.0, 5.0, -6.0, 8.0, 7.0])
    inputs = LayerInputs("m", [Dense(row.repeat(1000, 1))], [1.0], ["a"])
    share = (array(merge(inputs, 0.4, 0.2)) != 0).mean(axis=0)
    want = 0.2 + 0.04 * (np.abs(row.numpy()) - 1)
    assert (np.abs(share - want) < 5 * np.sqrt(want * (1 - want) / 1000)).all()


def test_edges() -> None:
    inputs = layer()
    exact = sum(weigh(dense(inputs), inputs))
    for rescale in ("inverse", "l1"):
        assert not array(merge(inputs, 0.0, 0.0, rescale)).any()
        assert away(merge(inputs, 1.0, 0.0, rescale), exact) < 1e-14
    column = layer(n=1, m=200, ranks=(1,), weights=(1.0,))
    assert set(np.round(array(merge(column, 0.5, 0.5)) / dense(column)[0], 12).ravel()) == {0.0, 2.0}


def test_rows_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    check_rows(merge, monkeypatch)
    check_checkpoints(merge)
