"""`loraforge measure importance` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tests.measure.deep_subjects import texts
from tests.tasks.tiny import tiny_base, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:the head .* has random weights")
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("importance")
    tiny_base(folder / "base", "bert", layers=3)
    write_rows(folder / "rows.jsonl", texts())
    return folder


@pytest.fixture
def arguments(place: Path) -> list[str]:
    return [
        "measure", "importance", f"--model={place / 'base'}", f"--data={place / 'rows.jsonl'}", "--labels=no,yes",
        "--device=cpu",
    ]  # fmt: skip


def test_a_table_a_file_and_what_it_will_take(run: Run, arguments: list[str], tmp_path: Path) -> None:
    result = run(*arguments, "--phase=pre", f"--out={tmp_path}", "--subset=6:3")
    assert result.exit_code == 0, result.stderr
    assert "6 heads on 6 rows: " in result.stderr and "MiB of layers' outputs kept" in result.stderr
    out = tmp_path / "importance_pre.jsonl"
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert [(line["layer"], line["head"]) for line in lines] == [(a, b) for a in range(3) for b in range(2)]
    assert json.loads((tmp_path / "importance_pre.meta.json").read_text())["phase"] == "pre"
    table = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert table[0][:5] == ["layer", "head", "I", "ci_lo", "ci_hi"]
    best = max(lines, key=lambda line: line["I"])
    assert table[2][:2] == [str(best["layer"]), str(best["head"])]
    assert f"lines   {out}" in result.stdout


def test_one_json_object(run: Run, arguments: list[str]) -> None:
    result = run(*arguments, "--json", "--method=screen", "--exact-top=1", "--layers=1-2")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert {line["layer"] for line in found["heads"]} == {1, 2} and found["out"] is None
    assert [line["method"] for line in found["heads"]].count("exact") == 2
    assert found["subject"]["n"] == 7 and "Spearman" in result.stderr


def test_the_document_s_profile_and_quiet(run: Run, arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "importance_post.jsonl"
    result = run(*arguments, "--profile=document", f"--out={out}", "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    keys = ["layer", "head", "I", "loss_base", "loss_ablate", "n"]
    assert all(list(json.loads(text)) == keys for text in out.read_text().splitlines())
    again = run(*arguments, "--profile=document", "--verbose")
    assert again.exit_code == 0 and "loss_ablate" in again.stdout


@pytest.mark.parametrize(
    ("more", "code", "word"),
    [
        (["--out=folder"], 2, "--phase"),
        (["--layers=9"], 2, "no such layer"),
        (["--ablate=mean", "--method=taylor"], 2, "ablation to zero"),
        (["--method=best"], 2, "best"),
        (["--objective=lm"], 3, "causal"),
    ],
    ids=["name", "layer", "contradiction", "method", "objective"],
)
def test_what_cannot_be_measured(run: Run, arguments: list[str], more: list[str], code: int, word: str) -> None:
    result = run(*arguments, *more)
    assert result.exit_code == code and word in result.stderr


def test_an_output_or_an_input_is_not_replaced(run: Run, arguments: list[str], place: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text("kept\n")
    result = run(*arguments, f"--out={out}")
    assert result.exit_code == 3 and "--overwrite" in result.stderr and out.read_text() == "kept\n"
    rows = (place / "rows.jsonl").read_bytes()
    result = run(*arguments, f"--out={place / 'rows.jsonl'}", "--overwrite")
    assert result.exit_code == 3 and (place / "rows.jsonl").read_bytes() == rows
    assert run(*arguments, f"--out={out}", "--overwrite", "--max-heads=2").exit_code == 0
    assert len(out.read_text().splitlines()) == 2


def test_help_says_the_choices(run: Run) -> None:
    result = run("measure", "importance", "--help")
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("integrated", "resample", "--tokens-per-pass", "--cache-bytes"))
