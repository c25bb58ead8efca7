"""Every data-free method on a GPU: the CPU's result, computed there, with the results in the computer's memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import loraforge as lf
from loraforge.input_stats.file import Contents, write_contents
from loraforge.kernels import backend
from loraforge.merging.methods import METHODS, MethodRow
from tests.adapters import folders
from tests.device.agreement import away, files_away, host_work, tolerance
from tests.device.pretend import Pretend
from tests.merging.models import test_dora as dora
from tests.merging.scenarios import SHAPES, Maker

FREE = {name: row for name, row in METHODS.items() if row.needs != "calibration"}
# Waits for the device a module, at most; the share of a window counts as a part of one. Those of a decomposition are
# PyTorch's own, which reads its error code.
WAITS = {"weighted-average": 3, "svd": 6, "rsvd": 8, "iso-c": 8, "tsv": 20}
RULES: dict[str, dict[str, Any]] = {
    "rank": {"rank": 3}, "energy": {"energy": 0.9}, "nuclear": {"nuclear": 0.8}, "ratio": {"ratio": 10.0},
    "fro_error": {"fro_error": 0.2}, "max_rank": {"max_rank": 2}, "budget": {"budget": 2000},
    "uniform": {"uniform_rank": True, "rank": 2}, "post": {"post": "iso"}, "present": {"on_missing": "present"},
    "bfloat16": {"dtype": "bfloat16"},
}  # fmt: skip


def scenario(row: MethodRow) -> str:
    return "equal" if row.equal_ranks or row.counts[1] == 2 else "mixed"


@pytest.mark.parametrize("row", FREE.values(), ids=list(FREE))
def test_every_method_gives_the_cpu_s_result(row: MethodRow, gpu: Pretend | None, maker: Maker) -> None:
    paths = maker(scenario(row), "float32").paths[: row.counts[1] or 3]
    want = lf.merge(paths, row.name, device="cpu")
    found = lf.merge(paths, row.name, device="cuda")
    assert away(found.modules, want.modules) <= tolerance(gpu)
    assert found.report["device"] == "cuda" and found.report["peak_device_bytes"] > 0
    assert want.report["device"] == "cpu" and want.report["peak_device_bytes"] is None
    ranks = [[layer["rank"] for layer in result.report["layers"]] for result in (want, found)]
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize(("method", "rule"), [("svd", r) for r in RULES] + [("ties", "budget"), ("ties", "energy")])
def test_every_rank_rule_writes_the_cpu_s_adapter(
    method: str, rule: str, gpu: Pretend | None, maker: Maker, tmp_path: Path
) -> None:
    paths, options = maker("mixed", "float32").paths, RULES[rule]
    want = lf.merge(paths, method, device="cpu", out=tmp_path / "cpu", **options)
    found = lf.merge(paths, method, device="cuda", out=tmp_path / "gpu", **options)
    # Written in bfloat16, a difference that is rounding in float64 can move a factor by a step of that dtype.
    allowed = 2.0**-8 if rule == "bfloat16" else tolerance(gpu)
    assert away(found.modules, want.modules) <= allowed
    report = json.loads((tmp_path / "gpu" / "run.json").read_text())
    assert report["device"] == "cuda" and report["peak_device_bytes"] > 0


def test_identical_arithmetic_gives_identical_files(pretended: Pretend, maker: Maker, tmp_path: Path) -> None:
    paths = maker("mixed", "float32").paths
    for method in ("weighted-average", "concat"):
        for device in ("cpu", "cuda"):
            lf.merge(paths, method, device=device, out=tmp_path / f"{method}-{device}")
        assert files_away(tmp_path / f"{method}-cuda", tmp_path / f"{method}-cpu") == 0.0


def test_a_pool_of_threads_changes_nothing(gpu: Pretend | None, maker: Maker) -> None:
    paths = maker("mixed", "float64").paths
    one = lf.merge(paths, "iso-c", device="cuda")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three = lf.merge(paths, "iso-c", device="cuda")
    finally:
        torch.set_num_threads(before)
    assert away(three.modules, one.modules) <= (0.0 if gpu is not None else tolerance(gpu))


def test_the_references_run_on_the_device(gpu: Pretend | None, maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = maker("equal", "float32").paths
    for method in ("svd", "ties", "dare"):
        monkeypatch.delenv(backend.VARIABLE, raising=False)
        want = lf.merge(paths, method, device="cpu", rank=2)
        monkeypatch.setenv(backend.VARIABLE, "reference")
        found = lf.merge(paths, method, device="cuda", rank=2)
        assert found.report["kernels"]["mode"] == "reference"
        assert away(found.modules, want.modules) <= tolerance(gpu)
    assert gpu is None or gpu.native == {}


def test_auto_takes_the_gpu(gpu: Pretend | None, maker: Maker) -> None:
    assert lf.merge(maker("equal", "float32").paths, "svd").report["device"] == "cuda"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters whose factors are larger than anything that may stay on the CPU."""
    g = torch.Generator().manual_seed(7)
    place, paths = tmp_path_factory.mktemp("large"), []
    for name in ("a", "b"):
        tensors = {}
        for module in ("m.0.q", "m.1.q"):
            tensors[f"{folders.PREFIX}{module}.lora_A.weight"] = torch.randn(8, 160, generator=g) / 12
            tensors[f"{folders.PREFIX}{module}.lora_B.weight"] = torch.randn(192, 8, generator=g)
        paths.append(
            folders.write_folder(place / name, tensors, folders.config(r=8, lora_alpha=8, target_modules=["q"]))
        )
    return paths


@pytest.mark.parametrize("method", FREE)
def test_nothing_large_is_computed_on_the_cpu(method: str, pretended: Pretend, large: list[Path]) -> None:
    lf.merge(large, method, device="cuda", rank=4)
    assert host_work(pretended, 600) == {}


@pytest.mark.parametrize("method", WAITS)
def test_the_host_waits_few_times_a_module(method: str, pretended: Pretend, maker: Maker) -> None:
    lf.merge(maker("equal", "float32").paths, method, device="cuda")
    assert sum(pretended.waits.values()) / len(SHAPES) <= WAITS[method], pretended.waits


@pytest.mark.parametrize("method", [name for name, row in FREE.items() if row.stats is not None])
def test_input_statistics_meet_factors_on_the_device(
    method: str, gpu: Pretend | None, maker: Maker, tmp_path: Path
) -> None:
    s = maker("equal", "float32")
    g = torch.Generator().manual_seed(5)
    stats = [
        {module: torch.rand(n, generator=g, dtype=torch.float64) for module, (_, n) in SHAPES.items()} for _ in s.paths
    ]
    files = []
    for index, found in enumerate(stats):
        files.append(tmp_path / f"{index}.safetensors")
        about = {"kind": "diag", "part": [1, 1], "modules": list(found), "tokens": dict.fromkeys(found, 9)}
        write_contents(files[-1], Contents(about, found))
    want = lf.merge(s.paths, method, device="cpu", stats=files)
    assert away(lf.merge(s.paths, method, device="cuda", stats=files).modules, want.modules) <= tolerance(gpu)


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and two DoRA adapters of it."""
    place = tmp_path_factory.mktemp("dora")
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        model, targets = dora.vit()
        if not seed:
            model.save_pretrained(place / "base")
        dora.trained(model, targets, place / name)
    return place / "base", [place / "a", place / "b"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("kind", ["adapter", "model"])
@pytest.mark.parametrize("method", ["svd", "ties"])
def test_dora_and_models_of_a_base(
    method: str, kind: str, gpu: Pretend | None, weighted: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, paths = weighted
    for device in ("cpu", "cuda"):
        found = lf.merge(paths, method, base=base, device=device, output_kind=kind, out=tmp_path / device)
        assert found.report["device"] == device
    # Tensors of a model are compared whole; factors up to their sign and order are compared as deltas.
    if kind == "model":
        assert files_away(tmp_path / "cuda", tmp_path / "cpu") <= tolerance(gpu)
    else:
        one, other = (lf.adapters.open_adapter(tmp_path / d) for d in ("cuda", "cpu"))
        deltas = [{m: a.load(m) for m in a.modules} for a in (one, other)]
        assert away(*deltas) <= tolerance(gpu)
    if gpu is not None:
        gpu.host_ops.clear()
        lf.merge(paths, method, base=base, device="cuda", output_kind=kind, out=tmp_path / "again")
        assert host_work(gpu, 200) == {}
