"""The command on real files: adapters that PEFT wrote, merges that PEFT reads."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import Result

from .conftest import only_object

Run = Callable[..., Result]


class Tiny(nn.Module):
    """Two linear layers of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(7, 5, bias=False)
        self.v = nn.Linear(5, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.v(torch.tanh(self.q(x)))


def make_adapter(folder: Path, seed: int, rank: int, alpha: int) -> Path:
    torch.manual_seed(seed)
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q", "v"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_adapter(tmp_path / "loras" / "a", 1, 2, 4), make_adapter(tmp_path / "loras" / "b", 2, 3, 3)


def delta(folder: Path, module: str) -> Tensor:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return (config["lora_alpha"] / config["r"]) * (b @ a)


def fingerprint(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_a_sum_loads_in_peft_and_is_exact(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = fingerprint(tmp_path / "loras")
    result = run("merge", *pair, "-m", "task-arithmetic", "--weights", "1,-0.5", "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    found = only_object(result)
    assert (found["modules"], found["rank_max"], found["method"]) == (2, 5, "task-arithmetic")
    assert found["adapters"][0]["sha256"] and found["relative_error"] < 1e-6
    assert (out / "run.json").is_file() and (out / "README.md").is_file()
    assert fingerprint(tmp_path / "loras") == before

    torch.manual_seed(0)
    base, x = Tiny(), torch.randn(4, 7)
    weights = {name: getattr(base, name).weight.detach().clone() for name in ("q", "v")}
    merged = peft.PeftModel.from_pretrained(base, str(out))
    q, v = (weights[m].double() + delta(pair[0], m) - 0.5 * delta(pair[1], m) for m in ("q", "v"))
    exact = torch.tanh(x.double() @ q.T) @ v.T
    torch.testing.assert_close(merged(x).double(), exact, rtol=1e-4, atol=1e-4)


def test_svd_of_rank_two_is_the_optimum(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("merge", *pair, "-m", "svd", "--rank", 2, "-o", out).exit_code == 0
    for module in ("q", "v"):
        total = delta(pair[0], module) + delta(pair[1], module)
        U, S, Vh = torch.linalg.svd(total)
        best = (U[:, :2] * S[:2]) @ Vh[:2]
        torch.testing.assert_close(delta(out, module), best, rtol=0, atol=1e-5 * float(S[0]))


def test_people_see_the_error_of_a_rank(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("merge", *pair, "-m", "svd", "--rank", 1, "-o", tmp_path / "out")
    assert result.exit_code == 0 and result.stdout.splitlines()[2].split()[:3] == ["svd", "2", "1"]
    assert "PeftModel.from_pretrained" in result.stdout


def test_the_report_is_one_page(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = run("merge", *pair, "-m", "svd", "-o", tmp_path / "out", "--report", page)
    assert result.exit_code == 0, result.stderr
    assert "svd" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_dry_run_writes_nothing(words: list[str], run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    before = fingerprint(tmp_path)
    result = run("merge", *pair, "-m", "svd", "-o", tmp_path / "out", "--dry-run", *words)
    assert result.exit_code == 0, result.stderr
    assert fingerprint(tmp_path) == before and not (tmp_path / "out").exists()
    if words:
        plan = only_object(result)["plan"]
        assert [row["module"] for row in plan["modules"]] == ["q", "v"]
        assert [row["shape"] for row in plan["modules"]] == [[5, 7], [9, 5]]
        assert plan["peak_bytes"] > 0 and plan["flops"] > 0


def test_an_existing_output_stays(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("merge", *pair, "-m", "concat", "-o", out).exit_code == 0
    before = fingerprint(out)
    assert run("merge", *pair, "-m", "svd", "-o", out).exit_code == 3
    assert fingerprint(out) == before
    assert run("merge", *pair, "-m", "svd", "-o", out, "--overwrite").exit_code == 0
    assert fingerprint(out) != before
    refused = run("merge", *pair, "-m", "svd", "-o", pair[0], "--overwrite")
    assert refused.exit_code == 3 and "never changed" in refused.stderr


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def poison(file: Path) -> None:
    tensors = load_file(file)
    tensors[sorted(tensors)[0]][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [cut, poison, Path.unlink])
def test_a_damaged_file_is_named(
    damage: Callable[[Path], object], run: Run, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    damage(pair[1] / "adapter_model.safetensors")
    before = fingerprint(tmp_path)
    result = run("merge", *pair, "-m", "svd", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 3
    assert str(pair[1]) in result.stderr and "Traceback" not in result.stderr
    assert only_object(result)["error"]["kind"] == "input"
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["-m", "svdd"], 2, "did you mean 'svd'"),
        (["-m", "svd", "--weights", "1,2,3"], 3, "2"),
        (["-m", "svd", "--rank", "2", "--energy", "0.5"], 2, "energy"),
        (["-m", "svd", "--energy", "1.5"], 2, "energy"),
        (["-m", "svd", "--device", "gpu"], 2, "gpu"),
        (["-m", "svd", "--base", "x"], 2, "base"),
    ],
)
def test_wrong_words(
    words: list[str], code: int, expected: str, run: Run, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    result = run("merge", *pair, "-o", tmp_path / "out", *words)
    assert result.exit_code == code and expected in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_adapter_is_named(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("merge", pair[0], tmp_path / "nowhere", "-m", "svd", "-o", tmp_path / "out")
    assert result.exit_code == 3 and "nowhere" in result.stderr


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have switched it off for jobs in the background
from loraforge.adapters.reader import Adapter
from loraforge.adapters.session import WriteSession

def pause():
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)

def slow_load(self, module, load=Adapter.load):
    pause()
    return load(self, module)

def slow_add(self, *arguments, add=WriteSession.add, **options):
    add(self, *arguments, **options)
    pause()

if sys.argv.pop(1) == "reading":
    Adapter.load = slow_load
else:
    WriteSession.add = slow_add
from loraforge.cli.app import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("moment", ["reading", "writing"])
def test_an_interrupt_leaves_nothing_behind(moment: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    before = fingerprint(tmp_path)
    command = ["merge", *map(str, pair), "-m", "svd", "-o", str(tmp_path / "out"), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, moment, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert line == "ready\n", line + stderr
    assert process.returncode == 130
    assert stderr.splitlines() == ["error: interrupted; nothing was left half-written"]
    error: dict[str, Any] = json.loads(stdout)["error"]
    assert error["exit_code"] == 130
    assert fingerprint(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loras"]


def test_an_interrupted_merge_with_resume_says_how_to_go_on(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """What is done stays in a hidden folder; the same command finishes it."""
    out = tmp_path / "out"
    command = ["merge", *map(str, pair), "-m", "svd", "-o", str(out), "--resume"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "writing", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None and process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "the same command goes on from there" in stderr
    assert not out.exists() and list(tmp_path.glob(".out*"))
    done = subprocess.run([sys.executable, "-m", "loraforge", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "continued an interrupted run" in done.stderr
    assert (out / "adapter_model.safetensors").is_file() and not list(tmp_path.glob(".out*"))
