"""Two processes (gloo) against one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraforge.training.ilora.buffer import ReplayBuffer
from tests.training.ilora import two_ranks

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder that two processes have filled."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("whole", "continued", "none", "ragged"):
        (folder / name).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.training.ilora.two_ranks", str(folder)]
        children.append(
            subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    told = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(told)
    return folder


def logs_of(folder):
    return json.loads((folder / "logs.json").read_text())


def test_two_processes_train_as_one(out, tmp_path):
    """Every stored row is drawn, rows are of one length: then a batch of 4 is two of 2."""
    tr = two_ranks.build(tmp_path / "run", two_ranks.VALUES | {"per_device_train_batch_size": 4}, 40)
    tr.train()
    two_ranks.write(tr, tmp_path)
    for name in ("default", "ema"):
        one, two = (load_file(folder / name / "adapter_model.safetensors") for folder in (tmp_path, out / "whole"))
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=0, atol=2e-5)
    for ours, theirs in zip(logs_of(out / "whole"), logs_of(tmp_path), strict=True):
        for name in ("loss", "ce_current", "ce_replay", "l_cons", "ema_drift", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-9), name
        if ours["step"] > 1:  # before it the adapters are equal but for rounding
            assert ours["kept_fraction"] == pytest.approx(theirs["kept_fraction"], rel=1e-2)
        assert (ours["buffer_fill"], ours["replay_task_hist"]) == (theirs["buffer_fill"], theirs["replay_task_hist"])
    parts = [ReplayBuffer.load(out / "whole" / "buffer.safetensors", rank=rank, world=2) for rank in range(2)]
    held = sorted(tuple(row["input_ids"].tolist()) for part in parts for row in part.rows)
    assert held == sorted(tuple(row["input_ids"].tolist()) for row in tr.buffer.rows) and len(held) == 16
    assert [part.capacity for part in parts] == [20, 20]


def test_two_processes_go_on_to_the_same_bytes(out):
    whole, continued = (
        {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix == ".safetensors"}
        for folder in (out / "whole", out / "continued")
    )
    assert whole.keys() == continued.keys() and len(whole) == 3
    for name in whole:
        assert whole[name] == continued[name], name


def test_no_process_replays_alone(out):
    assert all("ce_replay" not in log and log["replay_task_hist"] == {} for log in logs_of(out / "none"))


def test_ways_through_the_model_agree_where_lengths_do_not(out):
    assert [log["replay_task_hist"] for log in logs_of(out / "ragged")] == [{"0": 4}] * 2
