from __future__ import annotations

import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.linalg.core import core_of
from loraforge.types import Dense, LayerInputs, LowRank
from tests.merging.spectra import SHAPES, deltas, dense, layer
from tests.oracles.factored import relative


@pytest.mark.parametrize(("m", "n", "ranks"), SHAPES)
def test_blocks_between_bases_are_the_deltas(m: int, n: int, ranks: tuple[int, ...]) -> None:
    inputs = layer(m, n, ranks, weights=[(-0.5) ** i for i in range(len(ranks))])
    core = core_of(inputs)
    assert core.left is not None and core.right is not None
    for Q in (core.left, core.right):
        assert torch.allclose(Q.T @ Q, torch.eye(Q.shape[1], dtype=Q.dtype), atol=1e-12)
        assert Q.shape[1] == min(Q.shape[0], sum(ranks))
    for C, D in zip(core.present, deltas(inputs), strict=True):
        assert relative(core.left @ C @ core.right.T, D) < 1e-12
    assert relative(core.lift(core.total()).delta(), sum(deltas(inputs))) < 1e-12
    U, S, Vh = torch.linalg.svd(core.total(), full_matrices=False)
    assert relative(core.lift_triplets(U, S, Vh.T).delta(), sum(deltas(inputs))) < 1e-12
    whole = core_of(dense(inputs))
    assert whole.left is None and isinstance(whole.lift(whole.total()), Dense)
    assert relative(whole.lift(whole.total()).delta(), sum(deltas(inputs))) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_adapter_of_a_far_other_gauge_keeps_its_directions(dtype: torch.dtype) -> None:
    """(c B, A / c) with c = 1e-8 is the same adapter and not rounding beside the others."""
    inputs = layer(dtype=dtype)
    moved = [LowRank(f.B * c, f.A / c, f.scaling) for c, (_, f) in zip((1e-8, 1.0, 1e8), inputs.present, strict=True)]
    changed = LayerInputs("m", moved, [1.0] * 3)
    core = core_of(changed)
    assert core.left is not None and core.left.shape[1] == 9
    assert relative(core.lift(core.total()).delta(), sum(deltas(changed))) < (1e-10 if dtype == torch.float64 else 2e-6)


def test_adapters_of_zeros_have_no_block() -> None:
    inputs = layer()
    m, n = inputs.shape
    zeros = [
        LowRank(torch.zeros(m, 2).double(), torch.ones(2, n).double()),
        LowRank(torch.ones(m, 2).double(), torch.zeros(2, n).double()),
        LowRank(torch.ones(m, 2).double(), torch.ones(2, n).double(), 0.0),
    ]
    more = LayerInputs("m", [*zeros, *inputs.factors, zeros[2]], [1.0] * 7)
    core, plain = core_of(more), core_of(inputs)
    assert core.left is not None and plain.left is not None and torch.equal(core.left, plain.left)
    assert [C is None for C in core.blocks] == [True] * 3 + [False] * 3 + [True]
    only = core_of(LayerInputs("m", zeros, [1.0] * 3))
    assert len(only.present) == 3 and not only.lift(only.total()).delta().any()
    nothing = only.total()[:, :0]
    assert (
        only.lift_triplets(nothing[:, :0], torch.zeros(0).double(), nothing.new_zeros(only.total().shape[1], 0)).rank
        == 1
    )


def test_duplicates_make_the_core_no_larger() -> None:
    inputs = layer(30, 20, (4, 4), shared=0)
    core = core_of(LayerInputs("m", [*inputs.factors, inputs.factors[0]], [1.0, -2.0, 0.5]))
    assert core.total().shape == (8, 8)


def test_bad_input() -> None:
    inputs = layer()
    with pytest.raises(LoraforgeError, match="do not fit together"):
        core_of(LayerInputs("m", [inputs.factors[0], layer(m=9).factors[0]], [1.0, 1.0]))
    with pytest.raises(LoraforgeError, match="do not fit together"):
        core_of(LayerInputs("m", [inputs.factors[0], dense(inputs).factors[1]], [1.0, 1.0]))
    with pytest.raises(LoraforgeError, match="do not fit together"):
        core_of(LayerInputs("m", [None], [1.0]))
    for bad in (LowRank(torch.full((4, 1), float("nan")), torch.ones(1, 3)), Dense(torch.full((4, 3), float("inf")))):
        with pytest.raises(LoraforgeError, match="NaN or Inf"):
            core_of(LayerInputs("m", [bad], [1.0]))
