"""Names of modules from format to format, and the dots that flattening took."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraforge.adapters import open_adapter
from loraforge.adapters.renaming import renamed
from loraforge.adapters.vocabulary import WORDS, restored
from loraforge.errors import LoraforgeError

KNOWN = [
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
    "down_blocks.2.resnets.0.time_emb_proj",
    "up_blocks.1.upsamplers.0.conv",
    "mid_block.attentions.0.proj_in",
    "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.1.resnets.0.conv_shortcut",
    "time_embedding.linear_1",
    "text_model.encoder.layers.11.self_attn.out_proj",
    "transformer_blocks.3.attn.add_q_proj",
    "single_transformer_blocks.12.proj_mlp",
    "double_blocks.0.img_attn.qkv",
    "encoder.block.0.layer.1.DenseReluDense.wi_0",
    "decoder.block.3.layer.1.EncDecAttention.q",
    "model.layers.31.self_attn.q_proj",
    "model.layers.0.mlp.gate_up_proj",
    "transformer.h.0.attn.c_attn",
    "bert.encoder.layer.10.attention.self.query",
    "distilbert.transformer.layer.3.attention.q_lin",
    "model.decoder.layers.0.self_attn.k_proj",
    "gpt_neox.layers.0.attention.query_key_value",
]


@pytest.mark.parametrize("name", KNOWN)
def test_dots_are_restored(name: str) -> None:
    assert restored(name.replace(".", "_")) == name
    assert restored(name) == name


@pytest.mark.parametrize("name", ["down_blocks_0_magic", "attn1_", "x_y_z", "to_out_0_"])
def test_unknown_words_are_refused(name: str) -> None:
    with pytest.raises(LoraforgeError, match="cannot be restored") as caught:
        restored(name)
    assert caught.value.where == name and "unknown word" in str(caught.value.got)


def test_two_readings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from loraforge.adapters import vocabulary

    monkeypatch.setattr(vocabulary, "WORDS", WORDS | {"left_hand", "hand_side", "left", "side"})
    with pytest.raises(LoraforgeError, match="left_hand.side") as caught:
        restored("left_hand_side")
    assert "left.hand_side" in str(caught.value)


def test_every_real_name_goes_and_comes_back(data_dir: Path) -> None:
    counted = 0
    for path in sorted((data_dir / "adapters").iterdir()):
        if (path / "adapter_config.json").is_file():
            names = open_adapter(path).modules
            there = renamed(names, "kohya")
            back = renamed(list(there.values()), "peft")
            assert [back[there[name]] for name in names] == list(names), path.name
            counted += len(names)
    assert counted > 100


def test_the_parts_of_a_pipeline() -> None:
    unet, one, two = "unet.mid_block.resnets.0.conv1", "text_encoder.text_model.a", "text_encoder_2.text_model.a"
    assert renamed([unet, one], "kohya", [unet, one]) == {
        unet: "lora_unet_mid_block_resnets_0_conv1", one: "lora_te_text_model_a",
    }  # fmt: skip
    assert list(renamed([one, two], "kohya", [one, two]).values()) == [
        "lora_te1_text_model_a",
        "lora_te2_text_model_a",
    ]
    flat = ["lora_unet_unet_mid_block_resnets_0_conv1", "lora_te2_text_model_encoder_layers_0_mlp_fc1"]
    assert list(renamed(flat, "diffusers").values()) == [unet, "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"]
    assert renamed([unet], "peft", [unet]) == {unet: "mid_block.resnets.0.conv1"}
    assert renamed(["mid_block.resnets.0.conv1"], "diffusers") == {"mid_block.resnets.0.conv1": unet}
    assert renamed(["lora_unet_transformer_blocks_0_attn_to_q"], "diffusers") == {
        "lora_unet_transformer_blocks_0_attn_to_q": "transformer.transformer_blocks.0.attn.to_q"
    }
    with pytest.raises(LoraforgeError, match="several models") as caught:
        renamed([unet, one], "peft", [unet, one])
    assert caught.value.got == "text_encoder, unet"


def test_names_of_a_language_model_are_no_parts() -> None:
    name = "transformer.h.0.attn.c_attn"
    assert renamed([name], "peft") == {name: name}
    assert renamed([name], "kohya") == {name: "lora_unet_transformer_h_0_attn_c_attn"}
    with pytest.raises(LoraforgeError, match="no part of a diffusion pipeline"):
        renamed([name], "diffusers")


def test_two_names_that_fall_together_are_refused() -> None:
    with pytest.raises(LoraforgeError, match="one name in the format kohya") as caught:
        renamed(["a.b_c", "a_b.c"], "kohya")
    assert caught.value.got == "'a.b_c', 'a_b.c'"
