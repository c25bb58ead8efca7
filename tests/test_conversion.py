"""Conversions keep the factors' bits, state the same update, and name what a format cannot hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraforge.adapters import open_adapter
from loraforge.conversion import convert
from loraforge.errors import LoraforgeError, UsageError

from .adapters import folders

NAMES = ("model.layers.2.self_attn.q_proj", "model.layers.10.mlp.up_proj", "model.layers.10.self_attn.o_proj")


def peft(path: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """Ranks 4, 3, 4 and alphas 8, 9, 8."""
    tensors = folders.factors({NAMES[0]: (6, 4, 5), NAMES[1]: (7, 3, 5), NAMES[2]: (5, 4, 6)}, dtype=dtype)
    patterns = {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 9}}
    return folders.write_folder(path, tensors, folders.config(**(patterns | fields)))


def tensors_of(path: Path) -> dict[str, Tensor]:
    (file,) = path.glob("*.safetensors")
    return load_file(file)


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return set(one) == set(other) and all(
        one[k].dtype == other[k].dtype and one[k].shape == other[k].shape and torch.equal(one[k], other[k]) for k in one
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_peft_to_kohya_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    source = peft(tmp_path / "a", dtype)
    there = convert(source, tmp_path / "k", to="kohya")
    assert there["exact"] and there["rounding"] == 0.0 and there["modules"] == 3 and there["rank_max"] == 4
    flat = tensors_of(tmp_path / "k")
    alphas = {key: value.item() for key, value in flat.items() if key.endswith(".alpha")}
    assert alphas == {
        "lora_unet_model_layers_2_self_attn_q_proj.alpha": 8, "lora_unet_model_layers_10_mlp_up_proj.alpha": 9,
        "lora_unet_model_layers_10_self_attn_o_proj.alpha": 8,
    }  # fmt: skip
    with safe_open(tmp_path / "k" / "k.safetensors", "pt") as handle:
        assert handle.metadata()["ss_network_alpha"] == "Dynamic"
    convert(tmp_path / "k", tmp_path / "b", to="peft")
    assert same_bits(tensors_of(tmp_path / "b"), tensors_of(source))
    before, after = open_adapter(source), open_adapter(tmp_path / "b")
    assert {n: before.info(n).scaling for n in NAMES} == {n: after.info(n).scaling for n in NAMES}


def test_rslora_becomes_a_plain_scale(tmp_path: Path) -> None:
    source = open_adapter(peft(tmp_path / "a", use_rslora=True))
    convert(source.path, tmp_path / "k", to="kohya")
    convert(tmp_path / "k", tmp_path / "b", to="peft")
    found = open_adapter(tmp_path / "b")
    assert not found.settings.rslora
    for name in NAMES:
        assert found.info(name).scaling == pytest.approx(source.info(name).scaling, rel=1e-15)


def test_scales_go_into_the_factors_of_diffusers(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": torch.randn(2, 4, 3, 3),
        "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": torch.randn(5, 2, 1, 1),
        "lora_unet_mid_block_resnets_0_conv1.alpha": torch.tensor(6.0),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(2, 4),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.randn(5, 2),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "style.safetensors", {"sshs_model_hash": "00", "ss_base_model_version": "sd_v1"})
    report = convert(tmp_path / "style.safetensors", tmp_path / "d", to="diffusers")
    assert not report["exact"] and "multiplied into lora.up" in " ".join(report["notes"])
    found = tensors_of(tmp_path / "d")
    conv, te = "unet.mid_block.resnets.0.conv1.lora", "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora"
    down, up, te_up = (tensors[k] for k in list(tensors)[:2] + list(tensors)[4:5])
    assert torch.equal(found[f"{conv}.down.weight"], down) and torch.equal(found[f"{conv}.up.weight"], up * 3)
    assert torch.equal(found[f"{te}.up.weight"], te_up)
    convert(tmp_path / "d", tmp_path / "k", to="kohya")
    again = tensors_of(tmp_path / "k")
    assert torch.equal(again["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"], up * 3)
    assert again["lora_unet_mid_block_resnets_0_conv1.alpha"] == 2
    convert(tmp_path / "style.safetensors", tmp_path / "same", to="kohya")
    assert same_bits(tensors_of(tmp_path / "same"), tensors)
    with safe_open(tmp_path / "same" / "same.safetensors", "pt") as handle:
        assert "sshs_model_hash" not in handle.metadata() and handle.metadata()["ss_base_model_version"] == "sd_v1"


def test_a_tucker_convolution_is_multiplied_out_and_said_so(tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_resnets_0_conv1"
    shapes = {"lora_down": (2, 4, 1, 1), "lora_mid": (2, 2, 3, 3), "lora_up": (5, 2, 1, 1)}
    save_file({f"{stem}.{k}.weight": torch.randn(s) for k, s in shapes.items()}, tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", tmp_path / "p", to="peft")
    assert not report["exact"] and "multiplied out" in " ".join(report["notes"])
    one, other = open_adapter(tmp_path / "a.safetensors"), open_adapter(tmp_path / "p")
    assert other.modules == ("mid_block.resnets.0.conv1",) and other.info(other.modules[0]).kernel == (3, 3)
    assert torch.allclose(one.load(stem).delta(), other.load(other.modules[0]).delta())


def test_the_folder_says_where_it_comes_from(tmp_path: Path) -> None:
    source = peft(tmp_path / "a")
    report = convert(source, tmp_path / "k", to="kohya")
    run = json.loads((tmp_path / "k" / "run.json").read_text())
    assert run["command"] == "convert" and run["source"] == report["source"]
    assert run["source"]["sha256"] == open_adapter(source).sha256
    assert (
        "kohya" not in (tmp_path / "k" / "README.md").read_text()
        or "peft" in (tmp_path / "k" / "README.md").read_text()
    )
    before = {p.name: p.read_bytes() for p in (tmp_path / "k").iterdir()}
    with pytest.raises(LoraforgeError, match="exists already"):
        convert(source, tmp_path / "k", to="kohya")
    convert(source, tmp_path / "k", to="kohya", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "k").iterdir()} == before


def test_heads_come_along_where_they_can(tmp_path: Path) -> None:
    source = folders.simple(tmp_path / "a", extra={"score.weight": torch.ones(2, 5)}, task_type="SEQ_CLS")
    convert(source, tmp_path / "b", to="peft")
    assert open_adapter(tmp_path / "b").heads == ("score.weight",)
    with pytest.raises(LoraforgeError, match="cannot hold whole weights") as caught:
        convert(source, tmp_path / "k", to="kohya")
    assert caught.value.where == "score.weight" and not (tmp_path / "k").exists()


def test_what_cannot_be_expressed_is_refused_by_name(tmp_path: Path) -> None:
    source = peft(tmp_path / "a")
    with pytest.raises(LoraforgeError, match="no part of a diffusion pipeline") as caught:
        convert(source, tmp_path / "d", to="diffusers")
    assert NAMES[0] in str(caught.value)
    with pytest.raises(UsageError, match="output format"):
        convert(source, tmp_path / "d", to="onnx")
    stem = "lora_unet_some_private_block"
    save_file(
        {f"{stem}.lora_down.weight": torch.ones(2, 4), f"{stem}.lora_up.weight": torch.ones(3, 2)},
        tmp_path / "private.safetensors",
    )
    with pytest.raises(LoraforgeError, match="cannot be restored"):
        convert(tmp_path / "private.safetensors", tmp_path / "d", to="peft")
    magnitudes = {f"{name}.lora_magnitude_vector": torch.ones(6) for name in folders.MODULES}
    dora = folders.simple(tmp_path / "dora", extra=magnitudes, use_dora=True)
    with pytest.raises(LoraforgeError, match="DoRA") as caught:
        convert(dora, tmp_path / "d", to="kohya")
    assert "--base" in str(caught.value.hint) and not (tmp_path / "d").exists()


def kohya_spelling(key: str) -> str:
    """The usual spelling of the file's: it doubles "unet_" and writes "_lora_down" for ".lora_down"."""
    return key.replace("lora_unet_unet_", "lora_unet_").replace("_lora_", ".lora_")


def test_the_real_pair_converts_into_each_other_bit_for_bit(data_dir: Path, tmp_path: Path) -> None:
    one, other = (data_dir / "adapters" / f"sd15-2100-{name}" for name in ("diffusers", "kohya-noalpha"))
    assert convert(one, tmp_path / "k", to="kohya")["exact"] and convert(other, tmp_path / "d", to="diffusers")["exact"]
    assert same_bits(tensors_of(tmp_path / "d"), tensors_of(one))
    flat = tensors_of(tmp_path / "k")
    assert {value.item() for key, value in flat.items() if key.endswith(".alpha")} == {4}
    expected = {kohya_spelling(key): value for key, value in tensors_of(other).items()}
    assert same_bits({key: value for key, value in flat.items() if not key.endswith(".alpha")}, expected)
    convert(other, tmp_path / "p", to="peft")
    convert(tmp_path / "p", tmp_path / "again", to="diffusers")
    assert same_bits(tensors_of(tmp_path / "again"), tensors_of(one))


@pytest.mark.parametrize("name", ["opt125m-r16", "dialogpt-synthetic-r8", "flan-t5-base-r16-final"])
def test_real_language_models_go_to_kohya_and_back(data_dir: Path, tmp_path: Path, name: str) -> None:
    source = open_adapter(data_dir / "adapters" / name)
    convert(source.path, tmp_path / "k", to="kohya")
    convert(tmp_path / "k", tmp_path / "b", to="peft")
    found = open_adapter(tmp_path / "b")
    assert found.modules == source.modules
    for module in source.modules:
        one, other = source.load(module), found.load(module)
        assert one.scaling == other.scaling and torch.equal(one.A, other.A) and torch.equal(one.B, other.B)
