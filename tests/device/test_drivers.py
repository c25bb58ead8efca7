"""`inspect`, `resize`, full models and the command line: one command, every device; names of devices that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification
from typer.testing import CliRunner

import loraforge as lf
from loraforge.adapters import open_adapter
from loraforge.cli.app import app
from loraforge.errors import LoraforgeError, UsageError
from tests.device.agreement import away, files_away, host_work, tolerance
from tests.device.pretend import Pretend
from tests.input_stats.models import write_base, write_data
from tests.merging.scenarios import Maker

# One of each way through: sums, cores, tiles with and without a threshold over all tensors, inner products.
ROWS = ["weighted-average", "svd", "iso-c", "tsv", "ties", "dare", "model-stock"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and three models with low-rank changes of everything."""
    place = tmp_path_factory.mktemp("models")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_channels=1, num_labels=5,
    )  # fmt: skip
    torch.manual_seed(0)
    base = ViTForImageClassification(config)
    base.save_pretrained(place / "base")
    state = {name: weight.clone() for name, weight in base.state_dict().items()}
    for task in range(3):
        base.load_state_dict(state)
        with torch.no_grad():
            for weight in base.parameters():
                rows, columns = weight.shape[0], weight.numel() // weight.shape[0]
                weight += 0.02 * (torch.randn(rows, 3) @ torch.randn(3, columns)).view(weight.shape)
        base.save_pretrained(place / f"task{task}")
    return place / "base", [place / f"task{task}" for task in range(3)]


@pytest.mark.parametrize("method", ROWS)
def test_full_models(method: str, gpu: Pretend | None, models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, paths = models
    lf.merge(paths, method, base=base, device="cpu", out=tmp_path / "cpu")
    if gpu is not None:
        gpu.host_ops.clear()
    found = lf.merge(paths, method, base=base, device="cuda", out=tmp_path / "gpu")
    assert found.report["device"] == "cuda" and found.report["peak_device_bytes"] > 0
    assert files_away(tmp_path / "gpu", tmp_path / "cpu") <= tolerance(gpu)
    assert gpu is None or host_work(gpu, 200) == {}


@pytest.mark.parametrize("options", [{"energy": 0.8}, {"budget": 1500}, {"rank": 3, "uniform_rank": True}], ids=str)
def test_resize(options: dict[str, Any], gpu: Pretend | None, maker: Maker, tmp_path: Path) -> None:
    source = maker("mixed", "float32").paths[0]
    want = lf.resize(source, tmp_path / "cpu", device="cpu", **options)
    if gpu is not None:
        gpu.host_ops.clear()
    found = lf.resize(source, tmp_path / "gpu", device="cuda", **options)
    assert (want["device"], found["device"]) == ("cpu", "cuda") and found["peak_device_bytes"] > 0
    assert gpu is None or host_work(gpu, 200) == {}
    assert want["rank_max"] == found["rank_max"] and found["kept_energy"] == pytest.approx(want["kept_energy"])
    one, other = open_adapter(tmp_path / "gpu"), open_adapter(tmp_path / "cpu")
    assert away({m: one.load(m) for m in one.modules}, {m: other.load(m) for m in other.modules}) <= tolerance(gpu)


def test_inspect(gpu: Pretend | None, maker: Maker) -> None:
    paths = maker("mixed", "float32").paths
    want = lf.inspect(paths, device="cpu")
    if gpu is not None:
        gpu.host_ops.clear()
        gpu.waits.clear()
    found = lf.inspect(paths, device="cuda")
    assert (want.pop("device"), found.pop("device")) == ("cpu", "cuda")
    assert gpu is None or host_work(gpu, 200) == {}
    assert _flat(found) == pytest.approx(_flat(want), rel=1e-5, abs=1e-9, nan_ok=False)


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    """All leaves of a JSON value; words as a number that only equal words share."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in _flat(part, f"{at}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, part in enumerate(value) for k, v in _flat(part, f"{at}[{i}]").items()}
    return {at: float(value)} if isinstance(value, int | float) else {f"{at}={value}": 0.0}


def _calls(maker: Maker, place: Path) -> dict[str, Any]:
    """Each driver as a function of the device's name."""
    paths = maker("equal", "float32").paths
    base, data = write_base(place / "llama"), write_data(place / "d.safetensors", samples=2)
    return {
        "merge": lambda device: lf.merge(paths, "svd", device=device),
        "resize": lambda device: lf.resize(paths[0], place / "r", rank=1, device=device),
        "inspect": lambda device: lf.inspect(paths, device=device),
        "collect_stats": lambda device: lf.collect_stats(base, data, place / "s.safetensors", device=device),
    }


def test_names_that_are_no_device(maker: Maker, tmp_path: Path) -> None:
    for name, call in _calls(maker, tmp_path).items():
        for device in ("gpu", "meta", "cuda:x", "mps"):
            with pytest.raises(UsageError, match="device") as caught:
                call(device)
            assert caught.value.exit_code == 2, name
        if not torch.cuda.is_available():
            with pytest.raises(LoraforgeError, match="sees no GPU") as missing:
                call("cuda")
            assert missing.value.exit_code == 3 and "--device cpu" in str(missing.value)
    assert not (tmp_path / "r").exists() and not (tmp_path / "s.safetensors").exists()


def test_a_gpu_of_a_number_that_there_is_not(gpu: Pretend | None, maker: Maker, tmp_path: Path) -> None:
    for call in _calls(maker, tmp_path).values():
        with pytest.raises(LoraforgeError, match="no GPU of this number") as caught:
            call("cuda:99")
        assert caught.value.exit_code == 3


def test_the_same_commands_with_and_without_a_gpu(gpu: Pretend | None, maker: Maker, tmp_path: Path) -> None:
    a, b = map(str, maker("equal", "float32").paths)
    runner = CliRunner()
    for device in ("auto", "cuda", "cuda:0", "cpu"):
        out = str(tmp_path / device.replace(":", ""))
        commands = {
            "merge": ["merge", a, b, "--method", "svd", "--rank", "2", "--out", out, "--device", device, "--json"],
            "resize": ["resize", a, "--rank", "2", "--out", f"{out}-resized", "--device", device, "--json"],
            "inspect": ["inspect", a, b, "--device", device, "--json"],
        }
        for name, command in commands.items():
            result = runner.invoke(app, command)
            assert result.exit_code == 0, (name, result.output)
            assert json.loads(result.stdout)["device"] == {"auto": "cuda"}.get(device, device)
    assert files_away(tmp_path / "cuda", tmp_path / "auto") == 0.0
    refused = runner.invoke(app, ["inspect", a, "--device", "tpu", "--json"])
    assert refused.exit_code == 2 and "unknown device" in refused.stdout
