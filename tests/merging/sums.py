"""Cases that every method that sums exactly has to pass; the mirrored test files run them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.merging.methods import NoParams
from loraforge.types import LayerInputs, LowRank
from tests.oracles import factored as oracle

from .layers import exact, layer, product

Merge = Callable[[LayerInputs, NoParams], LowRank]


def check_sum(merge: Merge) -> None:
    """Oracle, dtypes, gaps, order, gauge, one adapter, bad input."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)):
        inputs = layer(dtype=dtype)
        merged = merge(inputs, NoParams())
        assert oracle.relative(product(merged), exact(inputs)) < tolerance
        assert merged.scaling == 1.0 and merged.rank == 13
        assert merged.B.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    inputs = layer(gap=1)
    assert oracle.relative(product(merge(inputs, NoParams())), exact(inputs)) < 1e-10

    inputs = layer()
    whole = product(merge(inputs, NoParams()))
    swapped = LayerInputs("m", inputs.factors[::-1], inputs.weights[::-1])
    assert oracle.relative(product(merge(swapped, NoParams())), whole) < 1e-10
    moved = [LowRank(f.B * c, f.A / c, f.scaling) for c, f in zip((3.0, 0.2, -7.0), inputs.factors, strict=True) if f]
    assert oracle.relative(product(merge(LayerInputs("m", moved, inputs.weights), NoParams())), whole) < 1e-10

    one = layer((5,), (1.0,))
    assert np.allclose(product(merge(one, NoParams())), exact(one), rtol=0, atol=1e-12)
    with pytest.raises(LoraforgeError, match="no adapter has this module"):
        merge(LayerInputs("m", [None, None], [1.0, 1.0]), NoParams())
    crooked = [*layer((2,), (1.0,)).factors, *layer((2,), (1.0,), m=9).factors]
    with pytest.raises(LoraforgeError, match="different shapes"):
        merge(LayerInputs("m", crooked, [1.0, 1.0]), NoParams())
