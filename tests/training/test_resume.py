"""Killed and resumed, interrupted and resumed, on several processes: always the same bytes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraforge.errors import LoraforgeError
from loraforge.training import run
from loraforge.training.log import read_log
from loraforge.training.single import train_lora
from tests.tasks.tiny import tiny_base

ROOT = Path(__file__).resolve().parents[2]
# Dropout is on, rows are shuffled, a log line spans the checkpoint: all of it must be taken up where it stood.
TRAIN = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "learning_rate": 0.02, "logging_steps": 4,
         "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}  # fmt: skip
MORE: dict[str, Any] = {"lora": {"r": 2, "dropout": 0.2}, "train": TRAIN, "snapshots": [0, 2, 4, 8], "device": "cpu"}
SCRIPT = """
import json, os, signal, sys
from loraforge.training.single import train_lora
base, task, out, more, step = json.loads(sys.argv[1])
def tell(stage, detail, done, total):
    if stage == "train" and done == step:
        os.kill(os.getpid(), signal.SIGKILL)
train_lora(base, task, out, progress=tell, **more)
"""


def files(out: Path) -> dict[str, bytes]:
    """All that must not depend on how often the run was broken: everything but what holds times."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    return {name: content for name, content in found.items() if name not in ("run.json", "report.html")}


@pytest.fixture(scope="module")
def task(rows_file: Path) -> dict[str, str]:
    return {"id": "t", "train": str(rows_file), "eval": str(rows_file)}


@pytest.fixture(scope="module")
def whole(bert: Path, task: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    train_lora(bert, task, out, **MORE)
    return out


def test_killed_and_resumed_gives_the_same_bytes(bert: Path, task: dict[str, str], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    request = json.dumps([str(bert), task, str(out), MORE, 5])
    killed = subprocess.run([sys.executable, "-c", SCRIPT, request], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not out.exists()
    with pytest.raises(LoraforgeError, match="unfinished run"):
        train_lora(bert, task, out, **MORE)
    train_lora(bert, task, out, resume=True, **MORE)
    assert files(out) == files(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupted_anywhere_and_resumed_gives_the_same_bytes(
    bert: Path, task: dict[str, str], whole: Path, tmp_path: Path
) -> None:
    out, steps = tmp_path / "out", iter((4, 7))
    wanted = next(steps)

    def interrupt(stage: str, detail: str, done: int, total: int) -> None:
        if stage == "train" and done == wanted:
            raise KeyboardInterrupt

    for coming in (*steps, None):
        with pytest.raises(KeyboardInterrupt):
            train_lora(bert, task, out, resume=True, progress=interrupt, **MORE)
        wanted = coming
    train_lora(bert, task, out, resume=True, **MORE)
    assert files(out) == files(whole)


def test_interrupted_behind_the_last_step_only_measures(
    bert: Path, task: dict[str, str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(job: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "_final_scores", stop)
        train_lora(bert, task, out, **MORE)
    with monkeypatch.context() as patch:
        patch.setattr(run, "TaskTrainer", None)
        record = train_lora(bert, task, out, resume=True, **MORE)
    assert files(out) == files(whole)
    ours = json.loads((whole / "run.json").read_text())
    assert record["metrics"]["eval"]["metrics"] == ours["metrics"]["eval"]["metrics"]
    assert (record["steps"], record["epochs"]) == (ours["steps"], ours["epochs"])


def test_another_command_is_not_taken_up(bert: Path, task: dict[str, str], tmp_path: Path) -> None:
    def interrupt(stage: str, detail: str, done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train_lora(bert, task, out, progress=interrupt, **MORE)
    with pytest.raises(LoraforgeError, match="cannot be resumed") as raised:
        train_lora(bert, task, out, resume=True, seed=1, **MORE)
    assert "seed was 0, now 1" in str(raised.value.got)


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without dropout, whose draws differ from process to process."""
    return tiny_base(tmp_path_factory.mktemp("steady") / "base", "bert")


def test_two_processes_give_what_one_gives(steady: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}",
        "-m", "loraforge", "train-lora", "--base", steady, "--task", "t", "--train", rows_file, "--test", rows_file,
        "--lora-r", 2, "--max-steps", 3, "--lr", 0.5, "--set", "optim=sgd", "--set", "save_strategy=no",
        "--device", "cpu", "--batch-size", 8, "--out", out, "--json",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)  # one object: rank 0 alone prints
    train = {"max_steps": 3, "learning_rate": 0.5, "optim": "sgd", "save_strategy": "no",
             "per_device_train_batch_size": 16}  # fmt: skip
    task = {"id": "t", "train": str(rows_file), "test": str(rows_file)}
    alone = train_lora(steady, task, tmp_path / "one", lora={"r": 2}, train=train, device="cpu")
    assert record["metrics"]["test"]["metrics"] == alone["metrics"]["test"]["metrics"]
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert any(bool(one[key].any()) for key in one if "lora_B" in key)
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)
    losses = [[line["loss"] for line in read_log(tmp_path / name / "train_log.jsonl")] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
