from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraforge.errors import LoraforgeError
from loraforge.linalg.bases import sides
from loraforge.linalg.factored import decompose, inner, norm, pad, stack, truncate, truncate_many
from loraforge.linalg.rank import RankRule
from loraforge.types import LowRank
from tests.oracles import factored as oracle

# What the house promises of a merge: rounding of float32 factors, and next to nothing in float64.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-10}
CASES = [
    (64, 48, (4, 8)),
    (48, 64, (8, 4)),
    (5, 7, (4, 4, 4)),
    (1, 17, (2, 3)),
    (17, 1, (1, 1)),
    (97, 129, (7, 1, 3)),
    (33, 97, (8,) * 8),
    (96, 80, (32, 32)),
]
WEIGHTS = (1.0, -0.7, 0.3, 2.0, 0.5, -0.1, 1.5, 0.25)


def draw(m: int, n: int, rank: int, dtype: torch.dtype, seed: int = 0, scaling: float = 1.0) -> LowRank:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    B = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    A = torch.randn(rank, n, generator=generator, dtype=torch.float64)
    return LowRank(B.to(dtype), A.to(dtype), scaling)


def pairs(m: int, n: int, ranks: tuple[int, ...], dtype: torch.dtype) -> list[tuple[float, LowRank]]:
    return [(w, draw(m, n, r, dtype, i, 16.0 / r)) for i, (w, r) in enumerate(zip(WEIGHTS, ranks, strict=False))]


def dense(found: list[tuple[float, LowRank]]) -> np.ndarray:
    return oracle.dense_sum([(w, p.scaling, p.B.double().numpy(), p.A.double().numpy()) for w, p in found])


def product(lr: LowRank) -> np.ndarray:
    return lr.delta(torch.float64).numpy()


@pytest.mark.parametrize("backend", ["qr", "gram", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n", "ranks"), CASES)
def test_equals_the_dense_oracle(m: int, n: int, ranks: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    found = pairs(m, n, ranks, dtype)
    exact, tolerance = dense(found), TOLERANCE[dtype]
    size = np.linalg.norm(exact)
    lr = stack(found)
    assert lr.rank == sum(ranks) and lr.scaling == 1.0 and lr.B.dtype == dtype
    assert oracle.relative(product(lr), exact) < tolerance
    whole = truncate(lr, RankRule(), backend)
    assert oracle.relative(product(whole.factors), exact) < tolerance
    assert whole.kept_energy == pytest.approx(1.0) and whole.error < tolerance * size
    values = oracle.spectrum(exact)
    assert np.allclose(whole.spectrum[: len(values)], values[: len(whole.spectrum)], atol=tolerance * values[0])
    for k in {1, max(1, whole.rank // 2)}:
        best, error = oracle.best_rank_k(exact, k)
        cut = truncate(lr, RankRule(rank=k), backend)
        assert cut.rank == cut.factors.rank == k and cut.factors.B.dtype == dtype
        assert abs(cut.error - error) < tolerance * size
        # The optimum is compared by its error: near ties make the approximation itself ill-conditioned.
        assert abs(np.linalg.norm(product(cut.factors) - exact) - error) < tolerance * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decompose_gives_orthonormal_vectors(dtype: torch.dtype) -> None:
    for m, n, ranks in CASES:
        found = pairs(m, n, ranks, dtype)
        d = decompose(stack(found))
        left, right = d.Q_l @ d.U, d.Vh @ d.Q_a.T
        eye = torch.eye(d.S.numel(), dtype=torch.float64)
        # The Gram form may lose eps64 * cond^2 of orthogonality, bounded by 1e-8 for float32 factors.
        slack = 1e-7 if dtype == torch.float32 else 1e-11
        assert (left.T @ left - eye).abs().max() < slack and (right @ right.T - eye).abs().max() < slack
        assert oracle.relative((left * d.S) @ right, dense(found)) < TOLERANCE[dtype]


def test_hand_sized_example() -> None:
    # diag(3, 4) as a sum of two rank-1 updates; rank 1 keeps the 4 and 16/25 of the energy.
    one = LowRank(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.5, 0.0]]), 2.0)
    two = LowRank(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0, 1.0]]), 1.0)
    cut = truncate(stack([(1.0, one), (2.0, two)]), RankRule(rank=1))
    assert torch.allclose(cut.factors.delta(), torch.tensor([[0.0, 0.0], [0.0, 4.0]]), atol=1e-6)
    assert cut.spectrum.tolist() == pytest.approx([4.0, 3.0]) and cut.error == pytest.approx(3.0)
    assert cut.kept_energy == pytest.approx(16 / 25)
    assert cut.factors.B[1, 0] == pytest.approx(2.0) and cut.factors.A[0, 1] == pytest.approx(2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_of_adapters_does_not_matter(dtype: torch.dtype) -> None:
    found = pairs(40, 30, (4, 6, 3), dtype)
    rule = RankRule(rank=5)
    one, other = truncate(stack(found), rule), truncate(stack(found[::-1]), rule)
    assert oracle.relative(product(other.factors), product(one.factors)) < TOLERANCE[dtype]
    # Signs are fixed on the large vectors, so the factors themselves agree as well where no values coincide.
    assert torch.allclose(one.factors.B, other.factors.B, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(c=st.floats(1e-3, 1e3), seed=st.integers(0, 100), rank=st.integers(1, 9))
def test_factorisation_does_not_matter(c: float, seed: int, rank: int) -> None:
    one, other = draw(23, 31, rank, torch.float64, seed, 0.5), draw(23, 31, 4, torch.float64, seed + 1)
    moved = LowRank(one.B * c, one.A / c, one.scaling)
    rule = RankRule(rank=3)
    a = truncate(stack([(1.0, one), (-0.5, other)]), rule)
    b = truncate(stack([(1.0, moved), (-0.5, other)]), rule)
    assert torch.allclose(a.spectrum, b.spectrum, rtol=0, atol=1e-10 * float(a.spectrum[0]))
    assert a.error == pytest.approx(b.error, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_adapter_gives_its_own_delta(dtype: torch.dtype) -> None:
    lr = draw(30, 20, 6, dtype, scaling=2.0)
    cut = truncate(stack([(1.0, lr)]), RankRule(rank=6))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert cut.factors.B.dtype == compute and cut.rank == 6
    assert oracle.relative(product(cut.factors), product(lr)) < TOLERANCE[compute]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dependent_columns_fall_back_and_keep_their_rank(dtype: torch.dtype) -> None:
    lr = draw(50, 40, 8, dtype, scaling=0.3)
    twice = stack([(0.3, lr), (0.7, lr)])
    left, _ = sides([twice], "gram")
    assert left.solve is None, "equal adapters make the Gram matrix singular: QR has to take over"
    cut = truncate(twice, RankRule())
    assert cut.rank == 8 and oracle.relative(product(cut.factors), product(lr)) < TOLERANCE[dtype]


def test_nearly_dependent_columns_lose_no_accuracy() -> None:
    lr = draw(80, 60, 8, torch.float64)
    near = LowRank(lr.B + 1e-5 * draw(80, 60, 8, torch.float64, 7).B, lr.A, 1.0)
    found = [(1.0, lr), (-1.0, near)]
    assert oracle.relative(product(truncate(stack(found), RankRule(), "auto").factors), dense(found)) < 1e-10


def test_a_batch_mixes_forms_by_module() -> None:
    good, single = draw(50, 40, 8, torch.float64), draw(50, 40, 4, torch.float64)
    updates = [good, stack([(0.5, single), (0.5, single)]), LowRank(good.B, good.A.flip(0), 1.0)]
    left, _ = sides(updates, "auto")
    eye = torch.eye(8, dtype=torch.float64)
    assert left.solve is not None
    assert torch.equal(left.solve[1], eye) and not torch.equal(left.solve[0], eye)
    for update, cut in zip(updates, truncate_many(updates, RankRule()), strict=True):
        assert oracle.relative(product(cut.factors), product(update)) < 1e-10


def test_zero_delta_keeps_the_least_rank() -> None:
    zero = LowRank(torch.zeros(12, 4), torch.randn(4, 9), 1.0)
    cut = truncate(zero, RankRule(rank=3))
    assert (cut.rank, cut.error, cut.kept_energy) == (1, 0.0, 1.0) and not cut.factors.delta().any()
    wide = truncate(zero, RankRule(min_rank=6))
    assert wide.rank == wide.factors.rank == 6 and not wide.factors.delta().any()
    cancelled = draw(12, 9, 4, torch.float64)
    assert truncate(stack([(1.0, cancelled), (-1.0, cancelled)]), RankRule()).error < 1e-12


def test_signs_and_balance_of_the_factors() -> None:
    cut = truncate(stack(pairs(40, 30, (4, 6), torch.float64)), RankRule(rank=5)).factors
    top = cut.B.gather(0, cut.B.abs().argmax(0, keepdim=True))
    assert (top > 0).all()
    assert torch.allclose(cut.B.norm(dim=0), cut.A.norm(dim=1))
    assert cut.B.is_contiguous() and cut.A.is_contiguous()


def test_many_modules_with_their_own_rules() -> None:
    shapes = [(40, 30, (4, 6)), (30, 40, (4, 6)), (40, 30, (4, 6)), (40, 30, (3, 2)), (8, 3, (4, 4))]
    updates = [stack(pairs(m, n, ranks, torch.float64)) for m, n, ranks in shapes]
    rules = [RankRule(rank=2), RankRule(), RankRule(energy=0.9), RankRule(max_rank=1), RankRule()]
    many = truncate_many(updates, rules)
    for one, update, rule in zip(many, updates, rules, strict=True):
        alone = truncate(update, rule)
        assert one.rank == alone.rank and one.factors.shape == update.shape
        assert oracle.relative(product(one.factors), product(alone.factors)) < 1e-12
    with pytest.raises(LoraforgeError, match="differ in number"):
        truncate_many(updates, rules[:2])
    assert truncate_many([], RankRule()) == []


def test_same_bits_for_any_number_of_threads() -> None:
    updates = [stack(pairs(60, 50, (5, 7), torch.float32)) for _ in range(9)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(truncate_many(updates, RankRule(rank=4)))
            assert torch.get_num_threads() == threads, "the caller's setting is put back"
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one.factors.B, two.factors.B) and torch.equal(one.factors.A, two.factors.A)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_inner_products_and_norms(dtype: torch.dtype) -> None:
    a, b = draw(30, 20, 4, dtype, 1, 0.5), draw(30, 20, 7, dtype, 2, -2.0)
    exact_a, exact_b = product(a), product(b)
    assert inner(a, b) == pytest.approx(float((exact_a * exact_b).sum()), rel=1e-12)
    assert inner(a, b) == pytest.approx(inner(b, a), rel=1e-12)
    assert norm(a) == pytest.approx(float(np.linalg.norm(exact_a)), rel=1e-12)
    with pytest.raises(LoraforgeError, match="different shapes"):
        inner(a, draw(20, 30, 4, dtype))


def test_pad_changes_no_delta() -> None:
    lr = draw(9, 7, 3, torch.float32, scaling=2.0)
    assert torch.equal(pad(lr, 5).delta(), lr.delta()) and pad(lr, 5).rank == 5
    with pytest.raises(LoraforgeError, match="cannot lower"):
        pad(lr, 2)


def test_refusals() -> None:
    lr = draw(9, 7, 3, torch.float32)
    with pytest.raises(LoraforgeError, match="no adapter has this module"):
        stack([])
    with pytest.raises(LoraforgeError, match="different shapes"):
        stack([(1.0, lr), (1.0, draw(7, 9, 3, torch.float32))])
    for bad in (float("nan"), float("inf")):
        for backend in ("qr", "auto"):
            B = lr.B.clone()
            B[4, 1] = bad
            with pytest.raises(LoraforgeError, match="NaN or Inf"):
                truncate(LowRank(B, lr.A), RankRule(), backend)


def test_mixed_dtypes_compute_in_the_widest() -> None:
    low, high = draw(9, 7, 3, torch.bfloat16), draw(9, 7, 3, torch.float64)
    assert stack([(1.0, low)]).B.dtype == torch.float32
    assert stack([(1.0, low), (1.0, high)]).A.dtype == torch.float64
