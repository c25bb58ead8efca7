from __future__ import annotations

import torch

from loraforge.merging.methods import NoParams, find_method
from loraforge.merging.weighted_average import merge_layer
from loraforge.types import LayerInputs, LowRank

from .layers import exact, layer, product
from .sums import check_sum


def test_is_the_exact_weighted_sum() -> None:
    check_sum(merge_layer)


def test_equal_adapters_average_to_themselves() -> None:
    one = layer((4,), (1.0,)).factors[0]
    merged = merge_layer(LayerInputs("m", [one] * 4, [0.25] * 4), NoParams())
    assert abs(product(merged) - exact(layer((4,), (1.0,)))).max() < 1e-12


def test_an_absent_module_counts_as_zero() -> None:
    one = LowRank(torch.tensor([[2.0]]), torch.tensor([[3.0]]), 1.0)
    assert merge_layer(LayerInputs("m", [one, None], [0.5, 0.5]), NoParams()).delta().item() == 3.0


def test_row() -> None:
    row = find_method("weighted-average")
    assert row.default_weight == "mean" and row.load_function() is merge_layer
