"""Files of runs, comparisons and seeds as plain content: ours, the document's, and with files missing."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as statistics

from loraforge.errors import LoraforgeError
from loraforge.measure.analysis.aggregate import aggregate
from loraforge.measure.analysis.compare import compare
from loraforge.measure.analysis.content import compare_content, run_content, seeds_content
from loraforge.measure.analysis.seeds import summarise
from tests.measure.head_files import write_measurements


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods and two seeds, aggregated, compared and summarised without pictures."""
    place = tmp_path_factory.mktemp("heads")
    runs = []
    for method, end in (("FFT", ""), ("LoRA", "_r4")):
        for seed in (1, 2):
            folder = place / method / "rte" / f"seed{seed}{end}"
            write_measurements(folder, method, seed=seed)
            aggregate(folder, draws=50)
            runs.append(folder)
    compare([runs[0], runs[2]], place / "compare", draws=50, report=False)
    summarise(runs, place / "seeds", report=False)
    return place


def fft(root: Path) -> Path:
    return root / "FFT" / "rte" / "seed1"


def test_a_run_as_its_files_say_it(root: Path) -> None:
    content = run_content(root / "LoRA" / "rte" / "seed1_r4")
    assert (content["method"], content["task"], content["seed"], content["rank"]) == ("LoRA", "rte", 1, 4)
    assert content["name"] == "LoRA-r4 on rte, seed 1" and content["missing"] == {}
    with (root / "LoRA" / "rte" / "seed1_r4" / "heads.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(content["heads"]) == 24
    for line, row in zip(lines, content["heads"], strict=True):
        assert (int(line["layer"]), int(line["head"])) == (row["layer"], row["head"])
        for key in ("I_pre", "I_post", "U", "Urel", "G", "I_pre_lo"):
            value = float(line[key])
            assert row[key] is None if math.isnan(value) else row[key] == value
    assert content["heads"][5]["I_post"] is None and content["heads"][7]["G"] is None
    assert content["hashes"] == {"base_sha256": "ab" * 32, "theta0_sha256": "cd" * 32, "data.sha256": "ef" * 32}
    assert content["importance"]["pre"]["objective"] == "task" and content["importance"]["fisher"] == {}
    assert (content["hi"], content["lo"]) == ("90", "30") and len(content["path"]["lines"]) == 24


def test_modules_know_their_layer_and_part(root: Path) -> None:
    lines = run_content(fft(root))["spectrum"]
    assert [(line["layer"], line["part"]) for line in lines] == [(i, part) for i in range(3) for part in "qkvo"]


def test_the_line_is_the_least_squares_line(root: Path) -> None:
    content = run_content(fft(root))
    rows = [row for row in content["heads"] if row["Ppred"] is not None]
    slope, intercept = np.polyfit([row["U"] for row in rows], [row["Ppred"] for row in rows], 1)
    # Two ways of the same least squares in float64.
    assert content["line"]["slope"] == pytest.approx(slope, rel=1e-9)
    assert content["line"]["intercept"] == pytest.approx(intercept, rel=1e-9)


def test_the_documents_files_get_their_chance_levels(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_measurements(run, layers=12, heads=12, extras=False)
    (run / "importance_pre.meta.json").unlink()
    aggregate(run, profile="document")
    assert "null" not in json.loads((run / "stats.json").read_text())
    content = run_content(run)
    null = content["null"]
    # 144 heads: |rho| < 0.163, top-20 overlap 0.139, 4.48 cases with 2 to 8 as likeliest 95 %.
    assert null["rho95"] == pytest.approx(0.163, abs=1e-3) and null["overlap_expected"] == pytest.approx(20 / 144)
    law = statistics.hypergeom(144, 20, 20)
    low, high = (round(20 * null[f"overlap_{end}"]) for end in ("lo", "hi"))
    assert law.cdf(high) - law.cdf(low - 1) >= 0.95
    found = null["cases"]["important_but_static"]
    assert found["expected"] == pytest.approx(15 * 44 / 144, abs=0.2) and (found["lo"], found["hi"]) == (2, 8)
    assert content["rho"]["Ipre_Urel"]["rho"] == content["stats"]["spearman_rho_Ipre_Urel"]
    assert {"importance_post.jsonl", "gradfisher_pre.jsonl", "spectrum.jsonl", "path.json"} <= set(content["missing"])


@pytest.mark.parametrize("gone", [("heads.csv",), ("heads.csv", "stats.json", "cases.json")], ids=["one", "all"])
def test_missing_files_are_all_named(tmp_path: Path, gone: tuple[str, ...]) -> None:
    for name in {"heads.csv", "stats.json", "cases.json"} - set(gone):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(LoraforgeError) as caught:
        run_content(tmp_path)
    assert all(str(tmp_path / name) in caught.value.render() for name in gone)
    assert "loraforge measure aggregate" in caught.value.render()


def test_a_broken_line_is_named(root: Path, tmp_path: Path) -> None:
    for name in ("heads.csv", "stats.json", "cases.json"):
        (tmp_path / name).write_bytes((fft(root) / name).read_bytes())
    (tmp_path / "spectrum.jsonl").write_text('{"module": "a"\n', encoding="utf-8")
    with pytest.raises(LoraforgeError, match="spectrum.jsonl"):
        run_content(tmp_path)


@pytest.mark.parametrize("kept", [True, False], ids=["runs there", "runs gone"])
def test_a_comparison_lives_without_its_runs(root: Path, tmp_path: Path, kept: bool) -> None:
    folder = tmp_path / "compare"
    folder.mkdir()
    for file in (root / "compare").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if not kept:
        metrics: dict[str, Any] = json.loads((folder / "compare_metrics.json").read_text())
        metrics["comparison"]["folders"] = {name: str(tmp_path / name) for name in ("FFT", "LoRA-r4")}
        (folder / "compare_metrics.json").write_text(json.dumps(metrics))
    content = compare_content(folder)
    assert content["names"] == ["FFT", "LoRA-r4"] and content["findings"] and "rho" in content["summary"]
    original = {name: run_content(path) for name, path in (("FFT", fft(root)), ("LoRA-r4", root / "LoRA/rte/seed1_r4"))}
    for name, run in content["runs"].items():
        for column in ("I_pre", "I_post", "U", "Urel"):
            assert [row[column] for row in run["heads"]] == [row[column] for row in original[name]["heads"]]
        assert run["stats"]["n_important_but_static"] == len(run["cases"]["important_but_static"])
        assert bool(run["spectrum"]) is kept and (name in content["missing"]) is not kept


def test_seeds_bring_their_chance_band(root: Path) -> None:
    content = seeds_content(root / "seeds")
    assert set(content["statistics"]) == {"FFT", "LoRA-r4"} and len(content["runs"]) == 4
    assert 0.3 < content["rho95"] < 0.5, "two dozen heads"
    with pytest.raises(LoraforgeError, match="seeds.json"):
        seeds_content(root)


def test_reading_needs_no_torch() -> None:
    rooms = "loraforge.measure.analysis.content, loraforge.measure.analysis.drawing"
    code = f"import sys, {rooms}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
