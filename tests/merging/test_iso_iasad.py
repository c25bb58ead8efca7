from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.linalg.factored import truncate
from loraforge.linalg.flatten import flatten_update
from loraforge.linalg.rank import RankRule
from loraforge.merging.iso_c import merge_layer as sum_of_iso_c
from loraforge.merging.iso_iasad import describe, merge_layer
from loraforge.merging.spectral_params import IasadParams, IsoParams
from loraforge.types import Dense, LayerInputs, LowRank
from tests.linalg.test_iasad import oracle as split_oracle
from tests.oracles.factored import relative

from .spectra import check_invariants, check_zeros, deltas, dense, layer, nudged, result


def with_stats(inputs: LayerInputs, seed: int = 5) -> LayerInputs:
    g = torch.Generator().manual_seed(seed)
    n = inputs.shape[1]
    stats = [torch.rand(n, generator=g, dtype=torch.float64) ** 3 for _ in inputs.factors]
    return LayerInputs(inputs.module, inputs.factors, inputs.weights, inputs.keys, stats)


def oracle(inputs: LayerInputs, params: IasadParams, ks: list[int]) -> np.ndarray:
    """sum_i P_i on dense matrices."""
    parts, z = deltas(inputs), 1 - (1 - params.rank_ratio) * (1 - params.sparsity)
    mean = sum(parts) / len(parts) if params.center != "none" else 0.0
    total = np.zeros_like(parts[0])
    for D, d, k in zip(parts, inputs.stats, ks, strict=True):
        scale = np.ones(D.shape[1]) if d is None else np.sqrt(np.maximum(d.numpy() / d.numpy().mean(), 1e-6))
        out, _ = split_oracle(
            (D - mean) * scale, k, z, params.iters, params.prune_level, params.keep, params.final_svd == "on"
        )
        total += out / scale
    return total + (len(parts) * mean if params.center == "mean" else 0.0)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"prune_level": "element", "center": "mean"},
    {"keep": "smallest", "final_svd": "off"},
    {"preset": "document"},
    {"preset": "published-code", "iters": 3},
    {"sparsity": 0.5, "rank_ratio": 0.3, "iters": 1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("stats", [False, True], ids=["ones", "stats"])
def test_full_checkpoints_against_dense_arithmetic(settings: dict[str, Any], stats: bool) -> None:
    g = np.random.default_rng(1)
    parts = [Dense(torch.tensor(g.standard_normal((24, 36)))) for _ in range(3)]
    inputs = LayerInputs("m", parts, [1.0, 0.5, -2.0], stats=[None] * 3)
    inputs = with_stats(inputs) if stats else inputs
    params = IasadParams(**settings)
    k = int(params.rank_ratio * (1 - params.sparsity) * 24 * 36 / 60)
    found = merge_layer(inputs, params)
    assert isinstance(found, Dense) and found.weight.dtype == torch.float64
    assert relative(found.delta(), oracle(inputs, params, [k] * 3)) < 1e-10


@pytest.mark.parametrize("rank_ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_rank_of_the_adapters_against_dense_arithmetic(settings: dict[str, Any], rank_ratio: float) -> None:
    inputs = with_stats(layer(30, 26, (4, 8, 5), weights=[1.0, -0.5, 2.0]))
    params = IasadParams(rank_basis="lora", **{**settings, "rank_ratio": rank_ratio})
    found = merge_layer(inputs, params)
    want = oracle(inputs, params, [max(1, int(rank_ratio * r)) for r in (4, 8, 5)])
    assert relative(found.delta(), want) < 1e-10
    assert isinstance(found, Dense) and np.linalg.matrix_rank(want) == 26, "the sparse part breaks the low rank"
    rough = with_stats(layer(30, 26, (4, 8, 5), dtype=torch.float32))
    again = merge_layer(rough, params)
    assert again.delta().dtype == torch.float32
    assert relative(again.delta(), oracle(rough, params, [max(1, int(rank_ratio * r)) for r in (4, 8, 5)])) < 2e-6


def test_by_hand() -> None:
    """diag(9, 1) with k = 1: L = diag(9, 0); of each row's rest int(2 * 0.775) = 1 entry goes, the larger stays."""
    inputs = LayerInputs("m", [Dense(torch.diag(torch.tensor([9.0, 1.0]).double()))], [1.0], stats=[None])
    assert result(merge_layer, inputs, IasadParams()).tolist() == pytest.approx(np.diag([9.0, 1.0]))
    # The smallest: of (0, 1) the 0 stays, so the second direction is lost.
    found = result(merge_layer, inputs, IasadParams(preset="document"))
    assert np.allclose(found, np.diag([9.0, 0.0]), atol=1e-13)


@pytest.mark.parametrize(
    "settings", [{}, {"center": "mean"}, {"keep": "smallest"}, {"prune_level": "element"}], ids=str
)
def test_on_adapters_the_budget_changes_nothing(settings: dict[str, Any]) -> None:
    inputs = with_stats(layer(64, 48, (4, 3, 5)))  # k = 18
    params = IasadParams(**settings)
    found = merge_layer(inputs, params)
    assert isinstance(found, LowRank) and found.rank == 12
    assert torch.equal(found.delta(), sum_of_iso_c(inputs, IsoParams()).delta())
    # The long way round gives the same.
    assert relative(found.delta(), oracle(inputs, params, [18] * 3)) < 1e-12


def test_only_deltas_within_the_budget_are_left_alone() -> None:
    inputs = layer(20, 16, (3, 9), shared=0)  # k = 6
    want = deltas(inputs)[0] + oracle(LayerInputs("m", inputs.factors[1:], [1.0], stats=[None]), IasadParams(), [6])
    assert relative(result(merge_layer, inputs, IasadParams()), want) < 1e-10


def test_the_published_centring_leaves_next_to_nothing() -> None:
    inputs = layer(64, 48, (4, 3, 5))
    found = merge_layer(inputs, IasadParams(preset="published-code"))
    assert found.shape == (64, 48) and not found.delta().any()  # exact splits: what is merged sums to zero
    g = np.random.default_rng(2)
    full = LayerInputs("m", [Dense(torch.tensor(g.standard_normal((40, 32)))) for _ in range(4)], [1.0] * 4)
    total = sum(deltas(full))
    lost, kept = (result(merge_layer, full, IasadParams(center=c)) for c in ("drop-mean", "mean"))
    assert np.linalg.norm(lost) < 0.3 * np.linalg.norm(total)
    cosine = (lost * total).sum() / np.linalg.norm(lost) / np.linalg.norm(total)
    assert abs(cosine) < 0.2 and (kept * total).sum() / np.linalg.norm(kept) / np.linalg.norm(total) > 0.8


def test_invariants() -> None:
    check_invariants(merge_layer, IasadParams(), layer(40, 30, (3, 2, 4)))
    check_zeros(merge_layer, IasadParams())
    check_zeros(merge_layer, IasadParams(rank_basis="lora", rank_ratio=0.5), checkpoints=False)
    # The active form: order, scale, zeros and tiny changes (elementwise rules do not survive rotations).
    inputs = with_stats(layer(20, 16, (4, 6)))
    params = IasadParams(rank_basis="lora", rank_ratio=0.5)
    before = result(merge_layer, inputs, params)
    turned = LayerInputs("m", inputs.factors[::-1], inputs.weights, stats=inputs.stats[::-1])
    assert relative(result(merge_layer, turned, params), before) < 1e-12
    scaled = LayerInputs("m", inputs.factors, [4.0, 4.0], stats=inputs.stats)
    assert relative(result(merge_layer, scaled, params), 4 * before) < 1e-12
    zero = LowRank(torch.zeros(20, 4).double(), torch.ones(4, 16).double())
    more, gap = (
        LayerInputs("m", [*inputs.factors, extra], [1.0] * 3, stats=[*inputs.stats, None]) for extra in (zero, None)
    )
    assert relative(result(merge_layer, more, params), before) < 1e-12
    # A mean runs over all of N, a delta of 0 included; with `--on-missing present` over those that have the module.
    params = IasadParams(rank_basis="lora", rank_ratio=0.5, center="mean")
    assert relative(result(merge_layer, more, params), result(merge_layer, gap, params)) < 1e-12
    assert relative(result(merge_layer, gap, params), result(merge_layer, inputs, params)) > 1e-3
    gap = LayerInputs("m", gap.factors, gap.weights, stats=gap.stats, only_present=True)
    assert relative(result(merge_layer, gap, params), result(merge_layer, inputs, params)) < 1e-12
    assert relative(result(merge_layer, nudged(inputs), params), result(merge_layer, inputs, params)) < 1e-9


def test_flattened_like_iso_c() -> None:
    inputs = layer(64, 48, (4, 3, 5))
    cut = truncate(merge_layer(inputs, IasadParams()), RankRule())  # type: ignore[arg-type]
    flat, numbers = flatten_update(cut.factors, cut.spectrum, IasadParams(mean_over="full"))
    assert numbers["rank"] == 12 and numbers["sbar"] == pytest.approx(float(cut.spectrum.sum()) / 48)
    dense_flat, _ = flatten_update(Dense(merge_layer(dense(inputs), IasadParams()).delta()), None, IasadParams())
    assert dense_flat.shape == flat.shape


def test_what_a_split_holds() -> None:
    assert describe((768, 768), 16, IasadParams()) == {"k": 259, "kept": 173 / 768, "nnz": 768 * 173, "exact": True}
    found = describe((100, 80), 4, IasadParams(rank_basis="lora", prune_level="element", keep="smallest"))
    assert found == {"k": 3, "kept": 0.775, "nnz": 6200, "exact": False}
    assert not describe((768, 768), None, IasadParams())["exact"]


def test_bad_input() -> None:
    inputs = layer()
    wrong = LayerInputs("m", inputs.factors, inputs.weights, stats=[torch.ones(3)] * 3)
    with pytest.raises(LoraforgeError, match="does not fit its module") as caught:
        merge_layer(wrong, IasadParams())
    assert caught.value.where == "m"
    with pytest.raises(LoraforgeError, match="no adapter rank"):
        merge_layer(dense(inputs), IasadParams(rank_basis="lora"))
