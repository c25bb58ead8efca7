from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.linalg.factored import truncate
from loraforge.linalg.flatten import flatten_update
from loraforge.linalg.rank import RankRule
from loraforge.merging.iso_c import merge_layer
from loraforge.merging.spectral_params import IsoParams
from loraforge.types import Dense, LayerInputs, LowRank, Merged
from tests.oracles.factored import relative

from .spectra import SHAPES, check_invariants, check_zeros, deltas, dense, layer, result, thin


def iso_c(inputs: LayerInputs, params: IsoParams) -> Merged:
    """The method and what the runner does after it, without a rank rule."""
    update = merge_layer(inputs, params)
    if isinstance(update, Dense):
        return flatten_update(update, None, params)[0]
    cut = truncate(update, RankRule())
    return flatten_update(cut.factors, cut.spectrum, params)[0]


def flat(W: np.ndarray, value: float | None = None) -> np.ndarray:
    U, s, Vh = thin(W)
    return (s.mean() if value is None else value) * U @ Vh


@pytest.mark.parametrize(("m", "n", "ranks"), SHAPES)
def test_against_dense_arithmetic(m: int, n: int, ranks: tuple[int, ...]) -> None:
    inputs = layer(m, n, ranks, weights=[(-0.5) ** i for i in range(len(ranks))])
    W = sum(deltas(inputs))
    want = flat(W)
    assert relative(result(iso_c, inputs, IsoParams()), want) < 1e-10
    assert relative(result(iso_c, dense(inputs), IsoParams()), want) < 1e-10
    full = flat(W, thin(W)[1].sum() / min(m, n))
    for kind in (inputs, dense(inputs)):
        assert relative(result(iso_c, kind, IsoParams(mean_over="full", alpha=1.5)), 1.5 * full) < 1e-10
    # float32 inputs: rounding of 6e-8 reaches the weakest of 15 directions magnified by its share of the largest.
    rough = layer(m, n, ranks, dtype=torch.float32)
    W = sum(deltas(rough))
    s = thin(W, null=1e-6)[1]
    assert relative(result(iso_c, rough, IsoParams()), flat(W)) < 2e-7 * s[0] / s[-1]


def test_by_hand() -> None:
    """diag(3, 0) + diag(0, 1) has spectrum (3, 1): both become 2."""
    one = LowRank(torch.tensor([[3.0], [0.0]]).double(), torch.tensor([[1.0, 0.0]]).double())
    two = LowRank(torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[0.0, 1.0]]).double())
    found = result(iso_c, LayerInputs("m", [one, two], [1.0, 1.0]), IsoParams())
    assert np.allclose(found, 2 * np.eye(2), atol=1e-14)


@pytest.mark.parametrize("ranks", [(3, 2, 4), (4,), (1, 8)])
def test_invariants(ranks: tuple[int, ...]) -> None:
    for params in (IsoParams(), IsoParams(average="rms", power=0.5), IsoParams(mean_over="full", target_norm="fro")):
        check_invariants(iso_c, params, layer(ranks=ranks))
    check_zeros(iso_c, IsoParams())


def test_nuclear_norm_stays_and_one_adapter_is_flattened() -> None:
    inputs = layer()
    before, after = (
        np.linalg.svd(X, compute_uv=False) for X in (sum(deltas(inputs)), result(iso_c, inputs, IsoParams()))
    )
    assert before.sum() == pytest.approx(after.sum(), rel=1e-13)
    assert np.allclose(after[:9], after[0]) and np.all(after[9:] < 1e-12)
    one = layer(ranks=(4,))
    assert relative(result(iso_c, one, IsoParams()), flat(deltas(one)[0])) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_duplicate_adapter_adds_no_direction(dtype: torch.dtype) -> None:
    inputs = layer(30, 20, (4, 4), dtype=dtype, shared=0)
    twice = LayerInputs("m", [*inputs.factors, inputs.factors[0]], [1.0, 1.0, 1.0])
    found = iso_c(twice, IsoParams())
    assert isinstance(found, LowRank) and found.rank == 8  # of R = 12
    want = flat(sum(deltas(twice)))
    assert relative(found.delta(torch.float64), want) < (1e-10 if dtype == torch.float64 else 2e-6)


def test_the_published_rule_moves_with_the_rounding_and_this_one_does_not() -> None:
    inputs = layer(96, 80, (4,) * 4)
    W = sum(deltas(inputs))
    g = np.random.default_rng(0)
    noise = g.standard_normal(W.shape)
    moved = W + 1e-13 * np.linalg.norm(W) / np.linalg.norm(noise) * noise

    def literal(X: np.ndarray) -> np.ndarray:
        U, s, Vh = np.linalg.svd(X, full_matrices=False)
        return s.mean() * U @ Vh

    assert relative(literal(moved), literal(W)) > 0.1
    # Of the published result, 1 - R / min(m, n) lies in directions that no adapter has.
    U, _, Vh = thin(W)
    inside = np.linalg.norm(U.T @ literal(W) @ Vh.T) ** 2 / np.linalg.norm(literal(W)) ** 2
    assert inside == pytest.approx(16 / 80, rel=1e-6)
