"""heads.csv, stats.json and cases.json of a run, and the statistics behind them, against the oracle."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraforge.measure.analysis.aggregate import aggregate
from loraforge.measure.analysis.null import common_members, rho_band
from loraforge.measure.analysis.statistics import find_cases, spearman, top_k, top_overlap
from tests.oracles import heads_stats as oracle

CLOSE = 1e-12  # float64 sums of some hundred numbers
FILES = {
    "pre": "importance_pre.jsonl", "post": "importance_post.jsonl", "fisher": "gradfisher_pre.jsonl",
    "update": "update.jsonl",
}  # fmt: skip
Run = dict[str, list[dict[str, Any]]]


def make_run(layers: int = 12, heads: int = 12, seed: int = 0, ties: bool = False) -> Run:
    """Lines as the document's scripts write them: those keys and no others."""
    rng = np.random.default_rng(seed)
    run: Run = {name: [] for name in FILES}
    for layer in range(layers):
        for head in range(heads):
            at = {"layer": layer, "head": head}
            pre, post = rng.standard_normal(2) * 0.01
            if ties:
                pre = round(pre, 2)
            for name, value in (("pre", pre), ("post", post)):
                line = {"I": float(value), "loss_base": 0.69, "loss_ablate": 0.69 + float(value), "n": 277}
                run[name].append(at | line)
            G, F = (float(x) for x in rng.random(2))
            run["fisher"].append(at | {"G": G, "F": F, "Ppred": G**2 / (F + 1e-6), "n_batches": 18})
            u = {f"U{part}": float(x) for part, x in zip("qkvo", rng.random(4), strict=True)}
            U = sum(x * x for x in u.values()) ** 0.5
            run["update"].append(at | {"U": U, "Urel": U / (10 + float(rng.random()))} | u)
    return run


def write_run(folder: Path, run: Run) -> Path:
    folder.mkdir(parents=True)
    for name, lines in run.items():
        if lines:
            (folder / FILES[name]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def without_post(run: Run) -> Run:
    return run | {"post": []}


def without_fisher(run: Run) -> Run:
    return run | {"fisher": []}


def with_gaps(run: Run) -> Run:
    """Some heads are not in every file; `post` and `update` have one that `pre` does not have."""
    extra = {"layer": 99, "head": 0}
    return {
        "pre": run["pre"],
        "post": run["post"][5:] + [run["post"][0] | extra],
        "fisher": run["fisher"][:-7],
        "update": run["update"] + [run["update"][0] | extra],
    }


def shuffled(run: Run) -> Run:
    rng = np.random.default_rng(9)
    return {name: [lines[i] for i in rng.permutation(len(lines))] for name, lines in run.items()}


def with_nulls(run: Run) -> Run:
    """Numbers that could not be measured are null in the files."""
    run["pre"][3]["I"] = run["post"][4]["I"] = run["update"][5]["Urel"] = run["fisher"][6]["Ppred"] = None
    return run


RUNS = {
    "whole": make_run(),
    "other": make_run(6, 8, seed=1),
    "ties": make_run(6, 8, seed=2, ties=True),
    "few-heads": make_run(3, 5, seed=3),
    "no-post": without_post(make_run(6, 8, seed=4)),
    "no-fisher": without_fisher(make_run(6, 8, seed=5)),
    "gaps": with_gaps(make_run(6, 8, seed=6)),
    "nulls": with_nulls(make_run(6, 8, seed=8)),
    "any-order": shuffled(make_run(6, 8, seed=7)),
}


@pytest.fixture(scope="module", params=list(RUNS))
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    run = RUNS[request.param]
    folder = write_run(tmp_path_factory.mktemp("run") / "seed1", run)
    aggregate(folder, draws=200)
    return folder, oracle.join({name: lines for name, lines in run.items() if lines})


def load(path: Path) -> Any:
    def refuse(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        assert name in found, name
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, abs=CLOSE), name
        else:
            assert found[name] == value, name


def test_heads_csv(done: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = done
    found = list(csv.reader((folder / "heads.csv").read_text().splitlines()))
    width = len(oracle.COLUMNS)
    first_columns = "\n".join(",".join(line[:width]) for line in found) + "\n"
    assert first_columns == oracle.csv_text(rows)


def test_stats_json(done: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = done
    same(load(folder / "stats.json"), oracle.stats(rows, min(20, len(rows))))


def test_cases_json(done: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = done
    found, expected = load(folder / "cases.json"), oracle.cases(rows)
    same(found["thresholds"], expected["thresholds"])
    for name in ("important_but_static", "plastic_but_unimportant"):
        assert [(case["layer"], case["head"]) for case in found[name]] == [
            (c["layer"], c["head"]) for c in expected[name]
        ]
        for case, wanted in zip(found[name], expected[name], strict=True):
            same(case, wanted)


def test_the_documents_profile_writes_the_documents_files_and_nothing_else(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "seed1", RUNS["whole"])
    aggregate(folder, profile="document", draws=200)
    rows = oracle.join(RUNS["whole"])
    assert (folder / "heads.csv").read_text() == oracle.csv_text(rows)
    stats, cases = load(folder / "stats.json"), load(folder / "cases.json")
    same(stats, oracle.stats(rows))
    assert set(stats) - {"null"} <= set(oracle.stats(rows))
    same(cases, oracle.cases(rows))


@pytest.mark.parametrize(
    "options", [{"topk": 7}, {"hi": 80, "lo": 40}, {"hi": 75, "lo": 12.5}], ids=["k", "wide", "odd"]
)
def test_other_settings(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = write_run(tmp_path / "seed1", RUNS["other"])
    aggregate(folder, draws=200, **options)
    rows = oracle.join(RUNS["other"])
    stats, expected = load(folder / "stats.json"), oracle.stats(rows, options.get("topk", 20))
    cases = oracle.cases(rows, options.get("hi", 90), options.get("lo", 30))
    for name in ("important_but_static", "plastic_but_unimportant"):
        expected[f"n_{name}"] = len(cases[name])
    same(stats, expected)
    found = load(folder / "cases.json")
    same({key: found["thresholds"].get(key) for key in cases["thresholds"]}, cases["thresholds"])


def test_chance_levels_stand_beside_the_numbers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "seed1", RUNS["whole"])
    aggregate(folder, draws=200)
    null = json.dumps(load(folder / "stats.json")["null"])
    for name in ("rho95", "p_perm", "expected"):
        assert name in null
    numbers = _numbers(json.loads(null))
    assert any(abs(x - 20 / 144) < 1e-9 for x in numbers), "expected overlap"
    assert any(abs(x - 15 * 43 / 144) < 1e-9 for x in numbers), "expected cases"
    assert any(abs(x - oracle.null_rho95(144)) < 0.004 for x in numbers), "band of rho"  # 20000 draws: 0.001


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [x for item in value for x in _numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def columns(n: int, seed: int, ties: bool) -> Sequence[np.ndarray]:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, n))
    y += 0.3 * x
    return (x.round(1), y.round(1)) if ties else (x, y)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("n", [2, 3, 11, 144])
def test_functions_on_columns(n: int, ties: bool) -> None:
    x, y = columns(n, n, ties)
    assert spearman(x, y) == pytest.approx(oracle.spearman(x, y), abs=CLOSE)
    for k in (1, 2, min(20, n)):
        assert set(top_k(x, k)) == oracle.top(x, k)
        assert top_overlap(x, y, k)["overlap"] == pytest.approx(oracle.overlap(x, y, k))
    rows = [
        dict.fromkeys(oracle.COLUMNS) | {"head": i, "I_pre": float(a), "Urel": float(b)}
        for i, (a, b) in enumerate(zip(x, y, strict=True))
    ]
    for hi, lo in ((90, 30), (75, 25), (50, 50)):
        found, expected = find_cases(x, y, hi=hi, lo=lo), oracle.cases(rows, hi, lo)
        assert found.static == [case["head"] for case in expected["important_but_static"]]
        assert found.plastic == [case["head"] for case in expected["plastic_but_unimportant"]]


def test_functions_on_columns_with_gaps() -> None:
    x, y = columns(50, 1, False)
    x[3], x[7], y[9], y[30] = np.nan, np.inf, np.nan, -np.inf
    assert spearman(x, y) == pytest.approx(oracle.spearman(x, y), abs=CLOSE)
    assert set(top_k(x, 6)) == oracle.top(x, 6)
    assert spearman(np.ones(9), np.arange(9)) is None


@pytest.mark.parametrize("n", [10, 24, 31, 144, 384])
def test_band_of_rho_against_permutations(n: int) -> None:
    # Noise of the 95 % quantile of 20000 draws is about 1 % of it; below 30 pairs rho is coarse.
    assert rho_band(n) == pytest.approx(oracle.null_rho95(n), rel=0.03, abs=0.002)


def test_common_members_against_permutations() -> None:
    chance, counts = common_members(9, 144, 15, 43), oracle.null_cases(144)
    assert chance is not None
    assert chance.expected == pytest.approx(counts.mean(), abs=0.05)
    assert tuple(chance.range95) == (2, 8)
    assert chance.p == pytest.approx((counts >= 9).mean(), abs=0.003)
    overlap = top_overlap(np.arange(144.0), np.arange(144.0), 20)
    assert overlap["expected"] == pytest.approx(oracle.null_overlap(144, 20), abs=0.003)
