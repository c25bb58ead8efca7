"""Several runs together, and one run over time, against plain formulas on dense numbers."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from loraforge.measure.analysis.aggregate import aggregate
from loraforge.measure.analysis.compare import compare
from loraforge.measure.analysis.seeds import paired_difference, stability
from loraforge.measure.updates.paths import measure_path
from tests.measure.oracle_bases import Case, build
from tests.measure.test_against_oracle_statistics import make_run, write_run
from tests.oracles import heads as parts
from tests.oracles import heads_stats as oracle
from tests.oracles.heads import Shape

FIVE = (
    "spearman_rho_Ipre_U", "spearman_rho_Ipre_Urel", "topk_overlap_Ipre_U", "n_important_but_static",
    "n_plastic_but_unimportant",
)  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[list[dict[str, Any]]]]:
    """Two measured runs whose records say nothing, and their rows."""
    folder = tmp_path_factory.mktemp("pair")
    runs = [make_run(6, 8, seed=seed) for seed in (11, 12)]
    folders = [write_run(folder / name / "seed1", run) for name, run in zip(("FFT", "LoRA"), runs, strict=True)]
    for each in folders:
        aggregate(each, draws=50)
    return folders, [oracle.join(run) for run in runs]


def test_the_documents_comparison(pair: Any, tmp_path: Path) -> None:
    folders, rows = pair
    compare(folders, tmp_path / "out", names=["FFT", "LoRA-r8"], profile="document", report=False, draws=50)
    found = json.loads((tmp_path / "out" / "compare_metrics.json").read_text())
    assert list(found) == ["FFT", "LoRA-r8"]
    for values, run in zip(found.values(), rows, strict=True):
        expected = oracle.stats(run)
        assert list(values) == list(FIVE)
        assert values == pytest.approx({name: expected[name] for name in FIVE}, abs=1e-12)


def test_methods_head_by_head(pair: Any, tmp_path: Path) -> None:
    folders, rows = pair
    text = json.dumps(compare(folders, tmp_path / "out", names=["a", "b"], report=False, draws=50), default=str)
    numbers = _numbers(json.loads(text))
    for name in ("U", "Urel", "I_post"):
        x, y = ([row[name] for row in run] for run in rows)
        rho = oracle.spearman(x, y)
        assert any(abs(number - rho) < 1e-12 for number in numbers), f"rho of {name} between the methods"
    lines = (tmp_path / "out" / "heads_joined.csv").read_text().splitlines()
    header = lines[0].split(",")
    assert len(lines) == 49
    for line, a, b in zip(lines[1:], *rows, strict=True):
        cells = dict(zip(header, line.split(","), strict=True))
        assert (int(cells["layer"]), int(cells["head"])) == (a["layer"], a["head"])
        for name, row in (("a", a), ("b", b)):
            assert float(cells[f"Urel_{name}"]) == row["Urel"]
            assert float(cells[f"I_post_{name}"]) == row["I_post"]


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [x for item in value for x in _numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_agreement_of_seeds(ties: bool) -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal(30) + 0.8 * rng.standard_normal((4, 30))
    x = x.round(0) if ties else x
    found = stability(list(x))
    rhos = [oracle.spearman(list(a), list(b)) for a, b in itertools.combinations(x, 2)]
    assert found["rho"] == pytest.approx(np.mean(rhos), abs=1e-12)
    ranks, (m, n) = np.stack([oracle.average_ranks(list(a)) for a in x]), x.shape
    spread = ((ranks.sum(0) - m * (n + 1) / 2) ** 2).sum()
    correction = sum(sum(c**3 - c for c in np.unique(a, return_counts=True)[1]) for a in x)
    assert found["kendall_w"] == pytest.approx(12 * spread / (m**2 * (n**3 - n) - m * correction), abs=1e-12)
    if not ties:
        assert found["rho"] == pytest.approx((m * found["kendall_w"] - 1) / (m - 1), abs=1e-12)  # Kendall, 1948


def test_a_difference_of_methods_over_seeds() -> None:
    a, b = {1: 0.3, 2: 0.5, 42: 0.4, 7: 0.9}, {1: 0.1, 2: 0.2, 42: 0.35, 9: 0.0}
    found = paired_difference(a, b)
    test = scipy_stats.ttest_rel([a[s] for s in (1, 2, 42)], [b[s] for s in (1, 2, 42)])
    low, high = test.confidence_interval(0.95)
    assert found["difference"] == pytest.approx(np.mean([0.2, 0.3, 0.05]))
    assert found["noise"] == pytest.approx(np.std([0.2, 0.3, 0.05], ddof=1))
    assert found["ci"] == pytest.approx([low, high])
    assert found["larger"] == (low > 0)


def test_the_way_through_training(tmp_path: Path) -> None:
    shape, steps = Shape(6, 2, 4, 4), (3, 10, 40)
    case = Case("llama", shape)
    built = [build(tmp_path / str(step), replace(case, alpha=3.0 * i), seed=i) for i, step in enumerate(steps, 1)]
    for step, each in zip(steps, built, strict=True):
        shutil.copytree(each.adapter, tmp_path / "snapshots" / f"step-{step}")
    result = measure_path(tmp_path / "snapshots", config=case.config)
    assert result["steps"] in ([0, *steps], list(steps))
    lines = {(line["layer"], line["head"]): line for line in result["heads"]}
    was: list[dict[str, np.ndarray]] = [{part: 0 * x for part, x in layer.items()} for layer in built[0].change]
    length = dict.fromkeys(lines, 0.0)
    for each in built:
        for layer, now in enumerate(each.change):
            stretch = {part: now[part] - was[layer][part] for part in now}
            for head in range(shape.n_q):
                length[layer, head] += parts.update_line(stretch, None, head, shape)["U"]
        was = each.change
    expected = parts.update_lines(was, None, shape)
    assert len(lines) == len(expected) == 12
    for key, line in lines.items():
        assert line["path"] == pytest.approx(length[key], rel=1e-10)
        assert line["net"] == pytest.approx(expected[key]["U"], rel=1e-10)
        assert line["net_over_path"] == pytest.approx(expected[key]["U"] / length[key], rel=1e-10)
