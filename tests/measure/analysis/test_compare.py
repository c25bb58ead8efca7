"""Two methods beside each other: numbers, refusals, and findings that claim nothing within chance."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from loraforge.errors import InputProblems, LoraforgeError, UsageError
from loraforge.measure.analysis.compare import compare
from loraforge.measure.analysis.joined import join_heads
from loraforge.measure.analysis.summary import find_differences
from tests.measure.golden import drawn_run, write_run

DOCUMENT = {
    "spearman_rho_Ipre_U", "spearman_rho_Ipre_Urel", "topk_overlap_Ipre_U", "n_important_but_static",
    "n_plastic_but_unimportant",
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Full fine-tuning, whose update has nothing to do with importance, and LoRA, whose update follows it."""
    root = tmp_path_factory.mktemp("pair")
    about = {"task": "RTE", "seed": 1, "base_sha256": "aa", "theta0_sha256": "cc"}
    return [
        drawn_run(root / "one", 1, method="FFT", **about),
        drawn_run(root / "two", 2, moves=2.0, method="LoRA", rank=8, **about),
    ]


@pytest.fixture(scope="module")
def made(pair: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("compared") / "out"
    return compare(pair, out, report=False), out


def test_the_documents_keys_by_method(made: tuple[dict[str, Any], Path], pair: list[Path], tmp_path: Path) -> None:
    metrics = json.loads((made[1] / "compare_metrics.json").read_text(encoding="utf-8"))
    assert list(metrics) == ["FFT", "LoRA-r8", "comparison"] and set(metrics["FFT"]) >= DOCUMENT
    compare(pair, tmp_path / "out", profile="document", report=False)
    plain = json.loads((tmp_path / "out" / "compare_metrics.json").read_text(encoding="utf-8"))
    assert {name: set(keys) for name, keys in plain.items()} == {"FFT": DOCUMENT, "LoRA-r8": DOCUMENT}
    assert plain["FFT"] == {key: metrics["FFT"][key] for key in DOCUMENT}


def test_differences_have_intervals(made: tuple[dict[str, Any], Path], pair: list[Path]) -> None:
    one, two = (join_heads(folder).columns for folder in pair)
    (found,) = made[0]["comparison"]["pairs"]
    rhos = [spearmanr(c["I_pre"], c["Urel"]).statistic for c in (one, two)]
    delta = found["deltas"]["spearman_rho_Ipre_Urel"]
    assert [delta["a"], delta["b"], delta["difference"]] == pytest.approx([*rhos, rhos[0] - rhos[1]])
    assert delta["ci"][0] <= delta["difference"] <= delta["ci"][1] < 0 and delta["beyond_chance"] is True
    # The resample by plain loops: the same heads for both methods.
    random, drawn = np.random.default_rng(11), []
    for _ in range(400):
        chosen = random.integers(36, size=36)
        a, b = (spearmanr(c["I_pre"][chosen], c["Urel"][chosen]).statistic for c in (one, two))
        drawn.append(a - b)
    # Quantiles of 400 draws of this spread are known to about a tenth of it.
    assert delta["ci"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.4 * np.std(drawn))


def test_the_same_column_of_both_methods(made: tuple[dict[str, Any], Path], pair: list[Path]) -> None:
    one, two = (join_heads(folder).columns for folder in pair)
    (found,) = made[0]["comparison"]["pairs"]
    # One start: the importance before training is one measurement and says nothing.
    assert found["same_start"] is True and set(found["between"]) == {"U", "Urel", "I_post"}
    for name, row in found["between"].items():
        assert row["rho"] == pytest.approx(spearmanr(one[name], two[name]).statistic)
    flipped = [i for i in range(36) if one["I_post"][i] * two["I_post"][i] < 0]
    sure = [i for i in flipped if abs(one["I_post"][i]) > 0.1 and abs(two["I_post"][i]) > 0.1]
    assert found["sign_changes"]["n"] == len(flipped) and found["sign_changes"]["both_significant"] == len(sure)
    assert [(h["layer"] * 6 + h["head"]) for h in found["sign_changes"]["heads"]] == flipped


def test_the_joined_table(made: tuple[dict[str, Any], Path], pair: list[Path]) -> None:
    rows = list(csv.DictReader((made[1] / "heads_joined.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 36 and list(rows[0])[:5] == ["layer", "head", "stack", "kind", "I_pre_FFT"]
    assert float(rows[7]["Urel_LoRA-r8"]) == join_heads(pair[1]).columns["Urel"][7]


def test_the_summary_has_the_documents_sections(made: tuple[dict[str, Any], Path]) -> None:
    text = (made[1] / "compare_summary.txt").read_text(encoding="utf-8")
    for heading in ("Rank correlation", "|FFT - LoRA-r8|", "Top-20 overlap", "Counterexamples", "Findings"):
        assert heading in text
    assert "(0 to " in text or "(1 to " in text  # range by chance beside a count
    markdown = (made[1] / "compare_summary.md").read_text(encoding="utf-8")
    assert markdown.startswith("# FFT against LoRA-r8: 36 heads") and "\n## Findings" in markdown


def test_a_planted_difference_is_named(made: tuple[dict[str, Any], Path]) -> None:
    findings = made[0]["comparison"]["findings"]
    assert any(line.startswith("FFT has the smaller |rho(I_pre, Urel)|") for line in findings)
    assert any(line.startswith("LoRA-r8: heads that are important before training move more") for line in findings)


def test_nothing_is_claimed_between_runs_without_a_difference(tmp_path: Path) -> None:
    """Ten pairs of unrelated runs: the document names a 'winner' every time."""
    named = cases = 0
    for i in range(10):
        runs = [drawn_run(tmp_path / f"{i}{name}", 50 + 2 * i + j, start=i) for j, name in enumerate("ab")]
        found = compare(runs, tmp_path / f"out{i}", names=["A", "B"], report=False, draws=50)["comparison"]["findings"]
        named += any("smaller |rho" in line for line in found)
        cases += any("no more counterexamples than chance" in line for line in found)
    # Each is wrong in about 5 % (two counts of two methods: 10 %) of unrelated pairs; more than 3 of 10 has p < 0.002.
    assert named <= 3 and cases >= 6


def test_findings_of_what_cannot_be_computed(tmp_path: Path) -> None:
    runs = [drawn_run(tmp_path / name, i, layers=1, heads=3) for i, name in enumerate("ab")]
    for run in runs:
        lines = [json.loads(line) | {"Urel": 0.5} for line in (run / "update.jsonl").read_text().splitlines()]
        (run / "update.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "importance_post.jsonl").unlink()
    content = compare(runs, tmp_path / "out", report=False)
    findings = find_differences(content)
    assert "a: I_pre and Urel have no rank correlation." in findings
    assert "a and b: their rho(I_pre, Urel) cannot be compared." in findings
    assert content["comparison"]["topk"] == 3 and "I_post" not in content["comparison"]["pairs"][0]["between"]
    json.loads((tmp_path / "out" / "compare_metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_three_methods_are_compared_in_pairs(pair: list[Path], tmp_path: Path) -> None:
    third = drawn_run(
        tmp_path / "c", 3, method="LoRA", rank=16, base_sha256="aa", theta0_sha256="cc", task="RTE", seed=1
    )
    found = compare([*pair, third], tmp_path / "out", report=False, draws=50)
    pairs = [(p["a"], p["b"]) for p in found["comparison"]["pairs"]]
    assert pairs == [("FFT", "LoRA-r8"), ("FFT", "LoRA-r16"), ("LoRA-r8", "LoRA-r16")]


def test_different_bases_and_rows_are_refused_together(pair: list[Path], tmp_path: Path) -> None:
    other = drawn_run(
        tmp_path / "b", 2, start=7, method="LoRA", rank=4, base_sha256="bb", theta0_sha256="dd", task="RTE", seed=2
    )
    (other / "eval_subset.json").write_text("[4, 1, 2]", encoding="utf-8")
    with pytest.raises(InputProblems) as caught:
        compare([pair[0], other], tmp_path / "out", report=False)
    assert "--allow-different-base" in str(caught.value) and "--allow-different-subset" in str(caught.value)
    assert not (tmp_path / "out").exists()
    found = compare(
        [pair[0], other], tmp_path / "out", report=False, allow_different_base=True, allow_different_subset=True
    )["comparison"]
    told = " ".join(found["warnings"])
    for words in (
        "different base weights",
        "different rows",
        "the starts differ",
        "differ in seed (FFT: 1, LoRA-r4: 2)",
    ):
        assert words in told
    # Two starts: the importance before training is two measurements.
    assert "I_pre" in found["pairs"][0]["between"] and found["same_base"] is False
    assert found["hashes"]["LoRA-r4"] == {"base_sha256": "bb", "theta0_sha256": "dd"}


def test_the_order_of_the_rows_is_no_difference_but_other_data_is(pair: list[Path], tmp_path: Path) -> None:
    other = drawn_run(tmp_path / "b", 2, base_sha256="aa", theta0_sha256="cc", method="LoRA", rank=4)
    (other / "eval_subset.json").write_text("[1, 3, 4]", encoding="utf-8")
    compare([pair[0], other], tmp_path / "out", report=False, draws=50)
    for folder, digest in ((other, "x"), (tmp_path / "c", "y")):
        folder.mkdir(exist_ok=True)
        (folder / "eval_subset.meta.json").write_text(json.dumps({"data_sha256": digest}), encoding="utf-8")
    third = drawn_run(tmp_path / "c", 5, base_sha256="aa", theta0_sha256="cc", method="FFT")
    with pytest.raises(LoraforgeError, match="different rows"):
        compare([other, third], tmp_path / "out2", report=False)


def test_the_documents_own_folders_compare_with_warnings(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "FFT" / "RTE" / "seed1"), write_run(tmp_path / "LoRA" / "RTE" / "seed1_r8")]
    found = compare(runs, tmp_path / "out", report=False)["comparison"]
    assert found["names"] == ["FFT", "LoRA-r8"] and found["same_base"] is None
    assert any("no record of the base's weights" in warning for warning in found["warnings"])
    # Importance that agrees to the last bit is one measurement.
    assert found["pairs"][0]["same_start"] is True


def test_heads_that_one_run_lacks_are_left_out(pair: list[Path], tmp_path: Path) -> None:
    small = drawn_run(tmp_path / "b", 2, layers=2, method="LoRA", rank=4, base_sha256="aa", theta0_sha256="cc")
    found = compare([pair[0], small], tmp_path / "out", report=False, draws=50)["comparison"]
    assert found["n_heads"] == 12 and "FFT: 24 heads that another run lacks are left out" in found["warnings"]
    lines = [json.loads(line) | {"stack": "dec"} for line in (small / "importance_pre.jsonl").read_text().splitlines()]
    (small / "importance_pre.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(LoraforgeError, match="no head in common"):
        compare([pair[0], small], tmp_path / "out2", report=False)


def test_what_cannot_be_compared(pair: list[Path], tmp_path: Path) -> None:
    for runs, names, words in (
        (pair[:1], None, "two runs or more"),
        (pair, ["A"], "name of its own"),
        (pair, ["A", "A"], "name of its own"),
        (pair, ["A", "comparison"], "another key"),
        ([pair[0], pair[0]], None, "named twice"),
    ):
        with pytest.raises(UsageError, match=words):
            compare(runs, tmp_path / "out", names=names, report=False)
    compare(pair, tmp_path / "out", report=False, draws=50)
    with pytest.raises(LoraforgeError, match="exists already"):
        compare(pair, tmp_path / "out", report=False, draws=50)
    compare(pair, tmp_path / "out", report=False, overwrite=True, draws=50)


def test_the_same_bytes_twice(made: tuple[dict[str, Any], Path], pair: list[Path], tmp_path: Path) -> None:
    compare(pair, tmp_path / "again", report=False)
    for name in ("compare_metrics.json", "compare_summary.txt", "compare_summary.md", "heads_joined.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (made[1] / name).read_bytes()
