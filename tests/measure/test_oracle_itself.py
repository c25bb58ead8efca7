"""The oracle of the measurements against what the design states as fact, against numpy and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tests.oracles import heads as oracle
from tests.oracles import heads_model as network
from tests.oracles import heads_spectra as spectra
from tests.oracles import heads_stats as numbers
from tests.oracles.heads import Shape

EXACT = {"rtol": 1e-12, "atol": 1e-14}  # float64, some hundred operations


def weights(shape: Shape, d: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = {"q": shape.n_q * shape.qk, "k": shape.n_kv * shape.qk, "v": shape.n_kv * shape.vd}
    found = {part: rng.standard_normal((count, d)) for part, count in rows.items()}
    return found | {"o": rng.standard_normal((d, shape.n_q * shape.vd))}


def test_a_uniform_change_of_a_tenth_is_half_a_tenth_in_the_documents_urel() -> None:
    shape = Shape(4, 4, 4, 4)
    W = {part: np.ones((16, 16)) for part in oracle.PARTS}  # four equal norms
    line = oracle.update_line({part: 0.1 * w for part, w in W.items()}, W, 0, shape)
    assert line["Urel"] == pytest.approx(0.05, rel=1e-9)
    assert line["Urel_l2"] == pytest.approx(0.1, rel=1e-9)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "counted-by-each"])
def test_shared_keys_and_values_add_up_to_the_layer_only_when_they_are_shared_out(share: bool) -> None:
    shape, d = Shape(8, 2, 4, 4), 32
    change = weights(shape, d)
    whole = sum(oracle.fro(w) ** 2 for w in change.values())
    lines = oracle.update_lines([change], None, shape, kv_share=share)
    found = sum(line["U"] ** 2 for line in lines.values())
    kv = sum(oracle.fro(change[part]) ** 2 for part in ("k", "v"))
    assert found == pytest.approx(whole + (0 if share else (shape.group - 1) * kv), rel=1e-12)
    if not share:
        assert found / whole > 1.4  # the design's draw: 1.57


def test_heads_of_plain_attention_are_the_blocks_of_the_whole() -> None:
    shape = Shape(4, 4, 3, 5)
    change = weights(shape, 16)
    for share in (True, False):
        lines = oracle.update_lines([change], None, shape, kv_share=share)
        for part in oracle.PARTS:
            whole = sum(line[f"U{part}"] ** 2 for line in lines.values()) ** 0.5
            assert whole == pytest.approx(float(np.linalg.norm(change[part])), rel=1e-12)


@pytest.mark.parametrize("how", ["stacked", "interleaved"])
def test_a_fused_weight_comes_apart_as_it_was(how: str) -> None:
    shape = Shape(4, 4 if how == "interleaved" else 2, 3, 3)
    parts = weights(shape, 7)
    again = oracle.unfuse(oracle.fuse(parts, shape, how), shape, how)
    assert all(np.array_equal(again[part], parts[part]) for part in "qkv")


def test_circuits_do_not_see_a_scale_that_moves_from_v_to_o_and_urel_does() -> None:
    shape = Shape(2, 2, 4, 4)
    W = weights(shape, 8)
    change = {"v": W["v"], "o": -0.5 * W["o"]}  # v doubled, o halved
    assert oracle.circuits(change, W, 1, shape)["OV"] == pytest.approx(0.0, abs=1e-14)
    assert oracle.update_line(change, W, 1, shape)["Urel"] > 0.1
    tenth = {"o": 0.1 * W["o"], "q": -0.2 * W["q"]}
    assert oracle.circuits(tenth, W, 0, shape) == pytest.approx({"OV": 0.1, "QK": 0.2}, rel=1e-12)


def test_scale_of_the_factors() -> None:
    assert oracle.scale(16, 32) == 2.0
    assert oracle.scale(16, 32, rslora=True) == 8.0


def test_numbers_of_a_spectrum() -> None:
    even = np.ones(6)
    assert spectra.stable_rank(even) == pytest.approx(6)
    assert spectra.effective_rank(even) == pytest.approx(6)
    assert [spectra.rank_holding(even, part) for part in (0.5, 0.9)] == [3, 6]
    steep = np.array([3.0, 1.0, 0.0])
    assert spectra.stable_rank(steep) == pytest.approx(10 / 9)
    entropy = scipy_stats.entropy(steep / 4)
    assert spectra.effective_rank(steep) == pytest.approx(np.exp(entropy))
    assert [spectra.rank_holding(steep, part) for part in (0.89, 0.9, 0.95)] == [1, 1, 2]


def test_intruders_none_in_the_base_itself_or_in_its_multiple_one_in_a_strong_line() -> None:
    rng = np.random.default_rng(3)
    W = rng.standard_normal((64, 48))
    line = np.outer(rng.standard_normal(64), rng.standard_normal(48))
    strong = 5 * np.linalg.norm(W, 2) * line / np.linalg.norm(line)
    for eps in (0.3, 0.5, 0.6):
        assert spectra.intruders(W, 0 * W, 10, eps) == 0
        assert spectra.intruders(W, 0.3 * W, 10, eps) == 0
    # 64 left vectors, 48 of them W0's: a random one has cosines of about 1/8 with each.
    assert spectra.intruders(W, strong, 1, 0.5) == 1
    assert spectra.intruders(W, strong, 10, 0.5) == 1


def test_alignment_of_the_base_with_itself_and_by_chance() -> None:
    rng = np.random.default_rng(4)
    W, change = rng.standard_normal((30, 20)), rng.standard_normal((30, 20))
    s = np.linalg.svd(W, compute_uv=False)
    assert spectra.alignment(W, W, 5) == pytest.approx(np.sqrt((s[:5] ** 2).sum() / (s**2).sum()))
    by_chance = spectra.alignment_by_chance(change, 5)
    assert by_chance == pytest.approx(5 / np.sqrt(600), rel=0.03)  # 400 draws
    assert spectra.alignment(W, change, 5) == pytest.approx(by_chance, rel=0.4)
    assert spectra.amplification(W, W, 20) == pytest.approx(1.0)


def test_fisher_of_a_batch_is_the_square_of_the_mean_and_its_share_of_the_variance() -> None:
    rng = np.random.default_rng(0)
    s = rng.standard_normal((6000, 1)) * 0.44 + 0.02
    one, six = numbers.fisher(s), numbers.fisher(s, batch=6)
    mean, spread = s.mean(), s.var()
    assert one["F"][0] == pytest.approx(mean**2 + spread, rel=1e-12)
    assert one["F"][0] == pytest.approx(0.196, rel=0.05)
    # E[g_b^2] = mean^2 + var / b; 1000 batches leave about 4 % of noise (sqrt(2 / 1000)), three of which are allowed.
    assert six["F"][0] == pytest.approx(mean**2 + spread / 6, rel=0.14)


def test_one_batch_always_predicts_one() -> None:
    s = np.random.default_rng(1).standard_normal((12, 5))
    assert numbers.fisher(s, batch=12, eps=0.0)["Ppred"] == pytest.approx(1.0)
    spread = numbers.fisher(s, eps=0.0)["Ppred"]
    assert (spread < 1).all() and (spread > 0).all()


def test_relative_eps_does_not_depend_on_the_unit_of_the_loss() -> None:
    s = np.random.default_rng(2).standard_normal((12, 5))
    same = [numbers.fisher(s * unit)["Ppred"] for unit in (1.0, 1e-6)]
    assert same[0] == pytest.approx(same[1], rel=1e-12)
    assert (numbers.fisher(s * 1e-6, relative=False)["Ppred"] < 1e-5).all()


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_ranks_rho_and_percentiles_agree_with_scipy_and_numpy(ties: bool) -> None:
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((2, 40))
    if ties:
        x, y = x.round(0), y.round(0)
    assert np.array_equal(numbers.average_ranks(x), scipy_stats.rankdata(x))
    assert numbers.spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x, y).statistic, abs=1e-14)
    for q in (0, 30, 33.3, 90, 100):
        assert numbers.percentile(x, q) == pytest.approx(np.percentile(x, q), abs=1e-14)


def test_what_cannot_be_ranked_is_left_out() -> None:
    nan = float("nan")
    assert numbers.spearman([1, 2, 3], [5, 5, 5]) is None
    assert numbers.spearman([1, 2, nan, 4], [1, 2, 0, 3]) == pytest.approx(1.0)
    assert numbers.top([nan, 1.0, None, 3.0, 2.0], 2) == {3, 4}
    assert numbers.top([1.0, 2.0, 2.0, 2.0], 2) == {1, 2}


def test_chance_levels_of_a_base_of_144_heads() -> None:
    # 20000 draws: the standard error of rho's quantile is about 0.001, of the mean count 0.01.
    assert numbers.null_rho95(144) == pytest.approx(0.163, abs=0.003)
    assert numbers.null_overlap(144, 20) == pytest.approx(20 / 144, abs=0.002)
    counts = numbers.null_cases(144)
    exact = scipy_stats.hypergeom(144, 43, 15)
    assert counts.mean() == pytest.approx(4.48, abs=0.05)
    assert exact.mean() == pytest.approx(4.48, abs=0.005)
    # 2 to 8 hold 96 %, 3 to 8 and 2 to 7 less than 95 %; the 2.5 % quantile itself is 1, as P(X <= 1) = 2.9 %.
    for low, high in ((2, 8), (3, 8), (2, 7)):
        share = exact.cdf(high) - exact.cdf(low - 1)
        assert ((counts >= low) & (counts <= high)).mean() == pytest.approx(share, abs=0.006)
        assert (share >= 0.95) == ((low, high) == (2, 8))
    assert scipy_stats.hypergeom(144, 20, 20).mean() / 20 == pytest.approx(0.139, abs=5e-4)


@pytest.fixture(scope="module")
def batch() -> tuple[network.Encoder, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    mask = np.ones((5, 6))
    mask[1, 4:] = 0
    return network.random_encoder(), rng.standard_normal((5, 6, 16)), mask, rng.integers(0, 3, 5)


def test_a_closed_gate_is_a_head_without_columns(batch: tuple) -> None:
    model, x, mask, labels = batch
    rises, base = network.exact(model, x, mask, labels), model.losses(x, mask, labels)
    for layer, h in np.ndindex(2, 4):
        np.testing.assert_allclose(rises[:, layer, h], model.without(layer, h).losses(x, mask, labels) - base, **EXACT)
    assert np.abs(rises).min(0).max() > 1e-4  # the heads do something


def test_padding_does_nothing(batch: tuple) -> None:
    model, x, mask, labels = batch
    other = x.copy()
    other[1, 4:] = 99.0
    np.testing.assert_allclose(model.losses(other, mask, labels), model.losses(x, mask, labels), **EXACT)


def test_the_integral_of_the_gradient_is_the_ablation(batch: tuple) -> None:
    model, x, mask, labels = batch
    # Central differences at 20 points: their error, 1e-10, is what is left.
    one = network.integrated(model, x[:2], mask[:2], labels[:2], together=False)
    np.testing.assert_allclose(one, network.exact(model, x[:2], mask[:2], labels[:2]), atol=2e-9, rtol=0)
    shares = network.integrated(model, x, mask, labels, together=True).sum((1, 2))
    whole = model.losses(x, mask, labels, 0 * model.gates) - model.losses(x, mask, labels)
    np.testing.assert_allclose(shares, whole, atol=2e-8, rtol=0)


def test_a_mean_as_fill_of_a_head_that_never_varies_changes_nothing(batch: tuple) -> None:
    model, x, mask, labels = batch
    still = [dict(layer) for layer in model.layers]
    still[1]["Wv"] = np.zeros_like(still[1]["Wv"])  # the context is then the bias of v, at every token
    constant = network.Encoder(tuple(still), model.head, model.heads)
    gates = model.gates
    gates[1, 2] = 0
    fill = {1: still[1]["bv"].reshape(4, 4)}
    kept = constant.losses(x, mask, labels, gates, fill)
    np.testing.assert_allclose(kept, constant.losses(x, mask, labels), **EXACT)
