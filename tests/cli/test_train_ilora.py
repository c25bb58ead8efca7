from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import Result

from tests.tasks.tiny import tiny_base, write_rows

from .conftest import only_object

Run = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"k{i}" for i in range(16)] + ["yes", "no", "is"]
SEQUENCE = """
base_model: base
output_dir: run
lora: {r: 2, alpha: 4, targets: [q_proj, v_proj]}
ilora: {ilora_buffer_size: 16, replay_batch_size: 8}
train: {max_steps: 2, per_device_train_batch_size: 8, learning_rate: 5e-3, save_strategy: no, seed: 1}
eval: {max_new_tokens: 1}
tasks:
  - {id: a, train: a.jsonl, test: a.jsonl}
  - {id: b, train: b.jsonl, test: b.jsonl}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sequence")
    tiny_base(folder / "base", "llama", vocab_words=WORDS)
    for t, name in enumerate("ab"):
        rows = [{"text": f"k{i} is", "target": "yes" if i % 3 else "no"} for i in range(8 * t, 8 * t + 8)]
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "sequence.yaml").write_text(SEQUENCE, encoding="utf-8")
    return folder


def test_a_sequence_from_one_file_then_its_scores_and_its_report(run: Run, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run("train-ilora", files / "sequence.yaml", "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("after")] == [["after", "a"], ["after", "b"]] * 2
    assert lines[-1] == f"written to {out}; report: {out}/report.html" and (out / "report.html").is_file()
    assert "scores of the ema adapter" in lines and "over the sequence" in lines
    assert "after b, default: a" in result.stderr and "mean change of earlier tasks" in result.stderr
    # A finished run is skipped: nothing is trained, the same object comes.
    before = (out / "ilora_taskb" / "ema" / "adapter_model.safetensors").stat().st_mtime_ns
    again = only_object(run("train-ilora", files / "sequence.yaml", "--out", out, "--device", "cpu", "--json"))
    assert again["finished"] == ["a", "b"] and again["metrics"]["ema"].keys() >= {"acc", "bwt", "forgetting", "fwt"}
    assert (out / "ilora_taskb" / "ema" / "adapter_model.safetensors").stat().st_mtime_ns == before
    scored = only_object(run("cl-eval", out, "--device", "cpu", "--json"))
    assert scored["matrix"] == again["matrix"]
    told = run("cl-report", out, "-o", tmp_path / "report")
    assert told.exit_code == 0 and told.stdout.splitlines()[-1].startswith(f"written: {tmp_path}/report/report.html")


def test_the_plan(run: Run, files: Path) -> None:
    result = run("train-ilora", files / "sequence.yaml", "--dry-run", "--device", "cpu")
    assert result.exit_code == 0 and not (files / "run").exists()
    assert "8 pairs of default and ema tensors" in result.stdout and "4 steps; memory" in result.stdout
    assert result.stdout.splitlines()[-1] == f"would be written to {files / 'run'}"
    plan = only_object(run("train-ilora", files / "sequence.yaml", "--dry-run", "--device", "cpu", "--json"))
    assert [unit["id"] for unit in plan["units"]] == ["a", "b"] and plan["method"] == "ilora"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--method", "ilroa"), 2, "did you mean 'ilora'"),
        (("--set", "ema_alhpa=1"), 2, "ema_alhpa"),
        (("--set", "train.lerning_rate=1"), 2, "learning_rate"),
        (("--set", "ema_alpha=2"), 3, "a number from 0 to 1"),
        (("--tasks", "3"), 2, "no such task"),
        (("--resume", "somewhere"), 2, "nothing to go on from"),
        (("--set", "base_model=./nowhere"), 3, "does not exist"),
    ],
)
def test_wrong_words_and_wrong_files(
    run: Run, files: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = run("train-ilora", files / "sequence.yaml", "-o", tmp_path / "run", "--device", "cpu", *arguments)
    assert result.exit_code == code and message in result.stderr, result.stderr
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_there(run: Run, tmp_path: Path) -> None:
    assert run("train-ilora", tmp_path / "none.yaml").exit_code == 3
    assert run("train-ilora", tmp_path / "none.yaml", "--nproc", "2").exit_code == 3


@pytest.mark.slow
def test_two_processes_train_what_one_does(run: Run, files: Path, tmp_path: Path) -> None:
    """Two of half the batch, each replaying all of its part of the buffer, against one; equal to rounding."""
    one = only_object(run("train-ilora", files / "sequence.yaml", "-o", tmp_path / "one", "--device", "cpu", "--json"))
    command = [sys.executable, "-m", "loraforge", "train-ilora", str(files / "sequence.yaml"), "--nproc", "2", "--json"]
    command += ["-o", str(tmp_path / "two"), "--device", "cpu", "--set", "per_device_train_batch_size=4"]
    command += ["--set", "replay_batch_size=4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    two: dict[str, Any] = json.loads(done.stdout)
    assert one["matrix"] == two["matrix"] and one["finished"] == two["finished"] == ["a", "b"]
    for task in "ab":
        for adapter in ("default", "ema"):
            place = Path(f"ilora_task{task}") / adapter / "adapter_model.safetensors"
            first, second = load_file(tmp_path / "one" / place), load_file(tmp_path / "two" / place)
            for name, tensor in first.items():
                torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-6)
    assert [unit["buffer"] for unit in two["units"]] == [{"a": 8}, {"a": 8, "b": 8}]
