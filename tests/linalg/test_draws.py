from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.linalg.draws import SPAN, Draws, ascending, drop_and_rescale
from loraforge.types import Dense, LayerInputs

INPUTS = LayerInputs("m", [Dense(torch.ones(1, 1))] * 2, [1.0, 1.0], ["a", "b"])


def test_an_entry_has_its_draw_wherever_a_block_begins() -> None:
    draws = Draws(0, "m", "a")
    whole = draws.draw(0, 1000)
    assert whole.dtype == np.uint32
    for first in (0, 1, 7, 8, 9, 500, 991):
        for count in (0, 1, 2, 9):
            assert (draws.draw(first, count) == whole[first : first + count]).all()
    far = 3 * 2**40
    assert (draws.draw(far, 20)[5:] == draws.draw(far + 5, 15)).all()


def test_draws_are_pinned() -> None:
    """The same numbers in every version of this program and of NumPy, or merges could not be repeated."""
    assert Draws(0, "model.layers.0.q_proj", "adapter").draw(0, 4).tolist() == [
        402491824,
        1259700983,
        3185204109,
        2760233006,
    ]


@pytest.mark.parametrize(
    ("seed", "module", "key"), [(1, "m", "a"), (0, "n", "a"), (0, "m", "b"), (0, "ma", ""), (0, "", "ma")]
)
def test_other_words_give_other_draws(seed: int, module: str, key: str) -> None:
    one, other = Draws(0, "m", "a").draw(0, 10**5) / SPAN, Draws(seed, module, key).draw(0, 10**5) / SPAN
    assert not (one == other).any() or (one == other).mean() < 1e-3
    # Correlation of independent draws has a standard deviation of 1 / sqrt(count).
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / 10**2.5


def test_draws_are_uniform() -> None:
    uniform = Draws(0, "m", "a").draw(0, 10**6) / SPAN
    counts = np.bincount((uniform * 100).astype(int), minlength=100)
    assert np.abs(counts - 1e4).max() < 5 * (1e4 * 0.99) ** 0.5
    assert abs(np.corrcoef(uniform[1:], uniform[:-1])[0, 1]) < 5e-3, "neighbours"


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.9])
def test_kept_share(density: float) -> None:
    tile = torch.ones(1000, 700)
    drop_and_rescale(INPUTS, density, 0)(0, tile, 0)
    share = float((tile != 0).double().mean())
    assert abs(share - density) < 5 * (density * (1 - density) / tile.numel()) ** 0.5
    assert torch.equal(tile[tile != 0], torch.full((int((tile != 0).sum()),), 1 / density))


def test_tiles_of_a_matrix_share_one_mask() -> None:
    whole = torch.ones(40, 13)
    drop = drop_and_rescale(INPUTS, 0.4, 0)
    drop(1, whole, 0)
    for start, stop in ((0, 3), (3, 40), (17, 18)):
        tile = torch.ones(stop - start, 13)
        drop(1, tile, start)
        assert torch.equal(tile, whole[start:stop])


def test_order_of_magnitudes_is_stable() -> None:
    tile = torch.tensor([[3.0, -1.0, 0.0, -0.0, 1.0, -3.0, 2.0]])
    for dtype in (torch.float32, torch.float64):
        assert ascending(tile.to(dtype)).tolist() == [[2, 3, 1, 4, 6, 0, 5]]
    g = torch.Generator().manual_seed(1)
    big = torch.randint(-50, 50, (20, 300), generator=g).float() / 7
    assert (ascending(big) == ascending(big.double())).all()
