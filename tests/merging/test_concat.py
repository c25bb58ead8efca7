from __future__ import annotations

import torch

from loraforge.merging.concat import merge_layer
from loraforge.merging.methods import NoParams, find_method

from .layers import layer
from .sums import check_sum


def test_is_the_exact_weighted_sum() -> None:
    check_sum(merge_layer)


def test_keeps_every_row_of_a_in_the_users_order() -> None:
    inputs = layer()
    merged = merge_layer(inputs, NoParams())
    assert torch.equal(merged.A, torch.cat([f.A for f in inputs.factors if f is not None]))
    first = inputs.factors[0]
    assert first is not None
    assert torch.equal(merged.B[:, :4], first.B * (inputs.weights[0] * first.scaling))


def test_row() -> None:
    row = find_method("concat")
    assert (row.default_weight, row.default_rank) == ("one", "full") and row.load_function() is merge_layer
