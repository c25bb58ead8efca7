from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.kernels.entrywise import Part, below, drop_above, keep_from
from loraforge.linalg.elements import TILE_ENTRIES, deltas_of, elected, summed, tile_rows, trim
from loraforge.linalg.sketch import block_rows
from loraforge.types import Dense, LayerInputs, LowRank


def nothing(index: int, tile: torch.Tensor, start: int) -> None:
    """Sparsifies nothing."""


def rows(
    values: list[list[float]], weights: list[float] | None = None, dtype: torch.dtype = torch.float64
) -> LayerInputs:
    made = [Dense(torch.tensor([v], dtype=dtype)) for v in values]
    return LayerInputs("m", made, weights or [1.0] * len(values))


def drawn(m: int, n: int, count: int = 3, dtype: torch.dtype = torch.float32) -> LayerInputs:
    g = torch.Generator().manual_seed(4)
    made = [
        LowRank(torch.randn(m, 4, generator=g).to(dtype), torch.randn(4, n, generator=g).to(dtype), 0.3)
        for _ in range(count)
    ]
    return LayerInputs("m", made, [1.0, -0.5, 2.0][:count])


def test_entries_are_float64_products_rounded_once() -> None:
    inputs = drawn(50, 40)
    deltas = deltas_of(inputs)
    assert deltas.dtype == torch.float32 and deltas.rank_bound == 12
    for source, update in zip(deltas.sources, inputs.factors, strict=True):
        found = torch.cat([tile.clone() for _, tile in deltas.tiles(source)])
        assert torch.equal(found, update.to(torch.float64).delta().to(torch.float32))
    assert deltas_of(drawn(5, 4, dtype=torch.bfloat16)).dtype == torch.float32
    assert deltas_of(drawn(5, 4, dtype=torch.float64)).dtype == torch.float64


def test_what_adds_nothing_is_left_out() -> None:
    a, b, c = drawn(6, 5).factors
    zero = LowRank(torch.zeros(6, 9), torch.randn(9, 5))
    found = deltas_of(LayerInputs("m", [zero, a, None, b, c], [1.0, 1.0, 1.0, 0.0, 2.0]))
    assert [source.index for source in found.sources] == [1, 4] and found.rank_bound == 8
    none = summed(deltas_of(LayerInputs("m", [zero], [1.0])), nothing)
    assert none.rank_bound == 1 and none.shape == (6, 5) and not none.delta().any()
    assert deltas_of(rows([[1.0, 2.0], [3.0, 4.0]])).rank_bound == 1, "dense updates: min(m, n)"
    with pytest.raises(LoraforgeError, match="do not fit together"):
        deltas_of(LayerInputs("m", [None], [1.0]))


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [2.0, -1.0, 0.5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_election_against_its_definition(weights: list[float], dtype: torch.dtype) -> None:
    """Small whole numbers: zeros, sums of exactly 0 and ties of counts occur often, and every sum is exact."""
    values = np.random.default_rng(0).integers(-3, 4, (3, 400))
    found = elected(deltas_of(rows(values.tolist(), weights, dtype)), nothing).delta(torch.float64)[0]
    for column, got in zip(values.T, found.tolist(), strict=True):
        x = column * np.array(weights)
        agree = x[(np.sign(x) == np.sign(x.sum())) & (x != 0)]
        assert got == pytest.approx(agree.mean() if agree.size else 0.0, rel=1e-6)


def test_election_of_large_and_small_entries_does_not_cancel() -> None:
    found = elected(deltas_of(rows([[1e8, 3e-8], [-1e8, 1e-8], [1.0, -1e-8]])), nothing).delta()[0]
    assert found.tolist() == pytest.approx([(1e8 + 1.0) / 2, 2e-8], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1e-45, 1e-39, 0.1, 1.0, 3e38])
def test_limits_include_what_equals_them(value: float, dtype: torch.dtype) -> None:
    limit = float(torch.tensor(value, dtype=dtype))
    less = below(limit, dtype)
    line = [limit, -limit, less, -less, 0.0]
    tile = torch.tensor([line], dtype=dtype)
    keep_from(tile, limit)
    assert tile.tolist() == [[limit, -limit, 0, 0, 0]]
    tile = torch.tensor([line], dtype=dtype)
    drop_above(tile, less)
    assert tile.tolist() == [[0, 0, less, -less, 0]]
    keep_from(tile, 0.0)
    assert tile.any() or less == 0.0
    keep_from(tile, float("inf"))
    assert not tile.any()


def test_tiles_fit_into_the_blocks_of_a_sketch() -> None:
    for n in (1, 7, 768, 4096, 14336, 10**6, 10**9):
        assert tile_rows(n) == 1 or tile_rows(n) * n <= TILE_ENTRIES
        assert block_rows(n) % tile_rows(n) == 0


@pytest.mark.parametrize("rule", [nothing, trim([1.0] * 3)], ids=["tiles", "fused"])
def test_rows_are_formed_a_tile_at_a_time(rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many adapters and rows there are, the work space of the PyTorch form is that of one tile."""
    sizes: list[int] = []
    plain = Part.fill

    def watched(self: Part, start: int, tile: torch.Tensor, product: torch.Tensor) -> None:
        assert start % tile_rows(4096) == 0
        sizes.append(tile.numel())
        plain(self, start, tile, product)

    monkeypatch.setenv("LORAFORGE_KERNELS", "reference")
    monkeypatch.setattr(Part, "fill", watched)
    update = elected(deltas_of(drawn(500, 4096)), rule)
    assert update.rows(100, 110).shape == (10, 4096) and max(sizes) <= TILE_ENTRIES and len(sizes) == 3
