from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.linalg.factored import truncate
from loraforge.linalg.flatten import cut_gap, flatten, flatten_update, support
from loraforge.linalg.rank import RankRule
from loraforge.merging.spectral_params import IsoParams
from loraforge.types import Dense, LowRank
from tests.oracles.factored import relative


def update(m: int = 23, n: int = 17, r: int = 6, dtype: torch.dtype = torch.float64) -> LowRank:
    g = torch.Generator().manual_seed(3)
    B, A = (torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in ((m, r), (r, n)))
    return LowRank(B, A, 0.5)


def flat_dense(W: np.ndarray, k: int, value: float) -> np.ndarray:
    """value * U_k V_k^T from the dense SVD."""
    U, _, Vh = np.linalg.svd(W, full_matrices=False)
    return value * U[:, :k] @ Vh[:k]


def test_by_hand() -> None:
    S = torch.tensor([4.0, 1.0])
    assert flatten(S, (2, 10), IsoParams()).tolist() == pytest.approx([2.5, 2.5])
    assert flatten(S, (5, 10), IsoParams(mean_over="full")).tolist() == pytest.approx([1.0, 1.0])
    assert flatten(S, (5, 10), IsoParams(average="rms")).tolist() == pytest.approx([8.5**0.5] * 2)
    assert flatten(S, (5, 10), IsoParams(average="geo")).tolist() == pytest.approx([2.0, 2.0])
    half = flatten(S, (5, 10), IsoParams(power=0.5))  # (2, 1) times 5 / 3
    assert half.tolist() == pytest.approx([10 / 3, 5 / 3])
    assert flatten(S, (5, 10), IsoParams(power=0.0, alpha=3.0)).tolist() == pytest.approx([12.0, 3.0])
    assert flatten(S, (5, 10), IsoParams(power=0.0, mean_over="full")).tolist() == pytest.approx([4.0, 1.0])


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("average", ["mean", "rms", "geo"])
def test_the_average_that_is_named_stays(average: str, power: float) -> None:
    S = torch.rand(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(descending=True).values
    out = flatten(S, (20, 30), IsoParams(average=average, power=power))
    kept = {"mean": torch.sum, "rms": torch.linalg.vector_norm, "geo": torch.prod}[average]
    assert float(kept(out)) == pytest.approx(float(kept(S)), rel=1e-12)
    assert (out.diff() <= 1e-15).all()


@pytest.mark.parametrize("power", [0.4, 1.0])
@pytest.mark.parametrize("mean_over", ["support", "full"])
def test_target_norms_come_before_alpha(mean_over: str, power: float) -> None:
    S, whole = torch.tensor([3.0, 2.0]), torch.tensor([3.0, 2.0, 1.0])
    params = IsoParams(mean_over=mean_over, power=power, alpha=2.0, target_norm="nuclear")
    assert float(flatten(S, (7, 5), params, whole=whole).sum()) == pytest.approx(12.0)
    params = dataclasses.replace(params, target_norm="fro")
    assert float(flatten(S, (7, 5), params, whole=whole).norm()) == pytest.approx(2 * 14**0.5)
    params = dataclasses.replace(params, target_norm="mean-adapter")
    assert float(flatten(S, (7, 5), params, 0.7).norm()) == pytest.approx(1.4)
    with pytest.raises(LoraforgeError, match="not known"):
        flatten(S, (7, 5), params)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_scales_that_overflow_squares(scale: float) -> None:
    S = torch.tensor([4.0, 1.0], dtype=torch.float64) * scale
    for average, want in (("mean", 2.5), ("rms", 8.5**0.5), ("geo", 2.0)):
        assert float(flatten(S, (4, 4), IsoParams(average=average))[1]) == pytest.approx(want * scale, rel=1e-12)


def test_support_leaves_rounding_out() -> None:
    S = torch.tensor([2.0, 1.0, 1e-8, 1e-13], dtype=torch.float64)
    assert support(S) == 3 and support(S, torch.float32) == 2 and support(S, torch.bfloat16) == 2
    assert support(torch.zeros(4)) == 0 and support(torch.zeros(0)) == 0
    assert flatten(S, (9, 9), IsoParams(), dtype=torch.float32).tolist() == [1.500000005 - 5e-9, 1.5, 0.0, 0.0]


def test_cut_gap() -> None:
    S = torch.tensor([4.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    assert [cut_gap(S, k) for k in (1, 2, 3)] == [0.5, 0.0, 0.25]
    assert cut_gap(S, 4) == cut_gap(S, 0) == cut_gap(torch.zeros(3), 1) == 1.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
@pytest.mark.parametrize("k", [None, 3])
def test_factors_and_matrix_against_the_dense_svd(dtype: torch.dtype, tolerance: float, k: int | None) -> None:
    lr = update(dtype=dtype)
    W = lr.delta(torch.float64).numpy()
    S = np.linalg.svd(W, compute_uv=False)
    kept = k or 6
    want = flat_dense(W, kept, S[:kept].mean())
    cut = truncate(lr, RankRule(rank=k))
    found, numbers = flatten_update(cut.factors, cut.spectrum, IsoParams())
    assert relative(found.delta(torch.float64), want) < tolerance
    assert found.rank == kept and found.B.dtype == dtype
    sbar = S[:kept].mean()
    # Both factors carry sqrt(sbar): their Grams are sbar times the identity.
    assert torch.allclose(found.B.T @ found.B, torch.eye(kept, dtype=dtype) * sbar, atol=20 * tolerance * sbar, rtol=0)
    dense, also = flatten_update(Dense(lr.delta()), None, IsoParams(), rule=RankRule(rank=k))
    assert relative(dense.delta(torch.float64), want) < 2 * tolerance  # its input is rounded once more
    assert also["rank"] == numbers["rank"] == kept
    assert numbers == pytest.approx(
        {
            "rank": kept, "sbar": sbar, "nuclear_before": S[:kept].sum(), "nuclear_after": S[:kept].sum(),
            "frobenius_before": np.linalg.norm(S[:kept]), "frobenius_after": sbar * kept**0.5,
        },
        rel=1e-5,
    )  # fmt: skip


def test_what_was_cut_counts_for_the_target_norm_only() -> None:
    lr = update()
    cut = truncate(lr, RankRule(rank=2))
    found, _ = flatten_update(cut.factors, cut.spectrum, IsoParams(target_norm="fro"))
    assert float(found.delta().norm()) == pytest.approx(float(lr.delta().norm()))
    dense, _ = flatten_update(Dense(lr.delta()), None, IsoParams(target_norm="fro"), rule=RankRule(rank=2))
    assert torch.allclose(dense.delta(), found.delta(), atol=1e-12)


def test_zero_updates() -> None:
    zero = LowRank(torch.zeros(5, 2), torch.ones(2, 4))
    cut = truncate(zero, RankRule(min_rank=2))
    found, numbers = flatten_update(cut.factors, cut.spectrum, IsoParams())
    assert found.rank == 1 and not found.delta().any() and numbers["rank"] == 0 and numbers["sbar"] == 0.0
    dense, _ = flatten_update(Dense(torch.zeros(5, 4)), None, IsoParams())
    assert dense.shape == (5, 4) and not dense.delta().any()


def test_factors_need_their_spectrum() -> None:
    with pytest.raises(LoraforgeError, match="spectrum"):
        flatten_update(update(), None, IsoParams())


def test_null_space_of_the_published_rule_is_noise() -> None:
    """Flattening all min(m, n) directions of an update of low rank moves by its own size when inputs move by 1e-13."""
    W = update(96, 80, 16).delta()
    noise = torch.randn(96, 80, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    moved = W + 1e-13 * W.norm() / noise.norm() * noise

    def literal(X: torch.Tensor) -> np.ndarray:
        U, S, Vh = np.linalg.svd(X.numpy(), full_matrices=False)
        return S.mean() * U @ Vh

    assert relative(literal(moved), literal(W)) > 0.1
    ours = [flatten_update(Dense(X), None, IsoParams())[0].delta().numpy() for X in (W, moved)]
    assert relative(ours[1], ours[0]) < 1e-9
