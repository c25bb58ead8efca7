from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.linalg.core import core_of
from loraforge.linalg.draws import Draws
from loraforge.merging.core_dare import merge_layer
from loraforge.merging.elements_params import DareParams

from .elements import array, away, dense, layer, weigh, with_zero


def merge(inputs, density=0.4, seed=0):
    return merge_layer(inputs, DareParams(density, seed))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("gap", [None, 1])
def test_drops_entries_of_the_blocks(dtype: torch.dtype, tolerance: float, gap: int | None) -> None:
    inputs = layer(dtype=dtype, gap=gap)
    core = core_of(inputs)
    total = np.zeros(core.present[0].shape)
    for key, block in zip(inputs.keys, core.blocks, strict=True):
        if block is not None:
            uniform = Draws(3, "m", key).draw(0, block.numel()).reshape(block.shape) / 2.0**32
            total += np.where(uniform < 0.4, block.numpy() / 0.4, 0.0)
    want = core.left.numpy() @ total @ core.right.numpy().T
    assert away(merge(inputs, seed=3), want) < tolerance
    assert away(merge(with_zero(inputs), seed=3), want) < tolerance
    assert away(merge(inputs, seed=4), want) > 0.1


def test_edges_of_density() -> None:
    inputs = layer()
    assert away(merge(inputs, 1.0), sum(weigh(dense(inputs), inputs))) < 1e-12
    assert not array(merge(inputs, 0.0)).any()
