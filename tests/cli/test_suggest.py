"""`loraforge suggest` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from loraforge.checkpoints import open_checkpoint
from loraforge.measure.heads.find import layout_of_checkpoint
from tests.cli.conftest import only_object
from tests.measure.golden import write_run
from tests.tasks.tiny import tiny_base

Run = Callable[..., Result]


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    base = tiny_base(tmp_path / "base", "bert")
    layout = layout_of_checkpoint(open_checkpoint(base))
    lines = [{**key._asdict(), "I": float(i)} for i, key in enumerate(layout.heads)]
    update = [
        {**key._asdict(), "U": 1.0, "Urel": 0.1, "Uq": 1.0, "Uk": 1.0, "Uv": 1.0, "Uo": 1.0} for key in layout.heads
    ]
    files = {"importance_pre.jsonl": lines, "importance_post.jsonl": lines, "update.jsonl": update}
    folder = write_run(tmp_path / "run", files, base=str(base), method="LoRA", rank=4)
    (folder / "layout.json").write_text(json.dumps(layout.to_json()), encoding="utf-8")
    return folder


def test_ranks_beside_the_uniform_ones(run: Run, measured: Path) -> None:
    result = run("suggest", "ranks", measured)
    assert result.exit_code == 0, result.stderr
    for words in ("uniform rank 4", "layer.1.attention.self.query", "claims nothing without a run", "--rank-pattern"):
        assert words in result.stdout
    found = only_object(run("suggest", "ranks", measured, "--mean-rank", 2, "--overwrite", "--json"))
    assert found["budget"] == 2 * 8 * 32 and found["patterns"] == json.loads(
        (measured / "rank_pattern.json").read_text()
    )


def test_targets(run: Run, measured: Path, tmp_path: Path) -> None:
    result = run("suggest", "targets", measured, "--by", "U", "--r", 2, "--out", tmp_path / "t.json")
    assert result.exit_code == 0, result.stderr
    for words in ("uniform: all projections at rank 1", "claims nothing without a run", "train-lora --targets"):
        assert words in result.stdout
    assert len(json.loads((tmp_path / "t.json").read_text())["targets"]) == 4


def test_a_suggestion_is_what_train_lora_takes(run: Run, measured: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "good dog", "label": "pos"}\n{"text": "bad cat", "label": "neg"}\n' * 4, encoding="utf-8")
    assert run("suggest", "ranks", measured).exit_code == 0
    base = json.loads((measured / "run_config.json").read_text(encoding="utf-8"))["base"]
    result = run(
        "train-lora", "--base", base, "--train", rows, "--rank-pattern", measured / "rank_pattern.json",
        "--dry-run", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    # Ranks of A and B, and the classifier of two classes on 16 features.
    patterns = json.loads((measured / "rank_pattern.json").read_text(encoding="utf-8"))
    trained = 32 * sum(patterns["rank_pattern"].values()) + 2 * 16 + 2
    assert str(trained) in result.stdout


def test_wrong_input(run: Run, measured: Path) -> None:
    both = run("suggest", "ranks", measured, "--budget", 900, "--mean-rank", 2)
    assert both.exit_code == 2 and "same thing" in both.stderr
    small = run("suggest", "ranks", measured, "--budget", 9)
    assert small.exit_code == 3 and "least rank" in small.stderr
    energy = run("suggest", "ranks", measured, "--by", "energy")
    assert energy.exit_code == 3 and "loraforge measure spectrum" in energy.stderr
