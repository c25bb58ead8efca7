"""The oracle against recorded vectors and against what must hold for any input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from . import iteris as oracle

VECTORS = json.loads(Path(__file__).with_name("iteris_vectors.json").read_text())
SETTINGS = VECTORS["settings"]
TOL = 1e-10


def vec(name):
    return np.array(VECTORS[name], dtype=np.float64)


@pytest.fixture
def recorded():
    deltas = [b @ a for b, a in zip(vec("B"), vec("A"), strict=True)]
    return list(vec("X")), list(vec("Xt")), deltas, vec("W0")


def problem(seed, n_tasks=3, n=7, m=9, ranks=(2, 1, 3), tokens=(40, 31, 25), shift=0.2):
    """Random X, Xt, deltas, W0 with different ranks and token counts."""
    g = np.random.default_rng(seed)
    X = [g.normal(size=(s, n)) for s in tokens[:n_tasks]]
    Xt = [x + shift * g.normal(size=x.shape) for x in X]
    factors = [(g.normal(size=(m, r)), g.normal(size=(r, n))) for r in ranks[:n_tasks]]
    return X, Xt, factors, g.normal(size=(m, n))


def dense(factors):
    return [b @ a for b, a in factors]


@pytest.mark.parametrize("mode", ["full", "delta"])
def test_recorded_lambda(recorded, mode):
    X, _, deltas, W0 = recorded
    np.testing.assert_allclose(oracle.task_weights(X, deltas, W0, mode), vec(f"lambda_{mode}"), rtol=TOL)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("iteris", {}),
        ("iteris_reg_ceof_0p1", {"reg_ceof": 0.1}),
        ("iteris_pretrain_matrix_1", {"with_pretrain_matrix": 1}),
        ("iteris_camr_document_matched", {"camr": oracle.Camr(SETTINGS["camr_alpha"], SETTINGS["camr_beta"])}),
        ("iteris_dcs", {"dcs": oracle.Dcs(SETTINGS["dcs_scale"], min_ess=0.0)}),
    ],
)
def test_recorded_solves(recorded, name, options):
    X, Xt, deltas, W0 = recorded
    alphas = {"alpha_1": SETTINGS["alpha_1"], "alpha_2": SETTINGS["alpha_2"]}
    got = oracle.solve_dense(X, Xt, deltas, W0=W0, **(alphas | options))
    np.testing.assert_allclose(got, vec(name), atol=TOL, rtol=0)


@pytest.mark.parametrize(
    ("direction", "normalize", "scale"),
    [("document", "sum", "abs"), ("document", "mean", "fro"), ("inverse", "sum", "fro")],
)
def test_recorded_camr_diagonals(recorded, direction, normalize, scale):
    Xt = recorded[1][SETTINGS["camr_task"]]
    camr = oracle.Camr(SETTINGS["camr_alpha"], SETTINGS["camr_beta"], direction, normalize, scale)
    got = oracle.camr_diagonal(Xt, float(np.linalg.norm(Xt.T @ Xt)), camr, camr.alpha)
    np.testing.assert_allclose(got, vec(f"camr_{direction}_{normalize}_{scale}"), atol=TOL, rtol=0)


def test_recorded_dcs(recorded):
    X, _, deltas, _ = recorded
    V = [oracle.dcs_variance(x, deltas) for x in X]
    got = oracle.dcs_weights(V, oracle.Dcs(min_ess=0.0))
    np.testing.assert_allclose(V, vec("dcs_V"), atol=TOL, rtol=0)
    np.testing.assert_allclose(got.sigma, VECTORS["dcs_sigma_mad"], rtol=TOL)
    np.testing.assert_allclose(got.w, vec("dcs_w_mean1"), atol=TOL, rtol=0)


@pytest.mark.parametrize("k", range(4))
def test_recorded_anderson_steps(k):
    rule = oracle.Anderson(SETTINGS["anderson_history"], SETTINGS["anderson_reg"], SETTINGS["anderson_reg_mode"])
    got = oracle.anderson_next(list(vec("anderson_w")[: k + 1]), list(vec("anderson_g")[: k + 1]), rule)
    np.testing.assert_allclose(got, vec("anderson_next_m5_abs1e_6")[k], atol=TOL, rtol=0)


def test_every_recorded_entry_is_used():
    used = {"settings", "shapes", "B", "A", "W0", "X", "Xt", "lambda_full", "lambda_delta", "iteris", "dcs_V"}
    used |= {"iteris_reg_ceof_0p1", "iteris_pretrain_matrix_1", "iteris_camr_document_matched", "iteris_dcs"}
    used |= {"camr_document_sum_abs", "camr_document_mean_fro", "camr_inverse_sum_fro", "dcs_sigma_mad", "dcs_w_mean1"}
    assert set(VECTORS) == used | {"anderson_w", "anderson_g", "anderson_next_m5_abs1e_6"}
    assert VECTORS["shapes"] == {"N": 2, "d_in": 5, "d_out": 4, "r": 2, "S": 9}


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_without_regularisation_the_solution_is_weighted_least_squares(mode, weighted):
    X, Xt, factors, W0 = problem(0)
    dcs = oracle.Dcs(min_ess=0.5) if weighted else None
    options = {"W0": W0, "c": [1.0, 0.5, 2.0], "alpha_1": 0.0, "alpha_2": 0.0, "with_pretrain_matrix": mode, "dcs": dcs}
    got = oracle.solve(X, Xt, dense(factors), **options)
    a = got.lam * np.array([1.0, 0.5, 2.0])
    roots = [np.sqrt(a[i] * w)[:, None] for i, w in enumerate(got.w)]
    left = np.concatenate([r * x for r, x in zip(roots, Xt, strict=True)])
    right = np.concatenate([r * (x @ t.T) for r, x, t in zip(roots, X, got.targets, strict=True)])
    np.testing.assert_allclose(got.W, np.linalg.lstsq(left, right, rcond=None)[0].T, atol=1e-10)
    step = np.random.default_rng(1).normal(size=got.W.shape)
    at = [oracle.objective(got.W + t * step, X, Xt, got.targets, a, got.w) for t in (-1e-3, 0.0, 1e-3)]
    assert at[1] < min(at[0], at[2])
    # A quadratic at its minimum is even along every line: the slope vanishes.
    assert abs(at[0] - at[2]) < 1e-9 * at[1]


@pytest.mark.parametrize("n_tasks", [1, 2, 3])
@pytest.mark.parametrize("camr", [None, oracle.Camr(), oracle.Camr(direction="inverse", normalize="max", scale="abs")])
def test_identical_adapters_give_that_adapter(n_tasks, camr):
    X, _, factors, W0 = problem(2, n_tasks)
    deltas = [dense(factors)[0]] * n_tasks
    got = oracle.solve_dense(X, X, deltas, W0=W0, alpha_1=1e-2, alpha_2=1e-2, camr=camr)
    np.testing.assert_allclose(got, deltas[0], atol=1e-10)


def test_solution_is_low_rank_and_equals_the_factored_formula():
    X, Xt, factors, W0 = problem(3)
    sol = oracle.solve(X, Xt, dense(factors), W0=W0, alpha_1=1e-3, alpha_2=1e-3, dcs=oracle.Dcs())
    rows = [
        sol.lam[i] * ((sol.w[i][:, None] * (X[i] @ A.T)).T @ Xt[i] + 1e-3 * np.linalg.norm(sol.C[i]) * A)
        for i, (_, A) in enumerate(factors)
    ]
    A_out = np.concatenate(rows) @ np.linalg.inv(sol.T2)
    np.testing.assert_allclose(np.concatenate([b for b, _ in factors], axis=1) @ A_out, sol.W, atol=1e-10)
    X, Xt, factors, W0 = problem(4, ranks=(1, 1, 2))
    s = np.linalg.svd(oracle.solve_dense(X, Xt, dense(factors), W0=W0), compute_uv=False)
    assert (s > 1e-12 * s[0]).sum() == 4


def test_variance_is_the_quadratic_form_and_ignores_the_base():
    X, _, factors, W0 = problem(5)
    N, B = 3, np.concatenate([b for b, _ in factors], axis=1)
    Y = X[0] @ np.concatenate([a for _, a in factors]).T
    block = np.repeat(np.arange(N), [b.shape[1] for b, _ in factors])
    K = B.T @ B
    M = np.where(block[:, None] == block, K, 0.0) / N - K / N**2
    V = oracle.dcs_variance(X[0], dense(factors))
    np.testing.assert_allclose(np.einsum("sr,rt,st->s", Y, M, Y), V, rtol=1e-10)
    np.testing.assert_allclose(oracle.dcs_variance(X[0], [d + W0 for d in dense(factors)]), V, rtol=1e-10)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("kernel", ["gaussian", "excess"])
def test_effective_sample_size_floor(unit, kernel):
    V = [unit * np.random.default_rng(i).chisquare(4, size=150) for i in range(2)]
    literal = oracle.dcs_weights(V, oracle.Dcs(min_ess=0.0, kernel=kernel))
    floored = oracle.dcs_weights(V, oracle.Dcs(min_ess=0.6, kernel=kernel))
    assert literal.tau == 1.0
    assert floored.ess >= 0.6 * 300
    np.testing.assert_allclose(np.mean(np.concatenate(floored.w)), 1.0, rtol=1e-12)
    if literal.ess >= 0.6 * 300:
        assert floored.tau == 1.0
    else:
        np.testing.assert_allclose(floored.ess, 0.6 * 300, rtol=1e-9)
    order = np.argsort(np.concatenate(V))
    assert (np.diff(np.concatenate(floored.w)[order]) <= 0).all()


def test_missing_module_counts_as_zero_delta():
    X, Xt, factors, W0 = problem(6)
    deltas = dense(factors)
    zero = [deltas[0], np.zeros_like(deltas[0]), deltas[2]]
    for mode in (0, 1):
        args = {"W0": W0, "alpha_1": 1e-3, "alpha_2": 1e-3, "with_pretrain_matrix": mode, "dcs": oracle.Dcs()}
        a = oracle.solve_dense(X, Xt, [deltas[0], None, deltas[2]], **args)
        np.testing.assert_array_equal(a, oracle.solve_dense(X, Xt, zero, **args))


def test_task_and_token_order_and_zero_coefficient():
    X, Xt, factors, W0 = problem(7)
    deltas, args = dense(factors), {"W0": W0, "alpha_1": 1e-3, "alpha_2": 1e-3, "dcs": oracle.Dcs(), "reg_ceof": 0.25}
    base = oracle.solve_dense(X, Xt, deltas, **args)
    swapped = oracle.solve_dense(X[::-1], Xt[::-1], deltas[::-1], **args)
    np.testing.assert_allclose(swapped, base, atol=1e-10)
    back = oracle.solve_dense([x[::-1] for x in X], [x[::-1] for x in Xt], deltas, **args)
    np.testing.assert_allclose(back, base, atol=1e-10)
    args.pop("dcs")  # V is pooled over all adapters, so only the plain solve can drop a task
    dropped = oracle.solve_dense(X, Xt, deltas, c=[1.0, 1.0, 0.0], **args)
    np.testing.assert_allclose(dropped, oracle.solve_dense(X[:2], Xt[:2], deltas[:2], **args), atol=1e-10)


def test_reg_ceof_in_gram_form():
    X, Xt, _, _ = problem(8)
    rho, x, t = 0.3, X[0], Xt[0]
    C, G, P = x.T @ t, t.T @ t, x.T @ x
    mixed = oracle.grams(x, oracle.mix_features(x, t, rho))
    np.testing.assert_allclose(mixed[0], (1 - rho) * C + rho * P, atol=1e-10)
    np.testing.assert_allclose(mixed[1], (1 - rho) ** 2 * G + rho * (1 - rho) * (C + C.T) + rho**2 * P, atol=1e-10)


@pytest.mark.parametrize("direction", ["document", "inverse"])
@pytest.mark.parametrize("cross", ["matched", "none"])
def test_dead_directions_are_never_amplified(direction, cross):
    X, Xt, factors, W0 = problem(9, n=12)
    for x in (*X, *Xt):
        x[:, 8:] *= 1e-9
    deltas = dense(factors)
    args = {"W0": W0, "alpha_1": 8e-5, "alpha_2": 8e-5, "camr": oracle.Camr(direction=direction, cross=cross)}
    got = oracle.solve_dense(X, Xt, deltas, **args)
    gain = np.linalg.norm(got[:, 8:]) / np.linalg.norm(sum(deltas)[:, 8:] / 3)
    assert gain < 1.5


def test_held_out_value_from_grams_differs_by_a_constant():
    X, Xt, factors, W0 = problem(10)
    sol = oracle.solve(X, Xt, dense(factors), W0=W0)
    fresh_X, fresh_Xt, _, _ = problem(11)
    grams = [oracle.grams(x, t) for x, t in zip(fresh_X, fresh_Xt, strict=True)]
    C, G = zip(*grams, strict=True)
    gaps = [
        oracle.objective(W, fresh_X, fresh_Xt, sol.targets, sol.lam)
        - oracle.held_out_from_grams(W, C, G, sol.targets, sol.lam)
        for W in (sol.W, 2.0 * sol.W)
    ]
    zero = oracle.objective(np.zeros_like(sol.W), fresh_X, fresh_Xt, sol.targets, sol.lam)
    np.testing.assert_allclose(gaps, [zero, zero], rtol=1e-10)


def net_problem(seed, depth=5, n=8, tied=False, activation="tanh"):
    g = np.random.default_rng(seed)
    modules = 1 if tied else depth
    W0 = [g.normal(size=(n, n)) / np.sqrt(n) for _ in range(modules)]
    net = oracle.ToyNet(W0, [0] * depth if tied else None, residual=True, activation=activation)
    adapters = [[0.3 * g.normal(size=(n, 2)) @ g.normal(size=(2, n)) for _ in W0] for _ in range(2)]
    return net, [g.normal(size=(60, n)) for _ in range(2)], adapters


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg_ceof": 0.3},
        {"with_pretrain_matrix": 1},
        {"camr": oracle.Camr(1e-3), "dcs": oracle.Dcs()},
    ],
)
def test_sequential_equals_jacobi_after_as_many_solves_as_modules(options):
    net, xs, adapters = net_problem(12)
    if not options:
        adapters[1][2] = None
    args = {"alpha_1": 1e-4, "alpha_2": 1e-4, **options}
    limit = oracle.sequential(net, xs, adapters, **args)
    iterates, _ = oracle.jacobi(net, xs, adapters, 5, **args)
    errors = [oracle.relative_change(limit, it) for it in iterates]
    assert errors[4] < 1e-12
    assert errors[3] > 1e-10
    mixed, images = oracle.jacobi(net, xs, adapters, 5, mats=oracle.Anderson(), **args)
    np.testing.assert_allclose(mixed[1][0], images[0][0])
    assert oracle.relative_change(limit, mixed[4]) > 1e-12, "mixing disturbs modules that are already exact"


def test_anderson_reaches_the_fixed_point_of_tied_weights():
    net, xs, adapters = net_problem(13, depth=4, tied=True)
    args = {"alpha_1": 1e-4, "alpha_2": 1e-4}
    with pytest.raises(ValueError, match="tied"):
        oracle.sequential(net, xs, adapters, **args)
    plain, _ = oracle.jacobi(net, xs, adapters, 200, **args)
    for scope in ("layer", "global"):
        mixed, _ = oracle.jacobi(net, xs, adapters, 40, mats=oracle.Anderson(reg=1e-10), mats_scope=scope, **args)
        assert oracle.relative_change(plain[-1], mixed[-1]) < 1e-8


def test_anderson_relative_solves_a_linear_map_in_as_many_steps_as_dimensions():
    g = np.random.default_rng(14)
    M, b = 0.3 * g.normal(size=(3, 3)), g.normal(size=3)
    W, G = [np.zeros(3)], []
    for _ in range(6):
        G.append(M @ W[-1] + b)
        W.append(oracle.anderson_next(W, G, oracle.Anderson(reg=1e-12)))
    np.testing.assert_allclose(W[-1], np.linalg.solve(np.eye(3) - M, b), rtol=1e-6)


def test_truncations_are_best_in_their_own_metric():
    X, Xt, factors, W0 = problem(15)
    sol = oracle.solve(X, Xt, dense(factors), W0=W0, alpha_1=1e-4, alpha_2=1e-4)
    plain, output = oracle.truncate_frobenius(sol.W, 2), oracle.truncate_output(sol.W, sol.T2, 2)
    assert np.linalg.matrix_rank(plain) == np.linalg.matrix_rank(output) == 2
    root = np.linalg.cholesky(sol.T2)  # ||E T2^{1/2}||_F = ||E L||_F for any root L L^T
    assert np.linalg.norm(sol.W - plain) < np.linalg.norm(sol.W - output)
    assert np.linalg.norm((sol.W - output) @ root) < np.linalg.norm((sol.W - plain) @ root)
    tail = np.linalg.svd(sol.W @ root, compute_uv=False)[2:]
    np.testing.assert_allclose(np.linalg.norm((sol.W - output) @ root), np.linalg.norm(tail), rtol=1e-10)
    np.testing.assert_allclose(oracle.truncate_output(sol.W, sol.T2, 6), sol.W, atol=1e-10)
