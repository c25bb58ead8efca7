from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.linalg import sketch
from loraforge.linalg.factored import truncate
from loraforge.linalg.rank import RankRule
from loraforge.linalg.sketch import block_rows, low_rank
from loraforge.types import Dense, LowRank, RowStream
from tests.oracles import factored as oracle

INDEX = torch.arange(1, 301, dtype=torch.float64)
SPECTRA = {"1/i": 1 / INDEX, "i^-1/2": INDEX**-0.5, "exp": torch.exp(-INDEX / 40), "slow": (1 + INDEX / 20) ** -0.5}


def matrix(m: int, n: int, S: torch.Tensor) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    U = torch.linalg.qr(torch.randn(m, S.numel(), generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, S.numel(), generator=g, dtype=torch.float64)).Q
    return (U * S) @ V.T


def stream(W: torch.Tensor, bound: int) -> RowStream:
    return RowStream((W.shape[0], W.shape[1]), W.dtype, W.device, lambda a, b: W[a:b], bound)


def distance(found: sketch.Truncated, W: torch.Tensor) -> float:
    return float((found.factors.delta(torch.float64) - W).norm())


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sketches of matrices that would be small enough for the dense way, in several blocks and without holding them."""
    monkeypatch.setattr(sketch, "EXACT_SIDE", 8)
    monkeypatch.setattr(sketch, "BLOCK_ENTRIES", 2**14)
    monkeypatch.setattr(sketch, "HELD_BYTES", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (1, 17), (17, 1)])
def test_small_updates_are_cut_exactly(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    exact, tolerance = W.double().numpy(), 2e-6 if dtype == torch.float32 else 1e-10
    for rule in (RankRule(rank=5), RankRule(energy=0.7), RankRule(max_rank=3), RankRule()):
        found = low_rank(Dense(W), rule)
        want = truncate(LowRank(W, torch.eye(shape[1], dtype=dtype)), rule)
        assert found.rank == found.factors.rank == want.rank and found.factors.B.dtype == dtype
        assert oracle.relative(found.factors.delta(torch.float64).numpy(), oracle.best_rank_k(exact, found.rank)[0]) < (
            tolerance * 10
        )
        assert found.error == pytest.approx(want.error, abs=1e-6) and found.kept_energy == pytest.approx(
            want.kept_energy, abs=1e-7
        )
        assert np.allclose(found.spectrum, oracle.spectrum(exact)[: found.spectrum.numel()])


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("m", "n", "k"), [(310, 420, 8), (420, 310, 40)])
def test_a_sketch_is_within_a_percent_of_the_optimum(name: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    S = SPECTRA[name]
    W = matrix(m, n, S)
    found = low_rank(stream(W.to(dtype), k), RankRule())
    assert found.rank == k and found.factors.B.dtype == dtype
    best = float(S[k:].norm())
    assert best * (1 - 1e-6) <= distance(found, W) < 1.01 * best
    assert found.error == pytest.approx(distance(found, W), rel=1e-5), "the error is measured, not estimated"
    assert found.kept_energy == pytest.approx(1 - found.error**2 / float(S.square().sum()), abs=1e-6)


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_low_rank_input_is_exact(dtype: torch.dtype, tolerance: float) -> None:
    """Also directions that are far below the largest one, which float32 products alone would lose."""
    S = 10.0 ** -torch.linspace(0, 5, 12, dtype=torch.float64)
    W = matrix(400, 300, S).to(dtype)
    found = low_rank(stream(W, 30), RankRule())
    assert found.rank == 12 and found.kept_energy > 1 - 1e-12 and found.error < tolerance
    assert distance(found, W.double()) < tolerance * float(S[0])
    # The least direction is 1e-5 of the largest; float32 entries carry it to about a hundredth of that.
    assert torch.allclose(found.spectrum[:12], S, rtol=1e-2 if dtype == torch.float32 else 1e-9)


@pytest.mark.usefixtures("sketched")
def test_same_bits_for_every_way_to_hold_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    W = matrix(420, 310, SPECTRA["i^-1/2"]).float()
    asked: list[int] = []

    def form(start: int, stop: int) -> torch.Tensor:
        asked.append(stop - start)
        return W[start:stop]

    low = low_rank(RowStream((420, 310), torch.float32, W.device, form, 9), RankRule(), "m")
    assert max(asked) == block_rows(310) == 32, "rows come a block at a time"
    assert torch.equal(low.factors.B, low_rank(Dense(W), RankRule(rank=9), "m").factors.B)
    monkeypatch.setattr(sketch, "HELD_BYTES", 2**30)
    held = low_rank(stream(W, 9), RankRule(), "m")
    assert torch.equal(low.factors.A, held.factors.A) and low.error == held.error
    other = low_rank(stream(W, 9), RankRule(), "another module")
    assert not torch.equal(low.factors.A, other.factors.A), "directions are drawn by module"
    assert other.error == pytest.approx(low.error, rel=1e-2)


@pytest.mark.usefixtures("sketched")
def test_rank_rules_see_the_whole_energy() -> None:
    S = SPECTRA["i^-1/2"]
    W = stream(matrix(310, 420, S), 50)
    share = S.square().cumsum(0) / S.square().sum()
    k = int((share < 0.5).sum()) + 1
    assert k < 50 and abs(low_rank(W, RankRule(energy=0.5)).rank - k) <= 1
    assert low_rank(W, RankRule(energy=0.99)).rank == 50, "what the bound does not allow gives the bound"
    tail = (1 - share).sqrt()
    assert abs(low_rank(W, RankRule(fro_error=0.7)).rank - int((tail > 0.7).sum()) - 1) <= 1
    assert low_rank(W, RankRule(rank=70)).rank == 50 and low_rank(W, RankRule(rank=7)).rank == 7
    assert low_rank(W, RankRule(rank=7, min_rank=9)).rank == 9
    assert low_rank(W, RankRule(energy=0.5, max_rank=4)).rank == 4
    assert low_rank(W, RankRule(ratio=3.0)).rank == 9 - 1, "S_9 is S_1 / 3 to rounding or below"


@pytest.mark.parametrize("small", [True, False])
def test_zeros_and_bad_values(small: bool, request: pytest.FixtureRequest) -> None:
    if not small:
        request.getfixturevalue("sketched")
    zero = low_rank(stream(torch.zeros(200, 150), 6), RankRule(rank=6))
    assert (zero.rank, zero.error, zero.kept_energy) == (1, 0.0, 1.0) and not zero.factors.delta().any()
    assert low_rank(stream(torch.zeros(200, 150), 6), RankRule(min_rank=4)).factors.rank == 4
    W = torch.ones(200, 150)
    W[7, 3] = math.nan
    with pytest.raises(LoraforgeError, match="NaN or Inf") as caught:
        low_rank(stream(W, 6), RankRule(), "block.0")
    assert caught.value.where == "block.0"


def test_factors_go_through_their_core() -> None:
    lr = LowRank(torch.randn(30, 4), torch.randn(4, 20), 2.0)
    found, want = low_rank(lr, RankRule(rank=2)), truncate(lr, RankRule(rank=2))
    assert torch.equal(found.factors.B, want.factors.B) and found.error == want.error


def test_signs_and_balance() -> None:
    found = low_rank(Dense(matrix(90, 70, 1 / INDEX[:60])), RankRule(rank=5)).factors
    assert (found.B.gather(0, found.B.abs().argmax(0, keepdim=True)) > 0).all()
    assert torch.allclose(found.B.norm(dim=0), found.A.norm(dim=1))
