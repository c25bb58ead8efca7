from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError, UsageError
from loraforge.merging.robust_merge import merge_layer
from loraforge.merging.unit_params import RobustMergeParams
from loraforge.types import Dense, LayerInputs, LowRank
from tests.oracles import factored as oracle

from .layers import exact, layer, product

WHOLE = RobustMergeParams(density=1.0, scale=1.0)


def dense_form(inputs: LayerInputs, density: float, scale: float) -> np.ndarray:
    """The definition, adapter by adapter; every adapter is present and none is zero."""

    def prune(x: np.ndarray) -> np.ndarray:
        threshold = np.sort(np.abs(x).ravel())[::-1][int(density * x.size) - 1]
        return np.where(np.abs(x) >= threshold, x, 0.0)

    factors = [(w, f.scaling, f.B.double().numpy(), f.A.double().numpy()) for w, f in inputs.present]
    ratios = [np.abs(A).sum(1) / np.abs(prune(A)).sum(1) for _, _, _, A in factors]
    total = np.zeros(inputs.shape)
    for (w, s, B, A), ratio in zip(factors, ratios, strict=True):
        share = [ratio[j] / sum(other[j] for other in ratios if len(other) > j) for j in range(len(ratio))]
        total += w * s * prune(B) @ np.diag(share) @ prune(A)
    return scale * total


@pytest.mark.parametrize("density", [1.0, 0.8, 0.3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)]
)
def test_the_definition(density: float, dtype: torch.dtype, tolerance: float) -> None:
    for inputs in (layer(dtype=dtype), layer((5, 5), (1.0, 1.0), dtype)):
        merged = merge_layer(inputs, RobustMergeParams(density=density, scale=1.7))
        assert merged.rank == sum(f.rank for f in inputs.factors)
        assert oracle.relative(product(merged), dense_form(inputs, density, 1.7)) < tolerance


def test_one_adapter_and_identical_ones_with_nothing_pruned() -> None:
    one = layer((5,), (1.0,))
    assert oracle.relative(product(merge_layer(one, WHOLE)), exact(one)) < 1e-10
    same = LayerInputs("m", list(one.factors) * 3, [1.0] * 3)
    assert oracle.relative(product(merge_layer(same, WHOLE)), exact(one)) < 1e-10


def test_order_scale_and_sign_of_the_factors() -> None:
    inputs = layer((5, 3), (1.0, 0.5))
    plain = product(merge_layer(inputs, RobustMergeParams()))
    swapped = LayerInputs("m", inputs.factors[::-1], inputs.weights[::-1])
    assert oracle.relative(product(merge_layer(swapped, RobustMergeParams())), plain) < 1e-10
    moved = [LowRank(f.B * c, f.A / c, f.scaling) for c, f in zip((-4.0, 0.25), inputs.factors, strict=True)]
    found = merge_layer(LayerInputs("m", moved, inputs.weights), RobustMergeParams())
    assert oracle.relative(product(found), plain) < 1e-10


def test_zero_deltas_and_gaps_are_left_out() -> None:
    gap = layer((4, 4), (1.0, 1.0), gap=0)
    zero = LayerInputs("m", [LowRank(torch.zeros(23, 4), torch.ones(4, 17)), gap.factors[1]], gap.weights)
    alone = LayerInputs("m", [gap.factors[1]], [1.0])
    want = product(merge_layer(alone, RobustMergeParams()))
    for case in (gap, zero):
        assert oracle.relative(product(merge_layer(case, RobustMergeParams())), want) < 1e-12
    nothing = LayerInputs("m", [LowRank(torch.zeros(3, 1), torch.ones(1, 4))] * 2, [1.0, 1.0])
    assert not merge_layer(nothing, RobustMergeParams()).delta().any()


def test_a_row_that_is_pruned_away_takes_no_share() -> None:
    """Row 2 of the first adapter is tiny and goes; the second adapter's row 2 then counts whole."""
    one = LowRank(torch.eye(4, 2), torch.tensor([[5.0, 4.0], [1e-3, 1e-3]]))
    two = LowRank(torch.eye(4, 2), torch.tensor([[0.0, 3.0], [2.0, 6.0]]))
    merged = merge_layer(LayerInputs("m", [one, two], [1.0, 1.0]), RobustMergeParams(density=0.5, scale=1.0))
    assert merged.delta()[1].tolist() == [0.0, 6.0]


def test_what_is_refused() -> None:
    for wrong in ({"density": 0.0}, {"density": 1.1}, {"scale": -1.0}, {"scale": float("nan")}, {"density": "a"}):
        with pytest.raises(UsageError):
            RobustMergeParams(**wrong)
    with pytest.raises(LoraforgeError, match="not on full checkpoints"):
        merge_layer(LayerInputs("m", [Dense(torch.ones(3, 4))], [1.0]), WHOLE)
