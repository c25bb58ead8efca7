"""Random inputs suit models with heads, wrappers and towers, as the doctor needs them to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loraforge.measure.heads.doctor import check_layout, confirmed_layout
from loraforge.measure.heads.find import layout_of_model
from tests.measure.tiny_heads import ARCHITECTURES, build, composed


def failed_checks(model: nn.Module) -> list[str]:
    return [f"{entry['check']}: {entry['why']}" for entry in check_layout(model).checks if not entry["passed"]]


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("GPT2ForSequenceClassification", "gpt2"),  # asks for a padding token
        ("BartForSequenceClassification", "bart"),  # asks for an end in every row
        ("BartForCausalLM", "bart"),  # its body names no inputs
        ("T5EncoderModel", "t5"),
        ("WhisperForConditionalGeneration", "whisper"),
        ("ViTForImageClassification", "vit"),
    ],
)
def test_models_with_a_head_are_confirmed(name: str, body: str) -> None:
    import transformers as tf

    known = ARCHITECTURES[body]
    assert failed_checks(getattr(tf, name)(getattr(tf, known.config)(**known.options))) == []


def test_cross_attention_that_nothing_reaches_is_left_out() -> None:
    import transformers as tf

    options = ARCHITECTURES["bert"].options
    model = tf.BertLMHeadModel(tf.BertConfig(**options, is_decoder=True, add_cross_attention=True))
    assert "cross" in {attention.kind for attention in layout_of_model(model).attentions}
    layout = confirmed_layout(model)
    assert {attention.kind for attention in layout.attentions} == {"self"}
    assert "bert.encoder.layer.0.crossattention.output.dense" in layout.skipped


def test_a_language_model_with_a_picture_tower_is_confirmed_without_it() -> None:
    model = composed("llava")
    layout = confirmed_layout(model)
    assert {a.stack for a in layout.attentions} == {"dec"}
    left_out = "model.vision_tower.encoder.layers.0.self_attn.out_proj"
    assert layout.skipped[left_out].startswith("not reached by random words")
    # One picture of 4 patches, in its places of the text.
    ids = torch.tensor([[3, 39, 39, 39, 39, 5], [39, 39, 39, 39, 7, 8]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    assert {a.stack for a in confirmed_layout(model, inputs=inputs).attentions} == {"enc", "dec"}
    assert failed_checks(composed("bert-gpt2")) == []


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("name", "factors", "whole"),
    [
        ("llama", "q_proj", "o_proj"),
        ("bert", "query", "attention.output.dense"),
        ("gpt2", "attn.c_proj", "attn.c_attn"),
    ],
)  # fmt: skip
def test_a_projection_that_an_adapter_carries_whole_is_confirmed(name: str, factors: str, whole: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = build(name)
    layout = layout_of_model(model)
    settings = LoraConfig(r=2, target_modules=[factors], modules_to_save=[whole], fan_in_fan_out=name == "gpt2")
    assert confirmed_layout(get_peft_model(model, settings)) == layout
