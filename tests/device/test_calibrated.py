"""The calibrated methods and `collect_stats` on a GPU: forwards, Grams and solves there, results as the CPU's."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loraforge as lf
from loraforge.kernels import backend
from loraforge.merging.methods import METHODS
from tests.device.agreement import away, files_away, host_work, tolerance
from tests.device.pretend import Pretend
from tests.input_stats.models import write_base, write_data
from tests.merging.test_calibrated import FIXED, Bench

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "iteris": ("iteris", {}),
    "iteris-plus searched": ("iteris-plus", {"alpha_1": "auto", "alpha_2": "auto", "reg_ceof": "auto"}),
    "iteris-plus full weight": ("iteris-plus", {"with_pretrain_matrix": 1}),
    "iteris-plus mats camr dcs": (
        "iteris-plus", {"use_mats": True, "use_camr": True, "use_dcs": True, "init": "adapters", "max_iter": 3},
    ),
    "regmean": ("regmean", {}),
    "regmean-plus-plus": ("regmean-plus-plus", {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    """A tiny model of a family with two adapters; attention as separate products, which every device has."""
    made: dict[str, Bench] = {}

    def of(family: str) -> Bench:
        if family not in made:
            made[family] = Bench(family, tmp_path_factory.mktemp(family))
            made[family].case.model.set_attn_implementation("eager")
        return made[family]

    return of


def merge(bench: Bench, method: str, device: str, values: dict[str, Any], **options: Any) -> Any:
    known = {f.name for f in dataclasses.fields(METHODS[method].params_class())}
    params = {key: value for key, value in {**FIXED, **values}.items() if key in known}
    # The model goes to the device in place.
    base = copy.deepcopy(bench.case.model)
    return lf.merge(bench.paths, method, base=base, calibration=bench.inputs, params=params, device=device, **options)


@pytest.mark.parametrize("case", CASES)
def test_calibrated_methods_give_the_cpu_s_result(
    case: str, gpu: Pretend | None, benches: Callable[[str], Bench]
) -> None:
    method, values = CASES[case]
    family = "llama" if case in ("iteris", "iteris-plus full weight") else "bert"
    want = merge(benches(family), method, "cpu", values)
    found = merge(benches(family), method, "cuda", values)
    assert away(found.modules, want.modules) <= tolerance(gpu)
    assert found.report["device"] == "cuda" and found.report["peak_device_bytes"] > 0
    own = [
        {k: layer[k] for k in ("module", "tokens", "solver", "alpha", "rho")}
        for layer in found.report["iteris"]["layers"]
    ]
    other = [
        {k: layer[k] for k in ("module", "tokens", "solver", "alpha", "rho")}
        for layer in want.report["iteris"]["layers"]
    ]
    assert own == other
    assert found.report["iteris"]["converged"] == want.report["iteris"]["converged"]


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_other_families(family: str, gpu: Pretend | None, benches: Callable[[str], Bench]) -> None:
    want = merge(benches(family), "iteris-plus", "cpu", {}, rank=2)
    found = merge(benches(family), "iteris-plus", "cuda", {}, rank=2)
    assert away(found.modules, want.modules) <= tolerance(gpu)


@pytest.mark.parametrize("full", [0, 1])
def test_nothing_large_is_computed_on_the_cpu(full: int, pretended: Pretend, benches: Callable[[str], Bench]) -> None:
    merge(benches("bert"), "iteris-plus", "cuda", {"with_pretrain_matrix": full, "alpha_1": "auto", "alpha_2": "auto"})
    assert host_work(pretended, 200) == {}
    if backend.native_available():
        assert {"cov_pack", "cov_fold_"} <= set(pretended.native)


def test_a_tiny_merge_writes_a_model(gpu: Pretend | None, benches: Callable[[str], Bench], tmp_path: Path) -> None:
    bench = benches("bert")
    bench.case.model.save_pretrained(tmp_path / "base")
    options = {"calibration": bench.inputs, "base": tmp_path / "base", "output_kind": "model"}
    values = {key: value for key, value in FIXED.items() if key != "use_mats"}
    for device in ("cpu", "cuda"):
        lf.merge(bench.paths, "iteris-plus", out=tmp_path / device, device=device, params=values, **options)
    assert files_away(tmp_path / "cuda", tmp_path / "cpu") <= tolerance(gpu)


@pytest.mark.parametrize("kind", ["diag", "gram"])
def test_input_statistics(kind: str, gpu: Pretend | None, tmp_path: Path) -> None:
    base, data = write_base(tmp_path / "llama"), write_data(tmp_path / "d.safetensors")
    options: dict[str, Any] = {"kind": kind, "batch_tokens": 20, "dtype": "float64"}
    want = lf.collect_stats(base, data, tmp_path / "cpu.safetensors", device="cpu", **options)
    if gpu is not None:
        gpu.host_ops.clear()
    found = lf.collect_stats(base, data, tmp_path / "gpu.safetensors", device="cuda", **options)
    assert files_away(tmp_path / "gpu.safetensors", tmp_path / "cpu.safetensors") <= tolerance(gpu)
    assert (want["device"], found["device"]) == ("cpu", "cuda") and found["tokens"] == want["tokens"]
    assert want["peak_device_bytes"] is None and found["peak_device_bytes"] > 0
    json.dumps(found, allow_nan=False)
    assert gpu is None or host_work(gpu, 200) == {}


def test_auto_takes_the_gpu_for_statistics(gpu: Pretend | None, tmp_path: Path) -> None:
    base, data = write_base(tmp_path / "llama"), write_data(tmp_path / "d.safetensors", samples=4)
    assert lf.collect_stats(base, data, tmp_path / "s.safetensors")["device"] == "cuda"


def test_bfloat16_forwards(gpu: Pretend | None, benches: Callable[[str], Bench]) -> None:
    """The base in bfloat16: both devices round every activation, each in its own products."""
    values = {"base_dtype": "bfloat16", "convergence_threshold": 1e-3}
    want = merge(benches("bert"), "iteris-plus", "cpu", values)
    found = merge(benches("bert"), "iteris-plus", "cuda", values)
    assert all(torch.isfinite(pair.B).all() and torch.isfinite(pair.A).all() for pair in found.modules.values())
    assert away(found.modules, want.modules) <= 0.1
