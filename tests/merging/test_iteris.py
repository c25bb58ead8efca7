"""The module solve against the recorded vectors and the independent dense oracle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from loraforge.calibrate.statistics import collect_stats
from loraforge.calibrate.weights import Collecting, Layer, Rows, Weighting
from loraforge.errors import LoraforgeError
from loraforge.linalg.metric import left_subspace
from loraforge.merging.iteris import RHOS, solve_layer
from loraforge.merging.iteris_params import IterisParams
from loraforge.types import LowRank
from tests.oracles import iteris as oracle

VECTORS = json.loads((Path(__file__).parent.parent / "oracles" / "iteris_vectors.json").read_text())
SETTINGS = VECTORS["settings"]
PLAIN = {"use_camr": False, "use_dcs": False, "with_pretrain_matrix": 0}
FIXED = PLAIN | {"alpha_1": SETTINGS["alpha_1"], "alpha_2": SETTINGS["alpha_2"], "cross_norm": "exact"}
CAMR = {"use_camr": True, "camr_alpha": SETTINGS["camr_alpha"], "camr_beta": SETTINGS["camr_beta"]}


def tensor(name, dtype=torch.float64):
    return torch.tensor(VECTORS[name], dtype=dtype)


def build(X, Xt, factors, W0, params, folds=1, c=None, dtype=torch.float64):
    """Statistics of one module from dense per-task features, tokens dealt to the folds in turn."""
    layer = Layer("m", [None if f is None else LowRank(*(t.double() for t in f)) for f in factors], W0.double())
    rho = None if params.searches and params.reg_ceof == "auto" else float(params.reg_ceof)
    how = Collecting(
        coefficients=c or [1.0] * len(X),
        folds=folds,
        lambda_weight=params.lambda_weight,
        rho=rho,
        full_weight=params.with_pretrain_matrix == 1,
        target_merged=params.target == "merged",
        exact_cross_norm=params.cross_norm == "exact",
        offdiag=params.offdiag,
        weighting=Weighting(params.dcs_sigma, params.dcs_min_ess, params.dcs_kernel, params.dcs_mad_consistent)
        if params.use_dcs
        else None,
    )
    rows = []
    for task, (x, xt, f) in enumerate(zip(X, Xt, factors, strict=True)):
        W = W0 if f is None else W0 + f[0] @ f[1]
        for fold in range(folds):
            part, merged = x[fold::folds].to(dtype), xt[fold::folds].to(dtype)
            merged = torch.lerp(merged, part, rho) if rho else merged
            rows.append(Rows(task, fold, part, merged, float((part.double() @ W.T).square().sum())))
    return collect_stats(layer, rows, how, None)


def solve(X, Xt, factors, W0, params, **options):
    stats = build(X, Xt, factors, W0, params, **options)
    solution = solve_layer(stats, params)
    state = solution.state if stats.basis is None else stats.basis @ solution.state
    return state, stats, solution


def problem(seed, ranks=(2, 1, 3), tokens=(40, 31, 25), d=7, m=9, shift=0.2):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    X = [draw(t, d) for t in tokens]
    Xt = [x + shift * draw(*x.shape) for x in X]
    return X, Xt, [(draw(m, r), draw(r, d)) for r in ranks], draw(m, d)


def dense(factors):
    return [None if f is None else (f[0] @ f[1]).numpy() for f in factors]


def oracle_options(params):
    camr = oracle.Camr(
        params.camr_alpha, params.camr_beta, params.camr_direction, params.camr_normalize, params.camr_scale,
        params.camr_cross,
    )  # fmt: skip
    dcs = oracle.Dcs(params.dcs_sigma, params.dcs_min_ess, params.dcs_kernel)
    return {
        "alpha_1": params.alpha_1,
        "alpha_2": params.alpha_2,
        "reg_ceof": params.reg_ceof,
        "with_pretrain_matrix": params.with_pretrain_matrix,
        "camr": camr if params.use_camr else None,
        "dcs": dcs if params.use_dcs else None,
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("iteris", {}),
        ("iteris_reg_ceof_0p1", {"reg_ceof": 0.1}),
        ("iteris_camr_document_matched", CAMR),
        ("iteris_dcs", {"use_dcs": True, "dcs_sigma": SETTINGS["dcs_scale"], "dcs_min_ess": 0.0}),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_recorded_solves(name, options, dtype, tolerance):
    factors = list(zip(tensor("B"), tensor("A"), strict=True))
    params = IterisParams(**({"reg_ceof": 0.0, "lambda_weight": "full"} | FIXED | options))
    got, stats, _ = solve(list(tensor("X")), list(tensor("Xt")), factors, tensor("W0"), params, dtype=dtype)
    torch.testing.assert_close(got, tensor(name), atol=tolerance, rtol=0)
    torch.testing.assert_close(
        torch.tensor(stats.lambdas, dtype=torch.float64), tensor("lambda_full"), atol=tolerance, rtol=0
    )


def test_recorded_full_weight():
    """The recorded full weight is W0 + delta; R = 4 equals d_out, so nothing is cut."""
    factors = list(zip(tensor("B"), tensor("A"), strict=True))
    params = IterisParams(**(FIXED | {"reg_ceof": 0.0, "lambda_weight": "full", "with_pretrain_matrix": 1}))
    got, _, _ = solve(list(tensor("X")), list(tensor("Xt")), factors, tensor("W0"), params)
    torch.testing.assert_close(got + tensor("W0"), tensor("iteris_pretrain_matrix_1"), atol=1e-10, rtol=0)


def test_recorded_delta_weights():
    factors = list(zip(tensor("B"), tensor("A"), strict=True))
    params = IterisParams(**(FIXED | {"reg_ceof": 0.0, "lambda_weight": "delta"}))
    stats = build(list(tensor("X")), list(tensor("Xt")), factors, tensor("W0"), params)
    torch.testing.assert_close(
        torch.tensor(stats.lambdas, dtype=torch.float64), tensor("lambda_delta"), atol=1e-10, rtol=0
    )


VARIANTS = [
    {},
    {"reg_ceof": 0.35},
    {"lambda_weight": "delta"},
    {"with_pretrain_matrix": 1},
    {"use_dcs": True},
    {"use_dcs": True, "dcs_kernel": "excess", "dcs_min_ess": 0.7},
    {"use_dcs": True, "use_camr": True, "reg_ceof": 0.2},
    *(
        {"use_camr": True, "camr_direction": d, "camr_normalize": n, "camr_scale": s, "camr_cross": c}
        for d, n, s, c in [
            ("document", "mean", "fro", "matched"),
            ("document", "sum", "abs", "iso"),
            ("document", "max", "fro", "none"),
            ("inverse", "sum", "fro", "matched"),
            ("inverse", "max", "abs", "iso"),
        ]
    ),
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("missing", [False, True])
def test_equals_the_dense_oracle(options, missing):
    X, Xt, factors, W0 = problem(3)
    if missing:
        factors[1] = None
    params = IterisParams(**({"reg_ceof": 0.0, "lambda_weight": "full"} | FIXED | options))
    got, stats, _ = solve(X, Xt, factors, W0, params, c=[1.0, 0.5, 2.0])
    # An adapter that lacks the module has no weight of its own there: the oracle is told the mean of the others.
    lam = {"lam": stats.lambdas} if missing and params.lambda_weight == "delta" else {"lam": params.lambda_weight}
    want = oracle.solve(
        [x.numpy() for x in X], [x.numpy() for x in Xt], dense(factors), W0=W0.numpy(), c=[1.0, 0.5, 2.0],
        **oracle_options(params), **lam,
    )  # fmt: skip
    expected = want.W
    if params.with_pretrain_matrix:
        expected = want.W - W0.numpy()
        if stats.rank < min(expected.shape):
            expected = oracle.truncate_output(expected, want.T2, stats.rank)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-9)


def test_folds_change_nothing_but_the_choice():
    X, Xt, factors, W0 = problem(4)
    params = IterisParams(**(FIXED | {"reg_ceof": 0.0}))
    one, _, _ = solve(X, Xt, factors, W0, params)
    three, _, _ = solve(X, Xt, factors, W0, params, folds=3)
    torch.testing.assert_close(one, three, atol=1e-11, rtol=0)


def test_searched_rho_solves_like_the_same_fixed_rho():
    """The parts kept for the search combine to the Grams of the mixed features."""
    X, Xt, factors, W0 = problem(5, tokens=(60, 50, 70))
    auto = IterisParams(**PLAIN, alpha_1=1e-3, alpha_2=1e-3, cross_norm="gram")
    got, _, solution = solve(X, Xt, factors, W0, auto, folds=2)
    rho = solution.choices[1]
    assert rho in RHOS
    fixed = IterisParams(**PLAIN, alpha_1=0.0, alpha_2=0.0, reg_ceof=rho)
    exact = IterisParams(**PLAIN, alpha_1=0.0, alpha_2=0.0)
    stats = build(X, Xt, factors, W0, exact, folds=2)
    want, _, _ = solve(X, Xt, factors, W0, fixed)
    mixed = stats.basis @ solve_layer(stats, exact, (None, rho)).state
    torch.testing.assert_close(mixed, want, atol=1e-10, rtol=0)
    assert float((got - want).norm()) < 0.2 * float(want.norm())


def test_search_finds_the_least_held_out_objective():
    """Against a brute force over the grid with the oracle's held-out objective."""
    X, Xt, factors, W0 = problem(6, tokens=(30, 24, 28), shift=0.6)
    params = IterisParams(**PLAIN)
    stats = build(X, Xt, factors, W0, params, folds=2)
    solution = solve_layer(stats, params)
    assert solution.report["heldout_gain"] > 0
    from loraforge.merging import iteris

    values = {}
    for a in iteris.ALPHAS:
        for r in iteris.RHOS:
            value = 0.0
            for k in range(2):
                T1, factor = iteris._system(stats, [stats.folds[1 - k]], params, (a, r))
                state = factor.solve_right(T1)
                fold, delta = stats.folds[k], stats.basis @ state
                targets = sum(
                    c * B @ A @ x[k::2].T @ xt[k::2]
                    for c, (B, A), x, xt in zip(stats.coefficients, factors, X, Xt, strict=True)
                )
                value += float((delta @ fold.gram * delta).sum() - 2 * (delta * targets).sum())
            values[a, r] = value
    assert values[solution.choices] == pytest.approx(min(values.values()), rel=1e-9)


def test_sketched_search_estimates_the_same_objective():
    """Over many sketches the mean of the sketched objective is the objective; one sketch is near it."""
    from dataclasses import replace

    from loraforge.merging import iteris

    X, Xt, factors, W0 = problem(15, m=150, d=6)
    params = IterisParams(**(PLAIN | {"with_pretrain_matrix": 1}))
    stats = build(X, Xt, factors, W0, params, folds=2)
    small = iteris._sketch(stats)
    assert small.folds[0].target.shape[0] == iteris.SKETCH == 32
    values = []
    for problem_ in (stats, small):
        values.append(float(iteris.Search(problem_, params).held_out(1, (1e-2, 0.25))))
    assert values[1] == pytest.approx(values[0], rel=0.4)
    assert replace(small, rank=stats.rank).rank == stats.rank


def test_identical_adapters_give_that_adapter():
    X, _, factors, W0 = problem(7)
    same = [factors[0]] * 3
    for options in ({}, {"use_camr": True}, {"use_dcs": True}, {"alpha_1": 0.1, "alpha_2": 0.1}):
        params = IterisParams(**(FIXED | {"reg_ceof": 0.0} | options))
        got, stats, _ = solve(X, X, same, W0, params)
        torch.testing.assert_close(got, factors[0][0] @ factors[0][1], atol=1e-9, rtol=0)
        assert stats.basis.shape[1] == 2  # the numerical rank, not the sum of the ranks


def test_rank_never_exceeds_the_sum_of_ranks():
    X, Xt, factors, W0 = problem(8, ranks=(1, 1, 2))
    got, _, _ = solve(X, Xt, factors, W0, IterisParams(**(FIXED | {"reg_ceof": 0.0})))
    S = torch.linalg.svdvals(got)
    assert int((S > 1e-12 * S[0]).sum()) == 4


def test_zero_coefficient_removes_a_task():
    X, Xt, factors, W0 = problem(9)
    params = IterisParams(**(FIXED | {"reg_ceof": 0.0}))
    got, _, _ = solve(X, Xt, factors, W0, params, c=[1.0, 1.0, 0.0])
    want, _, _ = solve(X[:2], Xt[:2], factors[:2], W0, params)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", [{}, {"use_camr": True}, {"use_camr": True, "use_dcs": True}], ids=str)
@pytest.mark.parametrize("alpha", [8e-5, "auto"])
def test_dead_input_directions_keep_the_mean_of_the_adapters(options, alpha):
    """Where no feature ever fires the merged delta is a weighted mean of the adapters, never a multiple of it."""
    X, Xt, factors, W0 = problem(10, d=12)
    for x in (*X, *Xt):
        x[:, 8:] = 0.0
    fixed = {} if alpha == "auto" else {"alpha_1": alpha, "alpha_2": alpha, "reg_ceof": 0.0}
    params = IterisParams(**(PLAIN | options | fixed))
    same = [factors[0]] * 3
    got, _, _ = solve(X, Xt, same, W0, params, folds=2)
    want = factors[0][0] @ factors[0][1]
    gain = float(got[:, 8:].norm() / want[:, 8:].norm())
    assert 0.9 < gain <= 1.0 + 1e-3


def test_full_weight_is_cut_in_the_metric_of_the_outputs():
    X, Xt, factors, W0 = problem(11, ranks=(1, 1, 1))
    params = IterisParams(**(FIXED | {"reg_ceof": 0.0, "with_pretrain_matrix": 1}))
    got, stats, solution = solve(X, Xt, factors, W0, params)
    assert int(torch.linalg.matrix_rank(got, rtol=1e-9)) == 3
    U, S = left_subspace(got, solution.factor)
    assert float(S[3]) < 1e-9 * float(S[0])
    assert U.shape == (9, 7)
    assert stats.rank == 3


@pytest.mark.parametrize("alpha", [1e-3, "auto"])
def test_large_modules_take_the_leading_subspace_by_steps(alpha, monkeypatch):
    """Above LARGE no eigendecomposition is made: the same update to rounding, and the same account of what was cut."""
    from loraforge.merging import iteris

    X, Xt, factors, W0 = problem(18, ranks=(1, 1, 1), tokens=(90, 80, 85), d=30, m=40)
    fixed = {} if alpha == "auto" else {"alpha_1": alpha, "alpha_2": alpha, "reg_ceof": 0.0}
    params = IterisParams(**(PLAIN | {"with_pretrain_matrix": 1} | fixed))
    exact, _, solution = solve(X, Xt, factors, W0, params, folds=2)
    monkeypatch.setattr(iteris, "LARGE", 12)
    got, stats, stepped = solve(X, Xt, factors, W0, params, folds=2)
    U, S = stepped.left
    assert U.shape == (40, 3) and S.shape == (4,) and solution.left[1].shape == (30,)
    assert float(S.square().sum()) == pytest.approx(float(solution.left[1].square().sum()), rel=1e-12)
    assert float(S[:3].square().sum()) == pytest.approx(float(solution.left[1][:3].square().sum()), rel=1e-7)
    assert float((got - exact).norm()) < 1e-3 * float(exact.norm())
    assert stepped.report["residual_after"] == pytest.approx(solution.report["residual_after"], rel=1e-6)
    assert stats.folds[0].features.shape == (3, 30), "targets are kept as factors"


def test_nan_names_the_module():
    X, Xt, factors, W0 = problem(12)
    X[1][3, 2] = float("nan")
    with pytest.raises(LoraforgeError, match="NaN or Inf") as caught:
        build(X, Xt, factors, W0, IterisParams(**(FIXED | {"reg_ceof": 0.0})))
    assert caught.value.where == "m"


def test_residual_is_the_missed_share_of_the_outputs():
    X, Xt, factors, W0 = problem(13)
    params = IterisParams(**(FIXED | {"reg_ceof": 0.0}))
    got, stats, solution = solve(X, Xt, factors, W0, params)
    missed = energy = 0.0
    for c, x, xt, (B, A) in zip(stats.coefficients, X, Xt, factors, strict=True):
        target = x @ (B @ A).T
        missed += c * float((target - xt @ got.T).square().sum())
        energy += c * float(target.square().sum())
    assert solution.report["residual_after"] == pytest.approx(missed / energy, rel=1e-9)
    assert solution.report["residual_after"] < solution.report["residual_before"]


def test_regmean_offdiagonal_scaling():
    X, _, factors, W0 = problem(14)
    params = IterisParams(
        **(FIXED | {"lambda_weight": "none", "reg_ceof": 0.0, "offdiag": 0.9, "alpha_1": 0.0, "alpha_2": 0.0})
    )
    got, _, _ = solve(X, X, factors, W0, params)
    grams = [0.9 * x.T @ x + 0.1 * torch.diag((x.T @ x).diagonal()) for x in X]
    want = sum(B @ A @ G for (B, A), G in zip(factors, grams, strict=True)) @ torch.linalg.inv(sum(grams))
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_module_whose_inputs_are_all_zero_takes_the_mean_of_the_adapters():
    _, _, factors, W0 = problem(16)
    X = [torch.zeros(12, 7, dtype=torch.float64) for _ in factors]
    for mode in (0, 1):
        params = IterisParams(**(FIXED | {"reg_ceof": 0.0, "lambda_weight": "none", "with_pretrain_matrix": mode}))
        got, _, _ = solve(X, X, factors, W0, params)
        mean = sum(B @ A for B, A in factors) / 3
        torch.testing.assert_close(got, mean, atol=1e-9, rtol=0)
