from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError, UsageError
from loraforge.merging.document_params import GeometricMeanParams
from loraforge.merging.geometric_mean import merge_layer
from loraforge.types import Dense, LayerInputs, LowRank
from tests.oracles import factored as oracle

from .layers import layer, product

PLAIN, ALIGNED = GeometricMeanParams(), GeometricMeanParams(align=True)


def pair(inputs: LayerInputs) -> list[LowRank]:
    return [f for f in inputs.factors if isinstance(f, LowRank)]


def test_a_hand_sized_example() -> None:
    one = LowRank(torch.tensor([[4.0], [-1.0]]), torch.tensor([[9.0, -1.0, 0.0]]), 2.0)
    two = LowRank(torch.tensor([[1.0], [-4.0]]), torch.tensor([[1.0, 4.0, 5.0]]), 8.0)
    merged = merge_layer(LayerInputs("m", [one, two], [0.5, 0.5]), PLAIN)
    # Scalings: sqrt(2 * 8) = 4. Two entries of -1 and -4 give +2: the rule keeps no common negative sign.
    assert merged.B.flatten().tolist() == [8.0, 8.0] and merged.A.flatten().tolist() == [3.0, -2.0, 0.0]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
def test_the_documents_formula(count: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs = layer((5,) * count, (1.0,) * count, dtype)
    found = pair(inputs)
    products = [np.prod([getattr(f, side).double().numpy() for f in found], axis=0) for side in "BA"]
    B, A = (np.sign(x) * np.abs(x) ** (1 / count) for x in products)
    want = np.prod([f.scaling for f in found]) ** (1 / count) * B @ A
    merged = merge_layer(inputs, PLAIN)
    assert merged.rank == 5 and merged.B.dtype == dtype
    assert oracle.relative(product(merged), want) < tolerance


def test_the_published_code() -> None:
    inputs = layer((5, 5), (1.0, 1.0))
    one, two = pair(inputs)
    U, D = one.B * two.B, one.A * two.A
    want = (U.sign() * (U.abs() + 1e-8).sqrt()) @ (one.A.sign() * (D.abs() + 1e-8).sqrt())
    want *= (one.scaling * two.scaling) ** 0.5
    code = GeometricMeanParams(variant="code")
    assert oracle.relative(product(merge_layer(inputs, code)), want.numpy()) < 1e-12
    with pytest.raises(LoraforgeError, match="two adapters"):
        merge_layer(layer((5, 5, 5), (1.0,) * 3), code)


def test_the_document_depends_on_the_factorisation_and_the_aligned_form_does_not() -> None:
    inputs = layer((5, 5), (1.0, 1.0))
    g = torch.Generator().manual_seed(2)
    moved = []
    for f in pair(inputs):
        G = torch.randn(5, 5, generator=g, dtype=torch.float64) + 3 * torch.eye(5)
        moved.append(LowRank(f.B @ G, torch.linalg.inv(G) @ f.A, f.scaling))
    other = LayerInputs("m", moved, inputs.weights)
    assert oracle.relative(product(merge_layer(other, PLAIN)), product(merge_layer(inputs, PLAIN))) > 0.5
    assert oracle.relative(product(merge_layer(other, ALIGNED)), product(merge_layer(inputs, ALIGNED))) < 1e-10


def test_the_aligned_form_is_a_mean() -> None:
    inputs = layer((5, 3), (1.0, 1.0))
    one, two = pair(inputs)
    swapped = LayerInputs("m", [two, one], inputs.weights)
    assert oracle.relative(product(merge_layer(swapped, ALIGNED)), product(merge_layer(inputs, ALIGNED))) < 1e-10
    for count in (1, 2, 3):
        same = LayerInputs("m", [one] * count, [1.0] * count)
        assert oracle.relative(product(merge_layer(same, ALIGNED)), product(one)) < 1e-10
    # c D and D / c have D as their geometric mean.
    both = LayerInputs("m", [LowRank(one.B, one.A, 4.0), LowRank(one.B, one.A, 0.25)], [1.0, 1.0])
    assert oracle.relative(product(merge_layer(both, ALIGNED)), one.B.numpy() @ one.A.numpy()) < 1e-10
    against = LayerInputs("m", [one, LowRank(-one.B, one.A, one.scaling)], [1.0, 1.0])
    assert float(merge_layer(against, ALIGNED).delta().norm()) < 1e-10 * float(one.delta().norm())


def test_a_missing_module_is_a_delta_of_zero() -> None:
    inputs = layer((5, 5), (1.0, 1.0), gap=1)
    zero = LayerInputs("m", [inputs.factors[0], LowRank(torch.zeros(23, 5), torch.ones(5, 17))], [1.0, 1.0])
    for params in (PLAIN, ALIGNED):
        for case in (inputs, zero):
            assert not merge_layer(case, params).delta().any()
        absent = LayerInputs("m", inputs.factors, inputs.weights, only_present=True)
        assert oracle.relative(product(merge_layer(absent, params)), product(inputs.factors[0])) < 1e-10


@pytest.mark.parametrize("params", [PLAIN, GeometricMeanParams(variant="code")])
def test_one_adapter_alone(params: GeometricMeanParams) -> None:
    inputs = layer((5,), (1.0,))
    assert oracle.relative(product(merge_layer(inputs, params)), product(inputs.factors[0])) < 1e-12


def test_ranks_must_be_equal_unless_aligned() -> None:
    inputs = layer((3, 5), (1.0, 1.0))
    with pytest.raises(LoraforgeError, match="needs equal ranks") as caught:
        merge_layer(inputs, PLAIN)
    assert "3 and 5" in str(caught.value) and "align" in str(caught.value)
    assert merge_layer(inputs, ALIGNED).rank == 8


def test_wrong_parameters_and_checkpoints() -> None:
    for wrong in ({"variant": "other"}, {"align": 1}, {"align": True, "variant": "code"}):
        with pytest.raises(UsageError):
            GeometricMeanParams(**wrong)
    with pytest.raises(LoraforgeError, match="not on full checkpoints"):
        merge_layer(LayerInputs("m", [Dense(torch.ones(3, 4))], [1.0]), PLAIN)
