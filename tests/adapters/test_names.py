from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraforge.adapters import Adapter, all_modules, check_compatible, open_adapter, with_common_names
from loraforge.adapters.names import flat
from loraforge.errors import LoraforgeError

from .folders import simple


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("unet.mid.attn1.to_k", "lora_unet_mid_attn1_to_k", "lora_unet_unet_mid_attn1_to_k"), "unet_mid_attn1_to_k"),
        (("diffusion_model.mid.to_k", "unet.mid.to_k"), "unet_mid_to_k"),
        (("text_encoder.layers.0.q", "lora_te_layers_0_q", "lora_te1_layers_0_q"), "te_layers_0_q"),
        (("lora_te_text_encoder_layers_0_q",), "te_layers_0_q"),
        (("text_encoder_2.layers.0.q", "lora_te2_layers_0_q"), "te2_layers_0_q"),
        (("transformer.h.0.attn", "lora_transformer_h_0_attn"), "transformer_h_0_attn"),
        (("lycoris_mid_to_k", "mid.to_k"), "mid_to_k"),
        (("model.layers.0.q_proj",), "model_layers_0_q_proj"),
    ],
)
def test_flat(names: tuple[str, ...], expected: str) -> None:
    assert {flat(name) for name in names} == {expected}


def single(path: Path, *modules: str) -> Adapter:
    tensors = {}
    for module in modules:
        tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"] = torch.ones(2, 5), torch.ones(6, 2)
    save_file(tensors, path)
    return open_adapter(path)


def test_names_are_those_of_the_first_that_has_the_module(tmp_path: Path) -> None:
    one = single(tmp_path / "one.safetensors", "unet.a.to_q", "unet.a.to_k")
    two = single(tmp_path / "two.safetensors", "lora_unet_a_to_q", "lora_unet_b_to_q")
    three = single(tmp_path / "three.safetensors", "lora_unet_unet_b_to_q")
    common = with_common_names([one, two, three])
    assert common[1].modules_set == {"unet.a.to_q", "lora_unet_b_to_q"}
    assert all_modules(common) == ["lora_unet_b_to_q", "unet.a.to_k", "unet.a.to_q"]
    assert common[2].modules == ("lora_unet_b_to_q",) and torch.equal(common[1].load("unet.a.to_q").A, torch.ones(2, 5))
    assert two.modules_set == {"lora_unet_a_to_q", "lora_unet_b_to_q"}, "the adapter itself is unchanged"
    back = with_common_names([two, one])
    assert back[1].modules_set == {"lora_unet_a_to_q", "unet.a.to_k"}


def test_a_peft_adapter_of_one_part_of_a_pipeline(tmp_path: Path) -> None:
    peft = open_adapter(simple(tmp_path / "p", modules={"down.0.to_q": (6, 4, 5), "down.1.to_q": (6, 4, 5)}))
    kohya = single(tmp_path / "k.safetensors", "lora_unet_down_0_to_q", "lora_unet_down_1_to_q")
    assert all_modules(with_common_names([peft, kohya])) == ["down.0.to_q", "down.1.to_q"]
    assert all_modules(with_common_names([kohya, peft])) == list(kohya.modules)
    strange = single(tmp_path / "s.safetensors", "lora_unet_other")
    assert len(all_modules(with_common_names([peft, strange]))) == 3


def test_peft_names_are_never_touched(tmp_path: Path) -> None:
    a = open_adapter(simple(tmp_path / "a", modules={"a.b_c": (6, 4, 5)}))
    b = open_adapter(simple(tmp_path / "b", modules={"a_b.c": (6, 4, 5)}))
    assert with_common_names([a, b]) == [a, b] and all_modules([a, b]) == ["a.b_c", "a_b.c"]


def test_ambiguous_names_are_refused(tmp_path: Path) -> None:
    a = single(tmp_path / "a.safetensors", "unet.a.b_c", "unet.a_b.c")
    b = single(tmp_path / "b.safetensors", "lora_unet_a_b_c")
    with pytest.raises(LoraforgeError, match="one name in other formats") as caught:
        with_common_names([a, b])
    assert "unet.a.b_c, unet.a_b.c" in str(caught.value)
    with pytest.raises(LoraforgeError, match="would get one name"):
        a.renamed({"unet.a.b_c": "unet.a_b.c"})


def test_real_files_are_recognised_as_the_same_modules(data_dir: Path) -> None:
    one = open_adapter(data_dir / "adapters" / "sd15-2100-diffusers")
    two = open_adapter(data_dir / "adapters" / "sd15-2100-kohya-noalpha")
    same, other = with_common_names([one, two])
    assert same.modules == other.modules == one.modules
    check_compatible([same, other])
    for module in one.modules:
        a, b = same.load(module), other.load(module)
        assert torch.equal(a.A, b.A) and torch.equal(a.B, b.B)
