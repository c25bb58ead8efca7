"""Every data-free method through the public API on adapters on disk, against dense float64 arithmetic.

The oracles (tests/oracles) form each m x n matrix and know nothing of factors, cores, streams or blocks. They read the
factors as the files hold them, so a float32 file loses nothing before it is compared.

Tolerances, relative in the Frobenius norm by module: 1e-10 for float64 files; 2e-6 for float32 files, whose merged
factors are rounded to float32 (2^-24 = 6e-8 an entry, times sqrt(R) and the growth of a product of factors).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import loraforge as lf
from loraforge.merging.methods import METHODS
from tests.adapters import folders
from tests.merging.oracle_cases import CASES, Case
from tests.merging.scenarios import (
    SCENARIOS,
    TOLERANCE,
    Maker,
    Scenario,
    deltas_of,
    distances,
    excess,
    kept_energy,
)
from tests.oracles import elementwise, ranks, spectral
from tests.oracles.factored import best_rank_k, relative

# Tested apart: random draws (test_draws_against_oracles.py), and clusters (test_single_methods_against_oracles.py).
APART = {"dare", "dare-ties", "della", "core-dare", "lora-lego"}


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("scenarios"))


def test_every_data_free_method_has_an_oracle() -> None:
    """And every oracle a method: names that are missing on either side are listed."""
    known = {case.method for case in CASES} | APART
    free = {name for name, row in METHODS.items() if row.needs == "adapters"}
    assert (sorted(known - free), sorted(free - known)) == ([], [])


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
    ("case", "name"),
    [
        pytest.param(c, n, id=f"{c.id} [{n}]")
        for c in CASES
        if c.signed
        for n in dict.fromkeys((c.where[0], c.where[-1]))
    ],
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
