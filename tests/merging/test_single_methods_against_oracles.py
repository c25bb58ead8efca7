"""What the grid of test_against_oracles.py cannot hold: sketches, clusters, statistics and full matrices.

A sketch is compared by rank and error, clusters where only one clustering makes sense, input statistics and the task
vectors of checkpoints through the method's function itself.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import loraforge as lf
from loraforge.merging.methods import METHODS
from loraforge.types import Dense, LayerInputs, LowRank
from tests.merging.scenarios import SHAPES, Maker, merged
from tests.oracles import document, elementwise, iasad, scalars, spectral
from tests.oracles.factored import best_rank_k, relative


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("scenarios"))


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
