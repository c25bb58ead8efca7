from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError, UsageError
from loraforge.linalg.factored import truncate
from loraforge.linalg.randomized import (
    Sketch,
    exact_is_cheaper,
    gaussian,
    orthonormal,
    project,
    randomized_svd,
    range_basis,
)
from loraforge.linalg.rank import RankRule
from loraforge.linalg.sketched_batch import randomized_svd_many, sketch_batches
from loraforge.types import LowRank
from tests.oracles import factored as oracle

NEVER = Sketch(exact="never")


def update(m: int, n: int, R: int, decay: float = 1.0, dtype: torch.dtype = torch.float64) -> LowRank:
    """Singular values close to i^-decay."""
    g = torch.Generator().manual_seed(m + n + R)
    B = torch.linalg.qr(torch.randn(m, R, generator=g, dtype=torch.float64)).Q
    A = torch.linalg.qr(torch.randn(n, R, generator=g, dtype=torch.float64)).Q.T
    S = torch.arange(1, B.shape[1] + 1, dtype=torch.float64) ** -decay
    rank = min(B.shape[1], A.shape[0])
    return LowRank((B * S)[:, :rank].to(dtype), A[:rank].to(dtype), 2.0)


@pytest.mark.parametrize(("m", "n"), [(60, 90), (90, 60)])
@pytest.mark.parametrize("rule", [RankRule(rank=5), RankRule(energy=0.9), RankRule(fro_error=0.3), RankRule(ratio=9.5)])
def test_a_sketch_is_close_to_the_best_approximation_and_knows_its_error(m: int, n: int, rule: RankRule) -> None:
    lr = update(m, n, 50)
    found, best = randomized_svd(lr, rule, NEVER, "m").account, truncate(lr, rule)
    assert found is not None and found.rank == best.rank
    true = np.linalg.norm(found.factors.delta().numpy() - lr.delta().numpy())
    # The error is known although only part of the spectrum was computed.
    assert abs(found.error - true) < 1e-10 and found.spectrum.numel() < 50
    assert abs(found.kept_energy - (1 - (true / np.linalg.norm(lr.delta().numpy())) ** 2)) < 1e-12
    assert best.error <= found.error + 1e-12 and found.error < 1.01 * best.error


def test_a_sketch_of_full_width_is_exact() -> None:
    for m, n, R in ((30, 20, 8), (6, 40, 12), (17, 1, 3)):
        lr = update(m, n, R)
        found = randomized_svd(lr, RankRule(), NEVER, "m")
        assert oracle.relative(found.delta().numpy(), lr.delta().numpy()) < 1e-10
        assert found.account is not None and found.account.kept_energy == 1.0 and not found.exact


def test_it_widens_until_the_rule_is_met() -> None:
    """A flat spectrum of 100: 95 % needs 95 directions, far beyond the first sketch of 40."""
    lr = update(150, 140, 100, decay=0.0)
    found = randomized_svd(lr, RankRule(energy=0.949), NEVER, "m")
    assert found.rank == 95
    assert randomized_svd(lr, RankRule(energy=0.949, max_rank=7), NEVER, "m").rank == 7
    assert randomized_svd(lr, RankRule(min_rank=50, energy=0.1), NEVER, "m").rank == 50


def test_float32_and_draws() -> None:
    lr = update(80, 70, 40, dtype=torch.float32)
    one, two = (randomized_svd(lr, RankRule(rank=30), NEVER, "m") for _ in range(2))
    assert one.B.dtype == torch.float32 and torch.equal(one.B, two.B) and torch.equal(one.A, two.A)
    state = torch.random.get_rng_state()
    other = randomized_svd(lr, RankRule(rank=4), Sketch(0, 0, 1, "never"), "m")
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is not touched"
    assert not torch.allclose(
        other.delta(), randomized_svd(lr, RankRule(rank=4), Sketch(0, 0, 2, "never"), "m").delta()
    )
    assert torch.equal(gaussian(5, 3, 1, "a"), gaussian(5, 3, 1, "a"))
    assert not torch.equal(gaussian(5, 3, 1, "a"), gaussian(5, 3, 1, "b"))


def test_the_range_finder_equals_that_of_torch() -> None:
    """torch.svd_lowrank on the dense matrix, with the draws of its own generator."""
    lr = update(60, 45, 30)
    torch.manual_seed(3)
    U, S, V = torch.svd_lowrank(lr.delta(), 6, niter=2)
    torch.manual_seed(3)
    omega = torch.randn(45, 6, dtype=torch.float64)
    B, A = lr.folded().B, lr.A
    u, s, vh = project(B, A, range_basis(B, A, omega, 2))
    assert torch.allclose(s, S, atol=1e-12)
    assert torch.allclose((u * s) @ vh, (U * S) @ V.T, atol=1e-12)


def test_the_exact_form_is_taken_where_it_is_cheaper() -> None:
    """Measured: two adapters of rank 32 are far cheaper exactly, 32 of them are not."""
    assert exact_is_cheaper(4096, 4096, 64, 40, 2) and not exact_is_cheaper(4096, 4096, 1024, 40, 2)
    lr = update(60, 50, 20)
    auto = randomized_svd(lr, RankRule(rank=5), Sketch(), "m")
    assert auto.exact and torch.equal(auto.B, truncate(lr, RankRule(rank=5)).factors.B)
    assert not randomized_svd(update(300, 290, 280), RankRule(rank=2), Sketch(2, 1), "m").exact
    assert randomized_svd(update(300, 290, 280), RankRule(rank=2), Sketch(2, 1, exact="always"), "m").exact


def test_a_nuclear_share_is_exact_or_refused() -> None:
    lr = update(60, 50, 20)
    assert randomized_svd(lr, RankRule(nuclear=0.5), Sketch(), "m").exact
    with pytest.raises(UsageError, match="every singular value"):
        randomized_svd(lr, RankRule(nuclear=0.5), NEVER, "m")


@pytest.mark.parametrize("exact", ["auto", "never"])
def test_zero_and_bad_input(exact: str) -> None:
    zero = LowRank(torch.zeros(9, 3), torch.ones(3, 7))
    found = randomized_svd(zero, RankRule(energy=0.9, min_rank=4), Sketch(exact=exact), "m")
    assert found.rank == 4 and not found.delta().any() and found.account.error == 0.0
    for bad in (float("nan"), float("inf")):
        B = torch.ones(9, 3)
        B[1, 1] = bad
        with pytest.raises(LoraforgeError, match="NaN or Inf"):
            randomized_svd(LowRank(B, torch.ones(3, 7)), RankRule(rank=1), Sketch(exact=exact), "m")


def batch_of_updates(dtype: torch.dtype) -> list[LowRank]:
    flat = update(150, 140, 100, decay=0.0, dtype=dtype)
    zero = LowRank(torch.zeros(150, 100, dtype=dtype), flat.A)
    return [
        update(150, 140, 100, dtype=dtype),
        flat,
        zero,
        update(90, 140, 30, dtype=dtype),
        update(150, 140, 100, 2.0, dtype),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", [RankRule(rank=5), RankRule(energy=0.9), RankRule(max_rank=7), RankRule(ratio=9.5)])
@pytest.mark.parametrize("exact", ["auto", "never"])
def test_a_batch_gives_what_its_modules_give(dtype: torch.dtype, rule: RankRule, exact: str) -> None:
    """The same draws and widenings, and in float32 another way to the same bases."""
    updates, sketch = batch_of_updates(dtype), Sketch(exact=exact)
    words = [f"m{i}" for i in range(len(updates))]
    alone = [randomized_svd(one, rule, sketch, word) for one, word in zip(updates, words, strict=True)]
    tolerance = 2e-6 if dtype == torch.float32 else 1e-10
    for found in (sketch_batches(updates, rule, sketch, words), randomized_svd_many(updates, rule, sketch, words)):
        for one, other in zip(found, alone, strict=True):
            assert one.rank == other.rank and one.exact == other.exact and one.B.dtype == dtype
            assert one.B.is_contiguous() and one.A.is_contiguous()
            assert one.account is not None and other.account is not None
            size = float(other.delta().norm())
            assert float((one.delta() - other.delta()).norm()) <= tolerance * size
            assert one.account.error == pytest.approx(other.account.error, abs=tolerance * size)
            assert one.account.kept_energy == pytest.approx(other.account.kept_energy, abs=tolerance)
            assert one.account.spectrum.numel() == other.account.spectrum.numel()


def test_a_batch_refuses_what_a_module_refuses() -> None:
    updates = batch_of_updates(torch.float32)
    with pytest.raises(UsageError, match="every singular value"):
        sketch_batches(updates, RankRule(nuclear=0.5), NEVER, ["m"] * 5)
    updates[3].A[2, 2] = float("inf")
    with pytest.raises(LoraforgeError, match="NaN or Inf(.|\n)*of three"):
        sketch_batches(updates, RankRule(rank=2), NEVER, ["a", "b", "c", "of three", "d"])
    assert sketch_batches([], RankRule(), NEVER, []) == []


def test_two_passes_of_cholesky_make_columns_orthonormal() -> None:
    g = torch.Generator().manual_seed(3)
    Y = torch.randn(2, 90, 12, generator=g, dtype=torch.float64) * torch.logspace(0, -9, 12, dtype=torch.float64)
    Y[1, :, 6:] = Y[1, :, :6] * 3.0
    mixed = Y @ torch.randn(12, 12, generator=g, dtype=torch.float64)
    for block in (Y, mixed):
        Q, T = orthonormal(block, gram=True)
        squares = Q.mT @ Q
        on = squares.diagonal(dim1=-2, dim2=-1)
        assert (squares - torch.diag_embed(on)).abs().max() < 1e-14 and ((on - 1).abs().minimum(on) < 1e-14).all()
        # What was cut off is less than 1e-7 of a column.
        assert ((block - Q @ T).norm(dim=1) <= 3e-7 * block.norm(dim=1)).all()
    assert int((orthonormal(Y, gram=True)[0][1].norm(dim=0) > 0.5).sum()) == 6
    assert orthonormal(Y[0], gram=True)[0].shape == (90, 12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_the_device(dtype: torch.dtype) -> None:
    updates, rule, sketch = batch_of_updates(dtype), RankRule(energy=0.9), Sketch(exact="never")
    words = [f"m{i}" for i in range(len(updates))]
    here = randomized_svd_many([one.to(device="cuda") for one in updates], rule, sketch, words)
    for found, other in zip(here, randomized_svd_many(updates, rule, sketch, words), strict=True):
        assert found.B.is_cuda and found.rank == other.rank
        size = max(float(other.delta().norm()), 1.0)
        assert float((found.delta().cpu() - other.delta()).norm()) <= (2e-6 if dtype == torch.float32 else 1e-10) * size
