"""Bytes and flops against counts by hand on small sizes."""

from __future__ import annotations

import inspect

import pytest

import loraforge.kernels as kernels
from loraforge.bench import costs
from loraforge.bench.ceilings import Ceilings
from loraforge.bench.costs import COSTS, Cost
from loraforge.bench.operators import kernel_cases


def operators() -> set[str]:
    """The public functions of `loraforge.kernels` that compute: all but those of `backend`."""
    public = {name: getattr(kernels, name) for name in kernels.__all__}
    backend = "loraforge.kernels.backend"
    return {name for name, value in public.items() if inspect.isfunction(value) and value.__module__ != backend}


@pytest.mark.parametrize("size", ["tiny", "default", "full"])
def test_every_public_operator_has_a_case_and_a_cost(size: str) -> None:
    assert operators() == {case.op for case in kernel_cases(size)} == set(COSTS)


def test_cases_have_names_of_their_own_and_a_gpu_takes_the_full_sizes() -> None:
    for size in ("tiny", "default", "full"):
        names = [case.name for case in kernel_cases(size)]
        assert len(set(names)) == len(names)
    assert [c.name for c in kernel_cases("default", "cuda")] == [c.name for c in kernel_cases("full")]
    assert [c.name for c in kernel_cases("tiny", "cuda")] == [c.name for c in kernel_cases("tiny")]


@pytest.mark.parametrize(
    ("found", "read", "written", "flops"),
    [
        # H (2, 10) and f (10,) of 4 bytes; three dot products of ten terms
        (costs.anderson_dots(2, 10), 3 * 10 * 4, 3 * 8, 3 * 10 * 2),
        # X and F (2, 10), two coefficients; per entry of X: x a, + , f a b, +
        (costs.anderson_mix(2, 10), 40 * 4 + 16, 10 * 4, 20 * 4),
        # Y (5, 3), M (3, 3) float64; y M: 9 multiply-adds a row, and y: 3
        (costs.dcs_variance(5, 3), 15 * 4 + 72, 40, 5 * 2 * 9 + 5 * 2 * 3),
        (costs.dcs_weights(5), 40, 40 + 24, 200),
        (costs.dcs_batch(2, 5, 3), 2 * (60 + 72), 2 * (40 + 24), 2 * (120 + 200)),
        # 6 of 10 rows of 4 bfloat16, a mask of 10 bytes, 6 weights; float32 out
        (costs.cov_pack(10, 4, 6, 2, 4, True), 10 + 6 * 4 * 2 + 6 * 4, 6 * 4 * 4, 24),
        (costs.cov_pack(10, 4, 6, 4, 4, False), 10 + 96, 96, 0),
        (costs.cov_fold_(3, 5, False), 15 * (4 + 8), 15 * 8, 15),
        # the triangle of 4 x 4 has ten entries
        (costs.cov_fold_(4, 4, True), 10 * (4 + 8), 16 * 8, 10),
        # X (7, 3) bfloat16, acc (3, 3): six distinct products of seven terms
        (costs.gram_(7, 3, 2), 42 + 72, 72, 6 * 7 * 2),
        (costs.gram_(7, 3, 2, rows=4), 24 + 72, 72, 6 * 4 * 2),
        (costs.batched_core_svd(2, 3), 2 * 9 * 4, 2 * 21 * 4, 22 * 2 * 27),
        (costs.jacobi_svd(2, 3, 8), 2 * 9 * 8, 2 * 21 * 8, 22 * 2 * 27),
        (costs.core_svd_stack(2, 3), 2 * 9 * 4, 2 * 21 * 4, 22 * 2 * 27),
        (costs.gram_factor(2, 3), 2 * 9 * 8, 2 * 2 * 9 * 8, 36),
        (costs.pick_rank(2, 3), 24, 16, 18),
        # two columns of U (4, 3), two rows of Vh (3, 5), two values; bfloat16 out
        (costs.scale_write(4, 5, 3, 2, 4, 2), (8 + 10 + 2) * 4, (8 + 10) * 2, 20),
        (costs.consistency_forward(6, 3, 4, 2), 6 + 2 * 12 * 2, 8, 48),
        (costs.consistency_backward(6, 3, 4, 2), 6 + 2 * 12 * 2 + 8, 18 * 2, 36),
        (costs.consistency_sum(6, 3, 4, 2), 54 + 62, 8 + 36, 84),
        (costs.consistency_loss(5, 6, 3, 4, 2), 5 * 116, 5 * 44, 5 * 84),
        (costs.entry_merge(2, 3, 4, 5), 2 * 7 * 5 * 8, 12 * 4, 2 * 14 * 12),
        (costs.entry_counts_(3, 4, 5, 8), 7 * 5 * 8 + 64, 64, 10 * 12),
        (costs.drop_rescale_(3, 4), 48, 48, 12),
    ],
)
def test_hand_counts(found: Cost, read: int, written: int, flops: int) -> None:
    assert (found.read, found.written, found.flops) == (read, written, flops)
    assert found.bytes == read + written


def test_the_ceiling_that_binds_decides() -> None:
    ceilings = Ceilings(100.0, {"float32": 10.0, "float64": 5.0, "bfloat16": 2.0})
    assert ceilings.shortest(Cost(150, 50, 10, "float32")) == 2.0  # bandwidth: 200 / 100
    assert ceilings.shortest(Cost(5, 5, 10, "float64")) == 2.0  # arithmetic: 10 / 5
    assert ceilings.shortest(Cost(0, 0, 40, "bfloat16")) == 4.0  # float32 is faster there
