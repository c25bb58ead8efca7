from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.merging.elements_params import TrimParams
from loraforge.merging.knots_ties import aligned, merge_layer, survey
from loraforge.types import LayerInputs

from .elements import Array, array, as_dense, away, dense, elect, kept, kept_over, layer, weigh, with_zero

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-10}


def by_module(inputs, density=0.3):
    return merge_layer(inputs, TrimParams(density, "module"))


def joint(inputs: LayerInputs) -> tuple[Array, list[Array]]:
    """U and the blocks S V_i^T of the dense [w_1 D_1 .. w_N D_N]."""
    parts = weigh(dense(inputs), inputs)
    U, S, Vh = np.linalg.svd(np.concatenate(parts, axis=1), full_matrices=False)
    p = int((S > 1e-6 * S[0]).sum())
    blocks = np.split(S[:p, None] * Vh[:p], len(parts), axis=1)
    # The block of a missing adapter is rounding noise here, which the election would count.
    return U[:, :p], [block * bool(D.any()) for block, D in zip(blocks, parts, strict=True)]


@pytest.mark.parametrize("shape", [(23, 37), (37, 23), (9, 11)])
def test_blocks_are_those_of_the_joint_svd(shape: tuple[int, int]) -> None:
    """Up to the sign of each direction; 13 directions do not fit into 9 rows."""
    inputs = layer(m=shape[0], n=shape[1])
    U, blocks = aligned(inputs)
    wantU, want = joint(inputs)
    sign = np.sign((U.numpy() * wantU).sum(axis=0))
    assert np.abs(U.numpy() * sign - wantU).max() < 1e-10
    for source, W in zip(blocks.sources, want, strict=True):
        found = torch.cat([tile.clone() for _, tile in blocks.tiles(source)]).numpy()
        assert np.abs(found * sign[:, None] - W).max() < 1e-10 * np.abs(W).max()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("gap", [None, 1])
def test_equals_dense_arithmetic(dtype: torch.dtype, gap: int | None) -> None:
    inputs = layer(dtype=dtype, gap=gap)
    U, blocks = joint(inputs)
    want = U @ elect([kept(block, 0.3) for block in blocks])
    found = by_module(inputs)
    assert found.rank == U.shape[1] and found.B.dtype == found.A.dtype == dtype
    assert away(found, want) < TOLERANCE[dtype]
    assert away(by_module(with_zero(inputs)), want) < TOLERANCE[dtype]


def test_global_thresholds() -> None:
    modules = [layer(name="a"), layer(name="b", m=9, n=31, seed=7, gap=2)]
    params = TrimParams(0.3)
    found = survey(lambda: iter(modules), params)
    spaces = [joint(inputs) for inputs in modules]
    trimmed = [kept_over(parts, 0.3) for parts in zip(*(blocks for _, blocks in spaces), strict=True)]
    for index, inputs in enumerate(modules):
        want = spaces[index][0] @ elect([parts[index] for parts in trimmed])
        assert away(merge_layer(dataclasses.replace(inputs, context=found), params), want) < 1e-10
    assert survey(lambda: iter(modules), TrimParams(scope="module")) is None


def test_equal_adapters_share_their_directions() -> None:
    one = layer((4,), (1.0,))
    both = LayerInputs("m", [one.factors[0]] * 2, [1.0, 1.0])
    found = by_module(both, 1.0)
    assert found.rank == 4 and away(found, dense(one)[0]) < 1e-10


def test_one_adapter_at_density_one_and_zeros() -> None:
    one = layer((5,), (1.0,))
    assert away(by_module(one, 1.0), dense(one)[0]) < 1e-12
    none = with_zero(layer((3, 3), (1.0, 1.0), gap=0))
    none = dataclasses.replace(none, factors=[none.factors[0]] * 2)
    assert not array(by_module(none)).any() and by_module(none).rank == 1
    assert not array(by_module(layer(), 0.0)).any()


def test_full_checkpoints_are_refused() -> None:
    with pytest.raises(LoraforgeError, match="takes adapters"):
        by_module(as_dense(layer()))
