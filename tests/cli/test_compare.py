"""`loraforge compare` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tests.cli.conftest import only_object
from tests.measure.golden import drawn_run

Run = Callable[..., Result]
PICTURES = ("compare_I_vs_U.png", "compare_stats.png", "compare_update_dist.png", "compare_headwise.png")


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    about = {"base_sha256": "aa", "theta0_sha256": "cc", "task": "RTE"}
    return [
        drawn_run(tmp_path / "FFT" / "RTE" / "seed1", 1, method="FFT", **about),
        drawn_run(tmp_path / "LoRA" / "RTE" / "seed1_r8", 2, moves=2.0, method="LoRA", rank=8, **about),
    ]


def test_a_folder_with_numbers_words_pictures_and_a_page(run: Run, pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("compare", *pair, "--out", out)
    assert result.exit_code == 0, result.stderr
    for words in ("rho(I_pre, Urel)", "|FFT - LoRA-r8|", "Counterexamples", "- FFT has the smaller |rho", "by chance"):
        assert words in result.stdout
    for name in (
        "compare_metrics.json",
        "compare_summary.txt",
        "compare_summary.md",
        "heads_joined.csv",
        "report.html",
    ):
        assert (out / name).is_file(), name
    for name in PICTURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG"), name


def test_json_and_the_documents_keys(run: Run, pair: list[Path], tmp_path: Path) -> None:
    result = run(
        "compare",
        *pair,
        "-o",
        tmp_path / "out",
        "--names",
        "full, low",
        "--profile",
        "document",
        "--no-report",
        "--json",
    )
    assert only_object(result)["comparison"]["names"] == ["full", "low"]
    plain = json.loads((tmp_path / "out" / "compare_metrics.json").read_text(encoding="utf-8"))
    assert list(plain) == ["full", "low"] and len(plain["full"]) == 5


def test_wrong_input(run: Run, pair: list[Path], tmp_path: Path) -> None:
    missing = run("compare", *pair)
    assert missing.exit_code == 2 and "--out is missing" in missing.stderr
    single = run("compare", pair[0], "--out", tmp_path / "out")
    assert single.exit_code == 2 and "two runs or more" in single.stderr
    config = json.loads((pair[1] / "run_config.json").read_text(encoding="utf-8"))
    (pair[1] / "run_config.json").write_text(json.dumps(config | {"base_sha256": "bb"}), encoding="utf-8")
    other = run("compare", *pair, "--out", tmp_path / "out")
    assert other.exit_code == 3 and "--allow-different-base" in other.stderr and not (tmp_path / "out").exists()
    allowed = run("compare", *pair, "--out", tmp_path / "out", "--allow-different-base", "--no-report")
    assert allowed.exit_code == 0 and "warning: the runs started from different base weights" in allowed.stderr
    again = run("compare", *pair, "--out", tmp_path / "out", "--allow-different-base")
    assert again.exit_code == 3 and "--overwrite" in again.stderr
