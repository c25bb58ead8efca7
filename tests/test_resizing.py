from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.linalg import norm
from safetensors.torch import load_file

from loraforge.adapters import open_adapter
from loraforge.errors import LoraforgeError, UsageError
from loraforge.resizing import resize
from tests.adapters import folders
from tests.oracles import factored as oracle

MODULES = {"layers.2.q": (12, 6, 9), "layers.10.q": (12, 6, 9), "layers.10.up": (30, 6, 20)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return folders.simple(tmp_path / "source", modules=MODULES, r=6, lora_alpha=12, target_modules=["q", "up"])


def deltas(path: Path) -> dict[str, np.ndarray]:
    adapter = open_adapter(path)
    return {m: adapter.load(m).delta(torch.float64).numpy() for m in adapter.modules}


def ranks(report: dict[str, Any]) -> dict[str, int]:
    return {row["module"]: row["rank"] for row in report["layers"]}


@pytest.mark.parametrize("k", [1, 3, 6])
def test_every_module_is_the_best_of_its_rank_and_says_its_error(source: Path, tmp_path: Path, k: int) -> None:
    report = resize(source, tmp_path / "out", rank=k)
    before, after = deltas(source), deltas(tmp_path / "out")
    lost = total = 0.0
    for row in report["layers"]:
        name = row["module"]
        best, error = oracle.best_rank_k(before[name], k)
        assert oracle.relative(after[name], best) < 2e-6
        assert abs(row["relative_error"] - error / np.linalg.norm(before[name])) < 1e-7
        assert row["rank"] == k and row["rank_before"] == 6 and row["shape"] == list(before[name].shape)
        lost, total = lost + error**2, total + np.linalg.norm(before[name]) ** 2
    assert abs(report["relative_error"] - (lost / total) ** 0.5) < 1e-7
    assert report["parameters"] == k * (21 + 21 + 50) and report["parameters_before"] == 6 * 92
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["layers"] == report["layers"] and run["adapters"][0]["sha256"] == open_adapter(source).sha256
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == k and config["base_model_name_or_path"] == "tiny"


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ({"energy": 0.8}, lambda S, k: (S[:k] ** 2).sum() >= 0.8 * (S**2).sum() > (S[: k - 1] ** 2).sum()),
        ({"nuclear": 0.6}, lambda S, k: S[:k].sum() >= 0.6 * S.sum() > S[: k - 1].sum()),
        ({"ratio": 2.0}, lambda S, k: S[k - 1] > S[0] / 2 >= S[k]),
        ({"fro_error": 0.5}, lambda S, k: norm(S[k:]) <= 0.5 * norm(S) < norm(S[k - 1 :])),
        ({"energy": 0.1, "min_rank": 2}, lambda S, k: k == 2),
        ({"max_rank": 4}, lambda S, k: k == 4),
    ],
    ids=["energy", "nuclear", "ratio", "fro-error", "energy-min-rank", "max-rank"],
)  # fmt: skip
def test_rank_rules(source: Path, tmp_path: Path, rule: dict[str, Any], holds: Any) -> None:
    report = resize(source, tmp_path / "out", **rule)
    assert report["params"] == {"min_rank": 1} | rule
    for row in report["layers"]:
        assert holds(np.array([*row["spectrum"], 0.0]), row["rank"])


def test_a_budget_is_kept_and_better_than_one_rank(source: Path, tmp_path: Path) -> None:
    shared = resize(source, tmp_path / "shared", budget=3 * 92)
    flat = resize(source, tmp_path / "flat", rank=3)
    assert shared["parameters"] <= 3 * 92 == flat["parameters"]
    assert shared["relative_error"] <= flat["relative_error"] and len(set(ranks(shared).values())) > 1
    assert {m: d.shape for m, d in deltas(tmp_path / "shared").items()} == {
        m: d.shape for m, d in deltas(source).items()
    }
    with pytest.raises(LoraforgeError, match="at least 92 for rank 1 in 3 modules"):
        resize(source, tmp_path / "none", budget=91)
    assert not (tmp_path / "none").exists()
    bounded = resize(source, tmp_path / "bounded", budget=10**6, max_rank=4)
    assert set(ranks(bounded).values()) == {4}


def test_uniform_rank_pads_with_zeros(source: Path, tmp_path: Path) -> None:
    plain = resize(source, tmp_path / "plain", energy=0.8)
    uniform = resize(source, tmp_path / "uniform", energy=0.8, uniform_rank=True)
    assert len(set(ranks(plain).values())) > 1
    assert set(ranks(uniform).values()) == {max(ranks(plain).values())}
    for name, delta in deltas(tmp_path / "plain").items():
        assert oracle.relative(deltas(tmp_path / "uniform")[name], delta) < 1e-6
    assert uniform["relative_error"] == pytest.approx(plain["relative_error"], rel=1e-9)


def test_dtype_rounding_and_clamped_ranks(source: Path, tmp_path: Path) -> None:
    report = resize(source, tmp_path / "out", rank=40, dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert report["relative_error"] == 0.0 and 0.0 < report["rounding"] < 0.01
    assert any("rank 40 is more than 3 modules have" in note for note in report["warnings"])
    assert set(ranks(report).values()) == {6}


def test_heads_biases_and_zero_modules_come_along(tmp_path: Path) -> None:
    tensors = folders.factors(MODULES)
    tensors[f"{folders.PREFIX}layers.2.q.lora_B.weight"].zero_()
    tensors[f"{folders.PREFIX}score.weight"] = torch.ones(2, 9)
    for name in MODULES:
        tensors[f"{folders.PREFIX}{name}.lora_B.bias"] = torch.arange(float(MODULES[name][0]))
    settings = folders.config(r=6, lora_alpha=12, target_modules=["q", "up"], modules_to_save=["score"], lora_bias=True)
    source = folders.write_folder(tmp_path / "source", tensors, settings)
    report = resize(source, tmp_path / "out", energy=0.7)
    out = open_adapter(tmp_path / "out")
    assert list(out.heads) == ["score.weight"] and torch.equal(out.load_head("score.weight"), torch.ones(2, 9))
    info = out.info("layers.10.up")
    assert torch.allclose(info.scaling * out.bias("layers.10.up"), 2.0 * torch.arange(30.0))
    assert ranks(report)["layers.2.q"] == 1 and not deltas(tmp_path / "out")["layers.2.q"].any()


@pytest.mark.parametrize(
    "wrong",
    [
        {}, {"min_rank": 2}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"budget": 0}, {"budget": 500, "rank": 2},
        {"budget": 500, "uniform_rank": True},
        {"ratio": 0.5}, {"rank": 2, "format": "other"}, {"min_rank": 3, "max_rank": 2},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options(source: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        resize(source, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_outputs_are_not_replaced_unasked_and_bytes_are_equal(source: Path, tmp_path: Path) -> None:
    first = tmp_path / "out"
    resize(source, first, rank=2)
    with pytest.raises(LoraforgeError, match="exists"):
        resize(source, first, rank=3)
    again = tmp_path / "again"
    resize(source, again, rank=2)
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (again / name).read_bytes()
    assert ranks(resize(source, first, rank=3, overwrite=True)) == dict.fromkeys(MODULES, 3)
    with pytest.raises(LoraforgeError, match="replace an input"):
        resize(source, source, rank=2, overwrite=True)


def test_other_formats_stay_what_they_are(tmp_path: Path) -> None:
    tensors = {}
    g = torch.Generator().manual_seed(0)
    for name, kernel in (("lora_unet_a", ()), ("lora_unet_conv", (3, 3))):
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, 5, *kernel, generator=g)
        tensors[f"{name}.lora_up.weight"] = torch.randn(8, 4, *(1 for _ in kernel), generator=g)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    from safetensors.torch import save_file

    path = tmp_path / "style.safetensors"
    save_file(tensors, path)
    report = resize(path, tmp_path / "out", rank=2)
    stored = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert stored["lora_unet_conv.lora_down.weight"].shape == (2, 5, 3, 3)
    assert stored["lora_unet_conv.lora_up.weight"].shape == (8, 2, 1, 1)
    best, _ = oracle.best_rank_k(deltas(path)["lora_unet_conv"], 2)
    assert oracle.relative(deltas(tmp_path / "out")["lora_unet_conv"], best) < 2e-6
    assert report["adapters"][0]["format"] == "kohya"
    assert (resize(path, tmp_path / "peft", rank=2, format="kohya", overwrite=True))["rank_max"] == 2


def test_dora_is_refused(tmp_path: Path) -> None:
    tensors = folders.factors(MODULES)
    for name, (m, _, _) in MODULES.items():
        tensors[f"{folders.PREFIX}{name}.lora_magnitude_vector"] = torch.ones(m)
    settings = folders.config(r=6, target_modules=["q", "up"], use_dora=True)
    source = folders.write_folder(tmp_path / "source", tensors, settings)
    with pytest.raises(LoraforgeError, match="DoRA"):
        resize(source, tmp_path / "out", rank=2)
