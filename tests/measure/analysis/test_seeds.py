"""Several runs together, against plain loops and scipy."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import friedmanchisquare, spearmanr, ttest_rel

from loraforge.errors import LoraforgeError, UsageError
from loraforge.measure.analysis.joined import join_heads
from loraforge.measure.analysis.runs import open_run
from loraforge.measure.analysis.seeds import paired_difference, stability, summarise
from tests.measure.golden import drawn_run, write_run


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FFT and LoRA on RTE with three seeds, FFT on MNLI with two; the folders' names alone say so."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (1, 2, 3):
        drawn_run(root / "FFT" / "RTE" / f"seed{seed}", seed)
        drawn_run(root / "LoRA" / "RTE" / f"seed{seed}_r8", 10 + seed, moves=2.0)
    for seed in (1, 2):
        drawn_run(root / "FFT" / "MNLI" / f"seed{seed}", 20 + seed)
    return root


@pytest.fixture(scope="module")
def found(tree: Path) -> dict[str, Any]:
    folders = sorted(path.parent for path in tree.rglob("update.jsonl"))
    return summarise(folders, tree / "all", report=False)


def test_spread_of_each_statistic(tree: Path, found: dict[str, Any]) -> None:
    values = [
        json.loads((tree / "LoRA" / "RTE" / f"seed{seed}_r8" / "stats.json").read_text())["spearman_rho_Ipre_U"]
        for seed in (1, 2, 3)
    ]
    spread = found["statistics"]["LoRA-r8"]["RTE"]["spearman_rho_Ipre_U"]
    expected = {"mean": np.mean(values), "sd": np.std(values, ddof=1), "min": min(values), "max": max(values), "n": 3}
    assert {key: spread[key] for key in expected} == pytest.approx(expected) and spread["values"] == values
    assert set(found["statistics"]) == {"FFT", "LoRA-r8"} and set(found["statistics"]["FFT"]) == {"RTE", "MNLI"}
    assert {(run["name"], run["task"], run["seed"], run["rank"]) for run in found["runs"]} >= {
        ("LoRA-r8", "RTE", 3, 8), ("FFT", "MNLI", 2, None),
    }  # fmt: skip


def test_stability_of_the_heads_over_seeds(tree: Path, found: dict[str, Any]) -> None:
    columns = [join_heads(tree / "FFT" / "RTE" / f"seed{seed}").columns["I_post"] for seed in (1, 2, 3)]
    row = found["stability"]["FFT"]["RTE"]["I_post"]
    rhos = [spearmanr(a, b).statistic for a, b in combinations(columns, 2)]
    assert row["rho"] == pytest.approx(np.mean(rhos), abs=1e-13) and row["n"] == 36 and row["seeds"] == 3
    # Without ties the mean of the pairwise rhos and W say the same: rho = (3 W - 1) / 2 for three seeds.
    assert row["kendall_w"] == pytest.approx((2 * row["rho"] + 1) / 3, abs=1e-12)
    # One I_pre for all seeds, as for runs from one start.
    assert found["stability"]["FFT"]["RTE"]["I_pre"]["kendall_w"] == pytest.approx(1)


def test_kendalls_w_with_ties_is_friedmans() -> None:
    random = np.random.default_rng(3)
    columns = random.integers(5, size=(4, 20)).astype(float)
    friedman = friedmanchisquare(*columns.T)
    found = stability(columns)
    assert found["kendall_w"] == pytest.approx(friedman.statistic / (4 * 19)) and found["p"] == pytest.approx(
        friedman.pvalue
    )


def test_stability_where_there_is_nothing_to_compare() -> None:
    assert stability([[1.0, 2.0]])["rho"] is None
    assert stability([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])["kendall_w"] is None
    holes = stability([[1.0, 2.0, 3.0, np.nan], [1.0, 2.0, 3.0, 0.0]])
    assert holes["n"] == 3 and holes["rho"] == pytest.approx(1)


def test_differences_between_methods_are_paired_by_seed() -> None:
    a, b = {1: 0.5, 2: 0.7, 3: 0.4, 9: 5.0}, {3: 0.1, 1: 0.1, 2: 0.35}
    found = paired_difference(a, b)
    interval = ttest_rel([0.5, 0.7, 0.4], [0.1, 0.35, 0.1]).confidence_interval(0.95)
    assert found["seeds"] == [1, 2, 3] and found["difference"] == pytest.approx(0.35)
    assert found["ci"] == pytest.approx([interval.low, interval.high]) and found["larger"] is True
    assert paired_difference({1: 0.5, 2: -0.5}, {1: 0.0, 2: 0.0})["larger"] is False
    single = paired_difference({1: 0.5, 2: None}, {1: 0.1, 2: 0.3})
    assert single["larger"] is None and single["difference"] == pytest.approx(0.4) and "unknown" in single["reason"]
    assert paired_difference({1: 0.5}, {2: 0.5})["difference"] is None
    alike = paired_difference({1: 0.35, 2: 0.45}, {1: 0.15, 2: 0.25})
    assert alike["larger"] is None and alike["ci"] is None and "same difference" in alike["reason"]


def test_the_planted_difference_is_found_and_others_are_not_claimed_across_tasks(found: dict[str, Any]) -> None:
    rows = {row["key"]: row for row in found["differences"]}
    assert {row["task"] for row in found["differences"]} == {"RTE"}
    assert rows["spearman_rho_Ipre_U"]["larger"] is True and rows["spearman_rho_Ipre_U"]["seeds"] == [1, 2, 3]
    assert not {"topk", "n_heads"} & set(rows)


def test_tasks_by_the_means_over_seeds(tree: Path, found: dict[str, Any]) -> None:
    def mean(task: str, seeds: tuple[int, ...]) -> np.ndarray:
        return np.mean([join_heads(tree / "FFT" / task / f"seed{s}").columns["I_post"] for s in seeds], axis=0)

    rows = {(row["method"], row["quantity"]): row for row in found["cross_task"]}
    assert set(rows) == {("FFT", "I_post"), ("FFT", "U")}
    expected = spearmanr(mean("RTE", (1, 2, 3)), mean("MNLI", (1, 2))).statistic
    assert rows["FFT", "I_post"]["rho"] == pytest.approx(expected) and rows["FFT", "I_post"]["p_perm"] < 0.01
    assert {rows["FFT", "I_post"]["a"], rows["FFT", "I_post"]["b"]} == {"RTE", "MNLI"}


def test_the_text_has_every_table(tree: Path, found: dict[str, Any]) -> None:
    text = (tree / "all" / "seeds.md").read_text(encoding="utf-8")
    for heading in ("## FFT on RTE, seeds 1, 2, 3", "## Methods, paired by seed", "## Tasks", "Kendall W"):
        assert heading in text
    assert json.loads((tree / "all" / "seeds.json").read_text(encoding="utf-8")) == json.loads(json.dumps(found))


def test_a_single_seed_has_no_spread(tmp_path: Path) -> None:
    alone = summarise([write_run(tmp_path / "run", method="LoRA", task="RTE", seed=1, rank=4)], tmp_path, report=False)
    spread = alone["statistics"]["LoRA-r4"]["RTE"]["spearman_rho_Ipre_U"]
    assert spread["sd"] is None and spread["n"] == 1 and spread["mean"] is not None
    assert alone["notes"] == ["one seed alone, so no spread: LoRA-r4 on RTE"]


def test_what_cannot_be_summarised(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run"):
        summarise([], tmp_path)
    twice = [write_run(tmp_path / name, method="FFT", task="RTE", seed=1) for name in ("a", "b")]
    with pytest.raises(LoraforgeError, match="same method, task and seed"):
        summarise(twice, tmp_path / "out")
    with pytest.raises(LoraforgeError, match="no such run"):
        summarise([tmp_path / "nowhere"], tmp_path / "out")


def test_what_a_run_is_called(tmp_path: Path) -> None:
    by_folder = open_run(write_run(tmp_path / "LoRA" / "RTE" / "seed42_r16"))
    assert (by_folder.name, by_folder.task, by_folder.seed) == ("LoRA-r16", "RTE", 42)
    recorded = open_run(write_run(tmp_path / "x", method="full", task={"id": "mnli"}, seed=7, r=None))
    assert (recorded.name, recorded.task, recorded.seed, recorded.rank) == ("FFT", "mnli", 7, None)
    # The document's record: its arguments, and the method for LoRA.
    document = open_run(write_run(tmp_path / "y", method="LoRA", task="RTE", seed=1, lora_r=8))
    assert document.name == "LoRA-r8"
    assert open_run(write_run(tmp_path / "plain")).name == "plain"
    (tmp_path / "x" / "run_config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(LoraforgeError, match="no object"):
        open_run(tmp_path / "x")
