"""Every data-free method through the public API on adapters on disk, against dense float64 arithmetic.

The oracles (tests/oracles) form each m x n matrix and know nothing of factors, cores, streams or blocks. They read the
factors as the files hold them, so a float32 file loses nothing before it is compared.

Tolerances, relative in the Frobenius norm by module: 1e-10 for float64 files; 2e-6 for float32 files, whose merged
factors are rounded to float32 (2^-24 = 6e-8 an entry, times sqrt(R) and the growth of a product of factors).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import loraforge as lf
from loraforge.merging.methods import METHODS
from loraforge.types import Dense, LayerInputs, LowRank
from tests.adapters import folders
from tests.merging.oracle_cases import CASES, Case
from tests.merging.scenarios import (
    SCENARIOS,
    SHAPES,
    TOLERANCE,
    Maker,
    Scenario,
    deltas_of,
    distances,
    excess,
    kept_energy,
    merged,
)
from tests.oracles import document, elementwise, iasad, ranks, scalars, spectral
from tests.oracles.factored import best_rank_k, relative

# Tested apart: random draws (test_draws_against_oracles.py), and clusters that only a clear case determines (below).
APART = {"dare", "dare-ties", "della", "core-dare", "lora-lego"}


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("scenarios"))


def test_every_data_free_method_has_an_oracle() -> None:
    """And every oracle a method: names that are missing on either side are listed."""
    known = {case.method for case in CASES} | APART
    free = {name for name, row in METHODS.items() if row.needs == "adapters"}
    assert {"no such method": sorted(known - free), "no oracle": sorted(free - known)} == {
        "no such method": [],
        "no oracle": [],
    }


@pytest.mark.parametrize("name", SCENARIOS)
def test_files_hold_what_the_oracles_see(name: str, scenario: Maker) -> None:
    s = scenario(name, "float64")
    for path, content in zip(s.paths, s.contents, strict=True):
        adapter = lf.open_adapter(path)
        assert set(adapter.modules) == set(content)
        for module, pair in content.items():
            assert relative(adapter.load(module).delta(torch.float64), pair.delta) < 1e-14


def check(case: Case, s: Scenario, dtype: str, weights: list[float] | None) -> None:
    options = dict(case.options) | ({"params": dict(case.params)} if case.params else {})
    result = lf.merge(s.paths, case.method, **options, **({"weights": weights} if weights else {}))
    found = deltas_of(result)
    default = [1.0 if case.default == "one" else 1.0 / s.count] * s.count
    want = case.oracle(s, weights or default)
    away = excess(found, want, s) if case.dense else distances(found, want)
    assert {m: a for m, a in away.items() if not a <= TOLERANCE[dtype]} == {}
    if case.dense and "post" not in case.options:
        kept = {layer["module"]: layer["kept_energy"] for layer in result.report["layers"]}
        true = {m: kept_energy(found[m], want[m]) for m in want}
        assert kept == pytest.approx(true, abs=TOLERANCE[dtype])


@pytest.mark.parametrize(("case", "name"), [pytest.param(c, n, id=f"{c.id} [{n}]") for c in CASES for n in c.where])
def test_method(case: Case, name: str, scenario: Maker) -> None:
    check(case, scenario(name, "float64"), "float64", None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_method_on_float32_files(case: Case, scenario: Maker) -> None:
    check(case, scenario(case.where[0], "float32"), "float32", None)


@pytest.mark.parametrize(
    ("case", "name"), [pytest.param(c, n, id=f"{c.id} [{n}]") for c in CASES if c.signed for n in c.where]
)
def test_method_with_weights(case: Case, name: str, scenario: Maker) -> None:
    """Weights of both signs; shares of 1 where only shares have a meaning."""
    s = scenario(name, "float64")
    weights = list(case.signed or ())[: s.count]
    check(case, s, "float64", [w / sum(weights) for w in weights] if case.shares else weights)


def test_a_large_dense_result_is_cut_close_to_the_optimum(tmp_path: Path) -> None:
    """900 x 800 entries of rank 800 in an adapter of rank 6; the energy that is kept is reported exactly."""
    generator = torch.Generator().manual_seed(0)
    paths, deltas = [], []
    for name in "ab":
        B = torch.randn(900, 3, generator=generator, dtype=torch.float64)
        A = torch.randn(3, 800, generator=generator, dtype=torch.float64)
        tensors = {f"{folders.PREFIX}x.q.lora_B.weight": B, f"{folders.PREFIX}x.q.lora_A.weight": A}
        paths.append(folders.write_folder(tmp_path / name, tensors, folders.config(r=3, lora_alpha=3)))
        deltas.append((B @ A).numpy())
    want = elementwise.ties({"x.q": deltas}, [1.0, 1.0], 0.2)["x.q"]
    result = lf.merge(paths, "ties")
    found = deltas_of(result)["x.q"]
    least = best_rank_k(want, 6)[1] / np.linalg.norm(want)
    assert least <= relative(found, want) < least * (1.0 + 1e-3)
    assert result.report["kept_energy"] == pytest.approx(kept_energy(found, want), abs=1e-10)


# ---------------------------------------------------------------- rank rules


RULES = [
    ("rank", 3.0), ("energy", 0.6), ("energy", 0.95), ("energy", 1.0), ("nuclear", 0.5), ("nuclear", 0.9),
    ("ratio", 1.5), ("ratio", 4.0), ("fro_error", 0.4), ("fro_error", 0.05), ("fro_error", 0.0), (None, 0.0),
]  # fmt: skip
CLAMPS = [{}, {"min_rank": 4}, {"max_rank": 5}, {"min_rank": 2, "max_rank": 2}]


@pytest.mark.parametrize(("goal", "value"), RULES, ids=str)
def test_rank_rules(goal: str | None, value: float, scenario: Maker) -> None:
    """Ranks by trying each on the dense spectrum, and the best approximation of that rank."""
    s = scenario("mixed", "float64")
    given = {} if goal is None else {goal: int(value) if goal == "rank" else value}
    # Without any rule nothing is cut, not even what is more than min(m, n).
    for clamp in CLAMPS if goal else [c for c in CLAMPS if "max_rank" in c]:
        result = lf.merge(s.paths, "task-arithmetic", **given, **clamp)
        for m, deltas in s.deltas.items():
            W = spectral.total(deltas, [1.0] * s.count)
            k = ranks.chosen(np.linalg.svd(W, compute_uv=False), goal, value, **clamp)
            assert result.modules[m].rank == k, (m, clamp)
            assert relative(result.modules[m].delta(torch.float64), best_rank_k(W, k)[0]) < 1e-10


@pytest.mark.parametrize("share", [0.1, 0.35, 0.8, 2.0])
def test_budget(share: float, scenario: Maker) -> None:
    s = scenario("mixed", "float64")
    sums = {m: spectral.total(d, [1.0] * s.count) for m, d in s.deltas.items()}
    spectra = {m: (np.linalg.svd(W, compute_uv=False), *W.shape) for m, W in sums.items()}
    whole = sum(spectral.support(S) * (m + n) for S, m, n in spectra.values())
    least = sum(m + n for _, m, n in spectra.values())
    budget = least + int(share * (whole - least))
    result = lf.merge(s.paths, "task-arithmetic", budget=budget)
    want = ranks.budgeted(spectra, budget)
    assert {m: pair.rank for m, pair in result.modules.items()} == want
    assert sum(pair.B.numel() + pair.A.numel() for pair in result.modules.values()) <= budget
    away = distances(deltas_of(result), {m: best_rank_k(W, want[m])[0] for m, W in sums.items()})
    assert max(away.values()) < 1e-10


# ---------------------------------------------------------------- the document, and what it leaves open


def test_document_compat_where_the_sketch_holds_all(scenario: Maker) -> None:
    """R = 16 at most: a sketch of 16 columns finds everything whatever its seed; float32 inside, as published."""
    s = scenario("equal", "float32")
    params = {"document_compat": True, "min_rank": 16, "max_rank": 16}
    found = merged(s.paths, "rsvd", params=params)
    for m in s.modules:
        one, two = s.pairs(m)
        alphas = [p.scaling * p.A.shape[0] for p in (one, two)]
        want = document.document_mix([one.B, two.B], [one.A, two.A], alphas)
        assert relative(found[m], want) < 2e-5, m


def test_document_compat_with_its_own_ranks(scenario: Maker) -> None:
    """Rank and, within what two random sketches of one width may differ by, the error of the published steps."""
    s = scenario("equal", "float32")
    result = lf.merge(s.paths, "rsvd", params={"document_compat": True, "seed": 3})
    for m in s.modules:
        one, two = s.pairs(m)
        sides = [one.B, two.B], [one.A, two.A], [p.scaling * p.A.shape[0] for p in (one, two)]
        mix = document.document_mix(*sides)
        want, q, k = document.document_rsvd(*sides, seed=3)
        assert result.modules[m].rank == min(k, np.linalg.matrix_rank(mix)), (m, q, k)
        lost = np.linalg.norm(result.modules[m].delta(torch.float64).numpy() - mix) / np.linalg.norm(mix)
        assert lost <= 1.1 * np.linalg.norm(want - mix) / np.linalg.norm(mix) + 1e-5, m


def test_rsvd_sketch_is_nearly_the_optimum(scenario: Maker) -> None:
    """Eight more columns and two power steps: at most 2 % above Eckart and Young, and never below."""
    s = scenario("full", "float64")
    result = lf.merge(s.paths, "rsvd", rank=8, params={"exact": "never"})
    for m, deltas in s.deltas.items():
        W = spectral.total(deltas, [0.5, 0.5])
        least = best_rank_k(W, 8)[1]
        lost = np.linalg.norm(result.modules[m].delta(torch.float64).numpy() - W)
        assert least - 1e-10 <= lost <= 1.02 * least + 1e-10, m


@pytest.mark.parametrize("kinds", [4, 2])
def test_lora_lego_on_clear_clusters(kinds: int) -> None:
    """Three adapters with four units each, of 4 or 2 kinds but for 1e-3, factorised differently: clusters are kinds."""
    rng = np.random.default_rng(0)
    B, A = (np.tile(rng.standard_normal((size, kinds)), 4 // kinds) for size in (12, 9))
    A = A.T
    pairs = []
    for size in (1.0, 4.0, 0.25):
        signs = np.array([1.0, -1.0, 1.0, -1.0]) * size
        noisy = B + 1e-3 * rng.standard_normal(B.shape), A + 1e-3 * rng.standard_normal(A.shape)
        order = rng.permutation(4)
        pairs.append(((noisy[0] * signs)[:, order], (noisy[1] / signs[:, None])[order], order))
    layer = LayerInputs(
        "m", [LowRank(torch.from_numpy(b), torch.from_numpy(a)) for b, a, _ in pairs], [1.0] * 3, ("a", "b", "c")
    )
    row = METHODS["lora-lego"]
    found = row.load_function()(layer, row.make_params({"clusters": kinds})).delta(torch.float64).numpy()
    units, labels = [], []
    for b, a, order in pairs:
        for (x, y), label in zip(document.balanced_units(b, a), order, strict=True):
            sign = np.sign(x @ B[:, label])
            units.append((sign * x, sign * y))
            labels.append(int(label) % kinds)
    assert relative(found, document.lego(units, labels, 4.0)) < 1e-10


TASK_VECTORS = {
    "task-arithmetic": spectral.total,
    "iso-c": spectral.total,
    "iso-cts": lambda D, w: spectral.iso_cts(D, w, 0.8, q=9),
    "iso-iasad": lambda D, w: iasad.iso_iasad(D, w, [9, 9, 9]),
    "tsv": lambda D, w: spectral.tsv(D, w, k=3),
    "ties": lambda D, w: elementwise.ties({"m": D}, w, 0.2)["m"],
    "magnitude-prune": lambda D, w: elementwise.magnitude_prune({"m": D}, w, 0.2)["m"],
    "breadcrumbs": elementwise.breadcrumbs,
    "karcher": lambda D, w: scalars.karcher([d.ravel() for d in D], w).reshape(12, 9),
    "model-stock": lambda D, w: scalars.model_stock([d.ravel() for d in D]).reshape(12, 9),
}


@pytest.mark.parametrize("method", TASK_VECTORS)
def test_method_on_task_vectors(method: str) -> None:
    """Full matrices instead of factors, as of checkpoints; the flattening of the iso family comes after."""
    rng = np.random.default_rng(4)
    shared = rng.standard_normal((12, 9))
    D = [shared + rng.standard_normal((12, 9)) for _ in range(3)]
    row = METHODS[method]
    weights = [1 / 3] * 3 if row.default_weight == "mean" else [1.0, 0.5, -0.2]
    layer = LayerInputs("m", [Dense(torch.from_numpy(d)) for d in D], weights, ("a", "b", "c"), [None] * 3)
    known = {f.name for f in dataclasses.fields(row.params_class())}
    params = row.make_params({"scope": "module"} if "scope" in known else {})
    found = row.load_function()(layer, params).delta(torch.float64).numpy()
    assert row.checkpoints and relative(found, TASK_VECTORS[method](D, weights)) < 1e-10


def test_iasad_reads_its_statistics(scenario: Maker) -> None:
    """Through the method itself: input statistics scale the columns while the split is sought."""
    s = scenario("full", "float64")
    row = METHODS["iso-iasad"]
    rng = np.random.default_rng(1)
    for options in ({}, {"prune_level": "element"}, {"keep": "smallest", "final_svd": "off"}):
        params = row.make_params({"rank_basis": "lora", **options})
        said = {**options, "final_svd": options.get("final_svd") != "off"}
        for m in s.modules:
            stats = [rng.chisquare(1, SHAPES[m][1]) + 0.01 for _ in range(2)]
            stats[0][0] = 0.0  # an input that is never active
            layer = LayerInputs(
                m,
                [LowRank(torch.from_numpy(p.B), torch.from_numpy(p.A), p.scaling) for p in s.pairs(m)],
                [1.0, -0.5],
                ("a", "b"),
                [torch.from_numpy(x) for x in stats],
            )
            found = row.load_function()(layer, params).delta(torch.float64).numpy()
            want = iasad.iso_iasad(s.deltas[m], [1.0, -0.5], s.ranks(m), stats, rank_basis="lora", **said)
            assert relative(found, want) < 1e-10, (m, options)


def test_svc_leaves_tasks_alone_that_share_nothing() -> None:
    """Orthogonal deltas: nothing is counted twice, the sum stays."""
    D = [np.diag([3.0, 2.0, 0.0, 0.0]), np.diag([0.0, 0.0, 1.0, 4.0])]
    row = METHODS["svc"]
    eye = torch.eye(4, dtype=torch.float64)
    layer = LayerInputs("m", [LowRank(torch.from_numpy(d), eye) for d in D], [1.0, 1.0], ("a", "b"), [None, None])
    found = row.load_function()(layer, row.make_params({})).delta(torch.float64).numpy()
    assert relative(found, spectral.svc(D, [1.0, 1.0], 0.1)) < 1e-10
