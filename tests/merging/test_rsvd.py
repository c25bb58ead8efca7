from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError, UsageError
from loraforge.linalg.randomized import Approximation, gaussian
from loraforge.merging.document_params import RsvdParams
from loraforge.merging.rsvd import merge_layer
from loraforge.types import Dense, LayerInputs, LowRank
from tests.oracles import factored as oracle

from .layers import exact, layer, product

FULL = RsvdParams(energy=1.0, max_rank=64)


def account(merged: LowRank) -> Approximation:
    assert isinstance(merged, Approximation) and merged.account is not None
    return merged


@pytest.mark.parametrize("how", ["auto", "always", "never"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
def test_everything_kept_is_the_weighted_sum(how: str, dtype: torch.dtype, tolerance: float) -> None:
    for inputs in (layer(dtype=dtype), layer((20, 9), (0.5, 0.5), dtype), layer(gap=1, dtype=dtype)):
        merged = merge_layer(inputs, RsvdParams(energy=1.0, max_rank=64, exact=how))
        assert merged.B.dtype == dtype and merged.rank <= 17
        assert oracle.relative(product(merged), exact(inputs)) < tolerance


@pytest.mark.parametrize("how", ["always", "never"])
def test_the_rank_rule_is_the_methods_own(how: str) -> None:
    inputs = layer((8, 8), (0.5, 0.5))
    delta = exact(inputs)
    energy = oracle.energy_rank(delta, 0.93)
    assert merge_layer(inputs, RsvdParams(energy=0.93, exact=how)).rank == energy > 4
    assert merge_layer(inputs, RsvdParams(energy=0.01, exact=how)).rank == 4
    assert merge_layer(inputs, RsvdParams(max_rank=3, exact=how)).rank == 3
    assert merge_layer(inputs, RsvdParams(rank=2, exact=how)).rank == 2
    assert merge_layer(inputs, RsvdParams(min_rank=5, max_rank=5, exact=how)).rank == 5
    for k in (2, 7):
        merged = account(merge_layer(inputs, RsvdParams(rank=k, exact=how)))
        best, error = oracle.best_rank_k(delta, k)
        assert merged.exact == (how == "always")
        assert merged.account.error >= error - 1e-12 and merged.account.error < 1.001 * error
        assert oracle.relative(product(merged), best) < (1e-10 if how == "always" else 0.1)


def test_few_adapters_take_the_exact_form() -> None:
    assert account(merge_layer(layer(), RsvdParams())).exact
    assert not account(merge_layer(layer(), RsvdParams(exact="never"))).exact


def test_draws_depend_on_seed_and_module_only() -> None:
    inputs = layer((20, 20), (0.5, 0.5), m=90, n=80)
    params = RsvdParams(rank=3, exact="never", power_iterations=0, oversampling=0)
    one, two = merge_layer(inputs, params), merge_layer(inputs, params)
    assert torch.equal(one.B, two.B) and torch.equal(one.A, two.A)
    swapped = LayerInputs("m", inputs.factors[::-1], inputs.weights)
    assert oracle.relative(product(merge_layer(swapped, params)), product(one)) < 1e-10
    for other in (
        merge_layer(inputs, RsvdParams(rank=3, exact="never", power_iterations=0, oversampling=0, seed=1)),
        merge_layer(LayerInputs("other", inputs.factors, inputs.weights), params),
    ):
        assert oracle.relative(product(other), product(one)) > 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        {"energy": 0.0}, {"energy": None}, {"energy": 1.5}, {"min_rank": 0}, {"max_rank": 2.5}, {"rank": True},
        {"min_rank": 9, "max_rank": 3}, {"oversampling": -1}, {"power_iterations": 1.5}, {"exact": "maybe"},
        {"seed": -1}, {"document_compat": "yes"}, {"rank": 2, "ratio": 3.0}, {"rank": 2, "document_compat": True},
        {"nuclear": 2.0}, {"ratio": 1.0}, {"fro_error": 1.0}, {"fro_error": False},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_parameters(wrong: dict) -> None:
    with pytest.raises(UsageError):
        RsvdParams(**wrong)


def test_defaults_are_the_documents() -> None:
    assert RsvdParams().goal == {"energy": 0.99} and RsvdParams().bounds == (4, 32)
    assert RsvdParams(max_rank=2).bounds == (2, 2) and RsvdParams(min_rank=64).bounds == (64, 64)
    assert RsvdParams(rank=100).goal == {"rank": 100} and RsvdParams(rank=100).bounds == (1, None)


def test_checkpoints_are_refused() -> None:
    with pytest.raises(LoraforgeError, match="not full checkpoints"):
        merge_layer(LayerInputs("m", [Dense(torch.ones(3, 4))], [1.0]), RsvdParams())


# ---------------------------------------------------------------- the document's code


def as_published(one: LowRank, two: LowRank, params: RsvdParams, *, whole: bool = False) -> tuple[np.ndarray, int]:
    """The document's rSVD on dense matrices with the draws that ours takes; `whole`: its sum before the cut."""
    W = [pair.delta().numpy() for pair in (one, two)]
    n1, n2 = (np.linalg.norm(w) + 1e-12 for w in W)
    w = 0.5 if min(n1, n2) / max(n1, n2) < 0.5 else n1 / (n1 + n2)
    g = math.sqrt(two.scaling * two.rank / (one.scaling * one.rank))
    total = w * W[0] + (1 - w) * g * W[1]
    if whole:
        return total, min(total.shape)
    low, high = params.bounds
    base = int(math.sqrt(one.rank * two.rank))
    q = min(max(low, int(base * params.energy)), *total.shape, high)
    tall = total if total.shape[0] >= total.shape[1] else total.T
    Q = np.linalg.qr(tall @ gaussian(tall.shape[1], q, params.seed, "m").numpy())[0]
    for _ in range(2):
        Q = np.linalg.qr(tall @ np.linalg.qr(tall.T @ Q)[0])[0]
    U, S, Vh = np.linalg.svd(Q.T @ tall, full_matrices=False)
    k = min(high, max(low, int(np.searchsorted(np.cumsum(S) / S.sum(), params.energy)) + 1), q)
    merged = Q @ (U[:, :k] * S[:k]) @ Vh[:k]
    return (merged if tall is total else merged.T), k


@pytest.mark.parametrize("ranks", [(8, 8), (8, 2), (3, 12)])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["similar norms", "different norms"])
def test_compat_follows_the_published_code(ranks: tuple[int, int], shape: tuple[int, int], scale: float) -> None:
    g = torch.Generator().manual_seed(1)
    pairs = []
    for i, r in enumerate(ranks):
        S = 0.3 ** torch.arange(r, dtype=torch.float64) * (scale if i else 1.0)
        B = torch.linalg.qr(torch.randn(shape[0], r, generator=g, dtype=torch.float64)).Q * S
        pairs.append(LowRank(B, torch.linalg.qr(torch.randn(shape[1], r, generator=g, dtype=torch.float64)).Q.T, 2.0))
    for params in (
        RsvdParams(document_compat=True, min_rank=1),
        RsvdParams(document_compat=True, energy=0.7, min_rank=2),
        RsvdParams(document_compat=True, energy=1.0, min_rank=6, max_rank=6),
    ):
        want, k = as_published(*pairs, params)
        found = merge_layer(LayerInputs("m", pairs, [0.5, 0.5]), params)
        assert found.rank == k and found.scaling == 1.0
        assert oracle.relative(product(found), want) < 1e-10
        lost = np.linalg.norm(product(found) - as_published(*pairs, params, whole=True)[0])
        assert account(found).account.error == pytest.approx(lost, rel=1e-6, abs=1e-7) and not found.exact


def test_compat_is_seeded_and_takes_two_adapters() -> None:
    compat = RsvdParams(document_compat=True)
    inputs = layer((8, 8), (0.5, 0.5))
    assert torch.equal(merge_layer(inputs, compat).B, merge_layer(inputs, compat).B)
    with pytest.raises(LoraforgeError, match="merges two adapters"):
        merge_layer(layer(weights=(1.0, 1.0, 1.0)), compat)
    with pytest.raises(UsageError, match="computes the weights itself"):
        merge_layer(layer((8, 8), (0.3, 0.7)), compat)
    alone = layer((8, 8), (0.5, 0.5), gap=0)
    assert oracle.relative(product(merge_layer(alone, compat)), product(alone.factors[1])) < 1e-12
