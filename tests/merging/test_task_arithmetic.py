from __future__ import annotations

import torch

from loraforge.merging.methods import NoParams, find_method
from loraforge.merging.task_arithmetic import merge_layer
from loraforge.types import LayerInputs, LowRank

from .sums import check_sum


def test_is_the_exact_weighted_sum() -> None:
    check_sum(merge_layer)


def test_hand_sized_example_has_no_cross_terms() -> None:
    # Summing factors would give [[3]] * [[3]] = 9 here; the sum of deltas is 1 * 2 * 1 + 0.5 * 1 * 2 = 3.
    one = LowRank(torch.tensor([[2.0]]), torch.tensor([[1.0]]), 1.0)
    two = LowRank(torch.tensor([[1.0]]), torch.tensor([[2.0]]), 0.5)
    merged = merge_layer(LayerInputs("m", [one, two], [1.0, 1.0]), NoParams())
    assert merged.delta().item() == 3.0 and merged.rank == 2


def test_row() -> None:
    row = find_method("linear")
    assert (row.name, row.default_weight, row.default_rank) == ("task-arithmetic", "one", "full")
    assert row.load_function() is merge_layer
