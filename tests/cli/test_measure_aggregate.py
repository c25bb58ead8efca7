"""`loraforge measure aggregate` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

from tests.cli.conftest import only_object
from tests.measure.golden import drawn_run, write_run

Run = Callable[..., Result]


def test_a_runs_statistics_stand_beside_chance(run: Run, tmp_path: Path) -> None:
    result = run("measure", "aggregate", write_run(tmp_path / "a"), "--topk", 4)
    assert result.exit_code == 0, result.stderr
    for words in ("by chance", "rho Ipre_Urel", "top-4 Ipre_U", "important but static", "heads.csv", "12 heads"):
        assert words in result.stdout
    assert "Ipre_Uq" not in result.stdout
    assert "Ipre_Uq" in run("measure", "aggregate", tmp_path / "a", "-v").stdout


def test_json_is_the_files_content(run: Run, tmp_path: Path) -> None:
    result = run("measure", "aggregate", write_run(tmp_path / "a"), "--json")
    found = only_object(result)
    assert found["stats"] == json.loads((tmp_path / "a" / "stats.json").read_text(encoding="utf-8"))
    assert "note: top-K: K is 12" in result.stderr


def test_the_documents_profile(run: Run, tmp_path: Path) -> None:
    result = run("measure", "aggregate", write_run(tmp_path / "a"), "--profile", "document")
    assert result.exit_code == 0 and "spearman_rho_Ipre_U" in result.stdout
    assert "null" not in json.loads((tmp_path / "a" / "stats.json").read_text(encoding="utf-8"))


def test_several_runs_are_summarised(run: Run, tmp_path: Path) -> None:
    runs = [drawn_run(tmp_path / "LoRA" / "RTE" / f"seed{seed}_r8", seed) for seed in (1, 2)]
    result = run("measure", "aggregate", *runs, "--draws", 100)
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / "LoRA" / "RTE"
    assert "LoRA-r8" in result.stdout and f"{folder}/seeds.json" in result.stdout
    for name in ("seeds.json", "seeds.md", "report.html"):
        assert (folder / name).is_file()
    assert all((folder_ / "heads.csv").is_file() for folder_ in runs)


def test_wrong_input(run: Run, tmp_path: Path) -> None:
    assert run("measure", "aggregate").exit_code == 2
    missing = run("measure", "aggregate", tmp_path)
    assert missing.exit_code == 3 and "importance_pre.jsonl" in missing.stderr and "update.jsonl" in missing.stderr
    percentiles = run("measure", "aggregate", write_run(tmp_path / "a"), "--hi", 20)
    assert percentiles.exit_code == 2 and "percentiles" in percentiles.stderr
    strict = run("measure", "aggregate", tmp_path / "a", "--strict")
    assert strict.exit_code == 3 and "--strict" in strict.stderr
