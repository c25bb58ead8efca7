"""The way of a GPU through truncation, run on the CPU; tests/linalg/test_resident_gpu.py runs it where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.linalg import resident
from loraforge.linalg.factored import stack, truncate_many
from loraforge.linalg.rank import RankRule, choose
from loraforge.linalg.resident import choose_many, truncate_resident
from loraforge.types import LowRank
from tests.linalg.test_factored import CASES, TOLERANCE, dense, draw, pairs, product
from tests.oracles import factored as oracle

RULES = [
    RankRule(),
    RankRule(rank=3),
    RankRule(energy=0.9),
    RankRule(energy=1.0, max_rank=4),
    RankRule(nuclear=0.5),
    RankRule(ratio=3.0),
    RankRule(fro_error=0.3),
    RankRule(fro_error=0.0),
    RankRule(energy=0.1, min_rank=5),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n", "ranks"), CASES)
def test_equals_the_dense_oracle(m: int, n: int, ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    found = pairs(m, n, ranks, dtype)
    exact, tolerance = dense(found), TOLERANCE[dtype]
    size = np.linalg.norm(exact)
    lr = stack(found)
    scaled = LowRank(lr.B, lr.A * 0.25, 4.0)
    for update in (lr, scaled):
        (whole,) = truncate_resident([update], [RankRule()])
        assert oracle.relative(product(whole.factors), exact) < tolerance
        assert whole.kept_energy == pytest.approx(1.0) and whole.error < tolerance * size
        k = max(1, whole.rank // 2)
        best, error = oracle.best_rank_k(exact, k)
        (cut,) = truncate_resident([update], [RankRule(rank=k)])
        assert cut.rank == cut.factors.rank == k and cut.factors.B.dtype == dtype
        assert cut.factors.B.is_contiguous() and cut.factors.A.is_contiguous()
        assert abs(cut.error - error) < tolerance * size
        assert abs(np.linalg.norm(product(cut.factors) - exact) - error) < tolerance * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mixed_window_gives_what_the_cpu_gives(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, rules and scalings differ; equal, near, zero and cancelling adapters are among them."""
    a, b = draw(50, 40, 6, dtype, 1, 0.5), draw(50, 40, 6, dtype, 2)
    near = LowRank(a.B + 1e-5 * b.B, a.A, 0.5)
    updates = [
        stack([(0.3, a), (0.7, b)]),
        stack([(0.3, a), (0.7, a)]),
        draw(50, 40, 12, dtype, 3, -2.0),
        stack([(1.0, a), (-0.9, near)]),
        stack([(1.0, a), (1.0, LowRank(torch.zeros_like(b.B), b.A))]),
        LowRank(torch.zeros(50, 12, dtype=dtype), torch.ones(12, 40, dtype=dtype)),
        draw(8, 40, 12, dtype, 4),
        draw(50, 40, 12, dtype, 5),
        stack([(1.0, a), (-1.0, a)]),
    ]
    rules = [RULES[i % len(RULES)] for i in range(len(updates))]
    for window in (resident.WINDOW_BYTES, 20_000):
        monkeypatch.setattr(resident, "WINDOW_BYTES", window)
        for rule in (rules, [RankRule(min_rank=14)] * len(updates), [RankRule(energy=0.9)] * len(updates)):
            for one, other, update in zip(
                truncate_resident(updates, rule), truncate_many(updates, rule), updates, strict=True
            ):
                size = float(update.B.double().norm() * update.A.double().norm()) * abs(update.scaling)
                assert np.linalg.norm(product(one.factors) - product(other.factors)) <= TOLERANCE[dtype] * max(
                    size, 1.0
                )
                assert one.spectrum.device.type == "cpu" and abs(one.error - other.error) <= 1e-7 * max(size, 1.0)
                # A sum that cancels is rounding alone, of which each way has its own.
                if np.linalg.norm(product(update)) > 1e-5 * size:
                    assert one.rank == other.rank == one.factors.rank
                    assert one.kept_energy == pytest.approx(other.kept_energy, abs=1e-9)


def test_float64_factors_keep_digits_that_float32_ones_do_not_have() -> None:
    """Columns that differ by 1e-9 of themselves: dropped as rounding, or found by QR."""
    lr, other = draw(60, 50, 4, torch.float64), draw(60, 50, 4, torch.float64, 9)
    near = stack([(1.0, lr), (-1.0, LowRank(lr.B + 1e-9 * other.B, lr.A))])
    (cut,) = truncate_resident([near], [RankRule()])
    exact = -1e-9 * product(LowRank(other.B, lr.A))
    assert oracle.relative(product(cut.factors), exact) < 1e-5


def test_order_of_signs_and_balance() -> None:
    (cut,) = truncate_resident([stack(pairs(40, 30, (4, 6), torch.float64))], [RankRule(rank=5)])
    top = cut.factors.B.gather(0, cut.factors.B.abs().argmax(0, keepdim=True))
    assert (top > 0).all()
    assert torch.allclose(cut.factors.B.norm(dim=0), cut.factors.A.norm(dim=1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(value: float) -> None:
    good, bad = draw(20, 15, 4, torch.float32), draw(20, 15, 4, torch.float32, 1)
    bad.A[1, 3] = value
    with pytest.raises(LoraforgeError, match="NaN or Inf"):
        truncate_resident([good, bad], [RankRule()] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_ranks_are_those_of_choose(rule: RankRule, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    S = torch.rand(40, 9, generator=generator, dtype=torch.float64).sort(-1, descending=True).values
    S[1], S[2, 1:], S[3, 4:], S[4] = 0.0, 0.0, 1e-9, 1.0
    S[5] = torch.tensor([3.0, 1, 0, 0, 0, 0, 0, 0, 0])  # 0.9 of the energy exactly
    S[6] *= 1e-200
    for m, n in ((50, 40), (4, 40)):
        wanted = [choose(row.to(dtype), rule, m, n) for row in S]
        assert choose_many(S.numpy(), [rule] * len(S), m, n, dtype).tolist() == wanted


def test_ranks_by_rules_that_differ_and_of_empty_spectra() -> None:
    S = np.array([[3.0, 2.0, 1.0]] * 3)
    rules = [RankRule(rank=2), RankRule(), RankRule(rank=1)]
    assert choose_many(S, rules, 9, 9, torch.float64).tolist() == [2, 3, 1]
    assert choose_many(np.zeros((2, 0)), [RankRule(min_rank=4)] * 2, 3, 9, torch.float64).tolist() == [3, 3]


def test_nothing_to_do() -> None:
    assert truncate_resident([], []) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_on_the_device(dtype: torch.dtype) -> None:
    updates = [
        draw(m, n, r, dtype, seed, 0.5)
        for seed, (m, n, r) in enumerate([(300, 200, 64), (300, 200, 64), (90, 400, 33)] * 4)
    ]
    updates.append(stack([(0.3, updates[0]), (0.7, updates[0])]))
    rules = [RULES[i % len(RULES)] for i in range(len(updates))]
    found = truncate_many([update.to(device="cuda") for update in updates], rules)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for one, other in zip(found, truncate_many(updates, rules), strict=True):
        assert one.rank == other.rank and one.factors.B.is_cuda and one.factors.B.dtype == compute
        back = LowRank(one.factors.B.cpu(), one.factors.A.cpu())
        assert oracle.relative(product(back), product(other.factors)) < TOLERANCE[compute]
        assert one.error == pytest.approx(other.error, abs=1e-7 * float(other.spectrum[0]))
