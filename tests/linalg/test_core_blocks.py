from __future__ import annotations

import torch

from loraforge.linalg.core import core_of
from loraforge.linalg.core_blocks import core_blocks
from loraforge.types import LayerInputs, LowRank


def pair(rank: int, seed: int, dtype: torch.dtype = torch.float64) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(*size, generator=g, dtype=dtype) for size in ((20, rank), (rank, 30)))
    return LowRank(B, A, 0.5)


def test_entries_are_the_blocks_with_their_places() -> None:
    inputs = LayerInputs("m", [pair(3, 1), None, pair(2, 2)], [1.0, 1.0, -2.0])
    core, blocks = core_blocks(inputs)
    want = core_of(inputs)
    assert [s.index for s in blocks.sources] == [0, 2] and blocks.shape == (5, 5) and blocks.dtype == torch.float64
    for source in blocks.sources:
        assert source.weight == 1.0 and torch.equal(source.left, want.blocks[source.index])
    assert torch.equal(core.left, want.left)
    narrow = LayerInputs("m", [pair(3, 1, torch.float32)], [1.0])
    assert core_blocks(narrow)[1].dtype == torch.float32


def test_what_adds_nothing_has_no_say_in_the_bases() -> None:
    a, b = pair(3, 1), pair(2, 2)
    zero = LowRank(torch.zeros(20, 4, dtype=torch.float64), pair(4, 3).A)
    plain = core_blocks(LayerInputs("m", [a, b], [1.0, 1.0]))[0]
    for extra, weight in ((zero, 1.0), (pair(4, 3), 0.0), (None, 1.0)):
        core, blocks = core_blocks(LayerInputs("m", [a, extra, b], [1.0, weight, 1.0]))
        assert torch.equal(core.left, plain.left) and torch.equal(core.right, plain.right)
        assert [s.index for s in blocks.sources] == [0, 2]
    core, blocks = core_blocks(LayerInputs("m", [zero], [1.0]))
    assert blocks.sources == [] and not core.lift(torch.zeros(blocks.shape, dtype=torch.float64)).delta().any()
