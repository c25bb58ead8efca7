"""A GPU without room: an error that says where and what to change, and nothing half-written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import loraforge as lf
from loraforge.cli.app import app
from loraforge.errors import LoraforgeError
from loraforge.linalg.device import named_when_full
from tests.device.machine import pretend_gpu
from tests.input_stats.models import write_base, write_data
from tests.merging.scenarios import SHAPES, Maker
from tests.merging.test_calibrated import FIXED, Bench

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the memory of a real GPU is too large to fill")
Call = Callable[[Path], Any]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench("llama", tmp_path_factory.mktemp("llama"))
    made.case.model.set_attn_implementation("eager")
    return made


@pytest.fixture(scope="module")
def calls(maker: Maker, bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Call, str]]:
    """Each driver on the GPU as a function of its output, and what its error advises."""
    place = tmp_path_factory.mktemp("inputs")
    paths = maker("mixed", "float32").paths
    base, data = write_base(place / "llama"), write_data(place / "d.safetensors", samples=4)
    state = bench.case.model.state_dict()

    def calibrated(out: Path) -> Any:
        bench.case.model.to("cpu").load_state_dict(state)
        calibration: Any = bench.inputs
        options: Any = {"base": base, "calibration": calibration, "params": FIXED}
        return lf.merge(bench.paths, "iteris-plus", device="cuda", out=out, **options)

    return {
        "svd": (lambda out: lf.merge(paths, "svd", device="cuda", out=out), "--device cpu"),
        "ties": (lambda out: lf.merge(paths, "ties", device="cuda", out=out), "--device cpu"),
        "budget": (lambda out: lf.merge(paths, "svd", budget=2000, device="cuda", out=out), "--device cpu"),
        "calibrated": (calibrated, "a smaller --batch-tokens"),
        "stats": (
            lambda out: lf.collect_stats(base, data, out / "s.safetensors", device="cuda"),
            "--device cpu",
        ),
        "resize": (lambda out: lf.resize(paths[0], out, budget=2000, device="cuda"), "--device cpu"),
        "inspect": (lambda out: lf.inspect(paths, device="cuda"), "--device cpu"),
    }


@pytest.mark.parametrize("name", ["svd", "ties", "budget", "calibrated", "stats", "resize", "inspect"])
def test_any_allocation_that_fails_is_named(name: str, calls: dict[str, tuple[Call, str]], tmp_path: Path) -> None:
    call, advice = calls[name]
    with pretend_gpu() as gpu:
        call(tmp_path / "whole")
    assert gpu.allocations > 20
    places = set()
    before = sorted(os.listdir(tmp_path))
    for share in (0.0, 0.3, 0.6, 0.9):
        k = max(1, round(share * gpu.allocations))
        with pretend_gpu(fail_at=k), pytest.raises(LoraforgeError) as caught:
            call(tmp_path / "out")
        error = caught.value
        assert error.what.startswith("the memory of the GPU is full while") and error.exit_code == 3
        assert re.fullmatch(r"\d+ MiB free of 8192 MiB on cuda(:0)?", str(error.got))
        assert re.fullmatch(r"room for [\d.]+ MiB more", str(error.expected)) and advice in str(error.hint)
        assert isinstance(error.__cause__, torch.OutOfMemoryError)
        assert sorted(os.listdir(tmp_path)) == before, "nothing half-written"
        places.add(error.where)
    assert len(places - {None}) >= (2 if name in ("calibrated", "stats") else 1)
    if name in ("svd", "resize"):
        assert all(any(module in str(where) for module in SHAPES) for where in places)


def test_a_small_gpu_says_what_it_has(calls: dict[str, tuple[Call, str]], tmp_path: Path) -> None:
    with pretend_gpu(capacity=200_000), pytest.raises(LoraforgeError, match="free of 0 MiB"):
        calls["ties"][0](tmp_path / "out")
    with pretend_gpu(capacity=64 * 2**20) as gpu:
        found = calls["svd"][0](tmp_path / "out")
    assert found.report["peak_device_bytes"] == gpu.peak > 0


def test_the_command_line_leaves_with_3(maker: Maker, tmp_path: Path) -> None:
    paths = [str(p) for p in maker("equal", "float32").paths]
    command = ["merge", *paths, "--method", "svd", "--out", str(tmp_path / "out"), "--device", "cuda", "--json"]
    with pretend_gpu(fail_at=30):
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 3
    error = json.loads(result.stdout)["error"]
    assert "memory of the GPU is full" in json.dumps(error) and "--device cpu" in json.dumps(error)
    assert os.listdir(tmp_path) == []


def test_libraries_that_allocate_by_themselves_count_too() -> None:
    def fails(message: str, device: str) -> None:
        with named_when_full(torch.device(device), "merging", "a.b", "less"):
            raise RuntimeError(message)

    with pretend_gpu():
        with pytest.raises(LoraforgeError, match="full while merging") as caught:
            fails("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "cuda")
        assert caught.value.expected is None and caught.value.where == "a.b"
        with pytest.raises(RuntimeError, match="^something else$"):
            fails("something else", "cuda")
    with pytest.raises(RuntimeError, match="^CUBLAS_STATUS_ALLOC_FAILED$"):
        fails("CUBLAS_STATUS_ALLOC_FAILED", "cpu")
