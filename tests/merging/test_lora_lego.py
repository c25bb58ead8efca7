from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError, UsageError
from loraforge.merging.lora_lego import merge_layer
from loraforge.merging.unit_params import LoraLegoParams
from loraforge.types import Dense, LayerInputs, LowRank
from tests.oracles import factored as oracle

from .layers import exact, layer, product


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
def test_as_many_clusters_as_units_is_the_sum(dtype: torch.dtype, tolerance: float) -> None:
    inputs = layer(dtype=dtype)
    merged = merge_layer(inputs, LoraLegoParams(clusters=13, reweight_output=False))
    assert merged.rank == 13 and merged.B.dtype == dtype
    assert oracle.relative(product(merged), exact(inputs)) < tolerance
    literal = merge_layer(inputs, LoraLegoParams(clusters=13))
    assert oracle.relative(product(literal), exact(inputs) * math.sqrt(7 / 13)) < tolerance


def test_one_adapter_and_identical_ones() -> None:
    one = layer((5,), (1.0,))
    assert oracle.relative(product(merge_layer(one, LoraLegoParams())), exact(one)) < 1e-10
    for seed in range(5):
        f = one.factors[0]
        same = LayerInputs("m", [f, LowRank(-2 * f.B, f.A / -2, f.scaling), f], [1.0] * 3)
        merged = merge_layer(same, LoraLegoParams(seed=seed))
        assert merged.rank == 5 and oracle.relative(product(merged), exact(one)) < 1e-10


def test_a_hand_sized_cluster() -> None:
    """Two units that differ in b: mean of the balanced units, its largest entry raised to the members' mean."""
    a = torch.tensor([[1.0, 0.0]])
    one = LowRank(torch.tensor([[1.0], [0.0]]), a)
    two = LowRank(torch.tensor([[0.6], [0.8]]), a)
    merged = merge_layer(LayerInputs("m", [one, two], [1.0, 1.0]), LoraLegoParams())
    # Units (1, 0 | 1, 0) and (1, 0 | .6, .8): mean (1, 0 | .8, .4), largest entry 1 = the members'.
    assert merged.rank == 1 and torch.allclose(merged.delta(), torch.tensor([[0.8, 0.0], [0.4, 0.0]]))
    apart = merge_layer(LayerInputs("m", [one, LowRank(-two.B, a)], [1.0, 1.0]), LoraLegoParams())
    # Mean (1, 0 | .2, -.4): b is no longer as long as a, and stays so.
    assert torch.allclose(apart.delta(), torch.tensor([[0.2, 0.0], [-0.4, 0.0]]))


def test_near_copies_merge_into_their_means() -> None:
    g = torch.Generator().manual_seed(1)
    f = layer((4,), (1.0,)).factors[0]
    near = [
        LowRank(
            f.B + 1e-3 * torch.randn(f.B.shape, generator=g, dtype=torch.float64),
            f.A + 1e-3 * torch.randn(f.A.shape, generator=g, dtype=torch.float64),
            f.scaling,
        )
        for _ in range(3)
    ]
    merged = merge_layer(LayerInputs("m", near, [1.0] * 3), LoraLegoParams())
    mean = np.mean([product(x) for x in near], axis=0)
    assert merged.rank == 4 and oracle.relative(product(merged), mean) < 1e-3


def test_order_and_factors_do_not_matter() -> None:
    inputs = layer((5, 4, 3), (1.0, 0.5, -0.7))
    plain = product(merge_layer(inputs, LoraLegoParams()))
    swapped = LayerInputs("m", inputs.factors[::-1], inputs.weights[::-1])
    assert oracle.relative(product(merge_layer(swapped, LoraLegoParams())), plain) < 1e-10
    moved = [LowRank(f.B * c, f.A / c, f.scaling) for c, f in zip((3.0, -0.2, -7.0), inputs.factors, strict=True)]
    found = merge_layer(LayerInputs("m", moved, inputs.weights), LoraLegoParams())
    assert oracle.relative(product(found), plain) < 1e-10
    scaled = [LowRank(f.B * 4, f.A, f.scaling) for f in inputs.factors]
    found = merge_layer(LayerInputs("m", scaled, inputs.weights), LoraLegoParams())
    assert oracle.relative(product(found), 4 * plain) < 1e-10


def test_zero_deltas_gaps_and_zero_weights_are_left_out() -> None:
    gap = layer((4, 4), (1.0, 1.0), gap=0)
    zero = LayerInputs("m", [LowRank(torch.zeros(23, 4), torch.ones(4, 17)), gap.factors[1]], gap.weights)
    unweighted = LayerInputs("m", [layer((4, 4)[:1], (1.0,)).factors[0], gap.factors[1]], [0.0, 1.0])
    for case in (gap, zero, unweighted):
        assert oracle.relative(product(merge_layer(case, LoraLegoParams())), product(gap.factors[1])) < 1e-10
    nothing = LayerInputs("m", [LowRank(torch.zeros(3, 2), torch.ones(2, 4))] * 2, [1.0, 1.0])
    merged = merge_layer(nothing, LoraLegoParams())
    assert merged.rank == 2 and not merged.delta().any()


def test_options_and_refusals() -> None:
    inputs = layer((6, 6), (1.0, 1.0))
    assert merge_layer(inputs, LoraLegoParams(clusters=2)).rank == 2
    plain = product(merge_layer(inputs, LoraLegoParams(clusters=2)))
    raw = product(merge_layer(inputs, LoraLegoParams(clusters=2, reweight_output=False)))
    assert oracle.relative(math.sqrt(3) * raw, plain) < 1e-12
    assert oracle.relative(product(merge_layer(inputs, LoraLegoParams(clusters=2, reweight_units=False))), plain) > 1e-2
    for wrong in (
        {"clusters": 0}, {"clusters": True}, {"iterations": -1}, {"seed": 1.5}, {"reweight_units": 1},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            LoraLegoParams(**wrong)
    with pytest.raises(LoraforgeError, match="not on full checkpoints"):
        merge_layer(LayerInputs("m", [Dense(torch.ones(3, 4))], [1.0]), LoraLegoParams())
    bad = LowRank(torch.full((3, 1), float("nan")), torch.ones(1, 4))
    with pytest.raises(LoraforgeError, match="NaN or Inf"):
        merge_layer(LayerInputs("m", [bad], [1.0]), LoraLegoParams())
