"""Names and shapes alone: no model is built here."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from loraforge.errors import LoraforgeError
from loraforge.measure.heads.families import layout_from_heads, layout_from_shapes, locate
from loraforge.measure.heads.layout import HeadKey, HeadLayout

# Names as transformers 5 and 4 and PEFT write them -> (stack, kind, layer, part, block), by hand.
PLACES = {
    "encoder.layer.3.attention.self.query": ("enc", "self", 3, "q", "encoder.layer.3"),
    "bert.encoder.layer.11.attention.output.dense": ("enc", "self", 11, "o", "bert.encoder.layer.11"),
    "deberta.encoder.layer.0.attention.self.key_proj": ("enc", "self", 0, "k", "deberta.encoder.layer.0"),
    "deberta.encoder.layer.0.attention.self.in_proj": ("enc", "self", 0, "qkv", "deberta.encoder.layer.0"),
    "vit.encoder.layer.2.attention.attention.value": ("enc", "self", 2, "v", "vit.encoder.layer.2"),
    "layers.2.attention.o_proj": ("enc", "self", 2, "o", "layers.2"),
    "distilbert.transformer.layer.5.attention.out_lin": ("enc", "self", 5, "o", "distilbert.transformer.layer.5"),
    "model.layers.7.attn.Wqkv": ("enc", "self", 7, "qkv", "model.layers.7"),
    "base_model.model.model.layers.30.self_attn.q_proj": (
        "dec", "self", 30, "q", "base_model.model.model.layers.30",
    ),
    "transformer.h.4.attn.c_proj": ("dec", "self", 4, "o", "transformer.h.4"),
    "transformer.h.4.crossattention.q_attn": ("dec", "cross", 4, "q", "transformer.h.4"),
    "gpt_neox.layers.1.attention.dense": ("dec", "self", 1, "o", "gpt_neox.layers.1"),
    "encoder.block.1.layer.0.SelfAttention.o": ("enc", "self", 1, "o", "encoder.block.1"),
    "decoder.block.2.layer.1.EncDecAttention.k": ("dec", "cross", 2, "k", "decoder.block.2"),
    "model.decoder.layers.3.encoder_attn.out_proj": ("dec", "cross", 3, "o", "model.decoder.layers.3"),
    "text_decoder.bert.encoder.layer.0.crossattention.output.dense": (
        "dec", "cross", 0, "o", "text_decoder.bert.encoder.layer.0",
    ),
    "vision_model.encoder.layers.1.self_attn.projection": ("enc", "self", 1, "o", "vision_model.encoder.layers.1"),
    "model.visual.blocks.1.attn.qkv": ("enc", "self", 1, "qkv", "model.visual.blocks.1"),
    "model.language_model.layers.1.self_attn.o_proj": ("dec", "self", 1, "o", "model.language_model.layers.1"),
}  # fmt: skip
NOT_ATTENTION = [
    "encoder.layer.3.output.dense",
    "encoder.layer.3.attention.self.dense",
    "encoder.layer.3.attention.output.query",
    "pooler.dense",
    "transformer.h.4.mlp.c_proj",
    "model.layers.7.mlp.Wo",
    "model.layers.7.self_attn.kv_b_proj",
    "model.layers.0.linear_attn.out_proj",
    "model.layers.0.mamba.out_proj",
    "decoder.block.2.layer.2.DenseReluDense.wo",
    "encoder.layers.0.blocks.1.attention.o_proj",
    "head.attention.out_proj",
    "lm_head",
    "",
]


@pytest.mark.parametrize("name", PLACES)
def test_a_projection_is_found_by_its_name(name: str) -> None:
    assert locate(name) == PLACES[name]


@pytest.mark.parametrize("name", NOT_ATTENTION)
def test_other_modules_are_not(name: str) -> None:
    assert locate(name) is None


def test_a_family_tells_an_encoder_whose_names_do_not() -> None:
    assert locate("layers.0.self_attn.o_proj", "eurobert") == ("enc", "self", 0, "o", "layers.0")
    assert locate("layers.0.self_attn.o_proj", "llama") == ("dec", "self", 0, "o", "layers.0")


def llama(
    layers: int = 2, *, n_q: int = 8, n_kv: int = 2, size: int = 16, hidden: int = 64
) -> dict[str, tuple[int, int]]:
    shapes = {}
    for layer in range(layers):
        at = f"model.layers.{layer}.self_attn"
        shapes |= {f"{at}.q_proj": (n_q * size, hidden), f"{at}.o_proj": (hidden, n_q * size)}
        shapes |= {f"{at}.{part}_proj": (n_kv * size, hidden) for part in "kv"}
        shapes[f"model.layers.{layer}.mlp.up_proj"] = (4 * hidden, hidden)
    return shapes


def test_sizes_come_from_shapes_and_never_from_the_hidden_size() -> None:
    config = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
    layout = layout_from_shapes(llama(), config)
    assert [(a.stack, a.kind, a.layer, a.n_q, a.n_kv, a.block) for a in layout.attentions] == [
        ("dec", "self", 0, 8, 2, "model.layers.0"),
        ("dec", "self", 1, 8, 2, "model.layers.1"),
    ]
    attention = layout.attentions[1]
    assert attention.span("o", 7) == slice(112, 128)
    assert attention.span("q", 7) == slice(112, 128)
    assert attention.span("v", 3) == slice(0, 16)
    assert attention.span("v", 4) == slice(16, 32)
    assert layout.heads[8] == HeadKey("dec", "self", 1, 0)
    assert layout.is_plain and not layout.skipped
    assert HeadLayout.from_json(layout.to_json()) == layout


def fused(family: str, rows: int, **config: Any) -> Any:
    name = "transformer.h.0.self_attention"
    shapes = {f"{name}.query_key_value": (rows, 32), f"{name}.dense": (32, 32)}
    config = {"model_type": family, "num_attention_heads": 4, **config}
    return layout_from_shapes(shapes, config).attentions[0]


def test_a_fused_projection_alternates_or_is_stacked_by_family() -> None:
    bloom = fused("bloom", 96)
    assert [bloom.span(part, 1) for part in "qkv"] == [slice(24, 32), slice(32, 40), slice(40, 48)]
    falcon = fused("falcon", 48, multi_query=True)
    assert [falcon.span(part, 3) for part in "qkv"] == [slice(24, 32), slice(32, 40), slice(40, 48)]
    assert falcon.n_kv == 1
    new = fused("falcon", 64, new_decoder_architecture=True, num_kv_heads=2)
    # A group: two query heads, a key and a value head.
    assert new.q is None
    assert [new.span(part, 2) for part in "kv"] == [slice(48, 56), slice(56, 64)]
    other = fused("unheard-of", 64, num_key_value_heads=2)
    assert [other.span(part, 3) for part in "qkv"] == [slice(24, 32), slice(40, 48), slice(56, 64)]


def test_latent_attention_has_heads_in_its_output_alone() -> None:
    at = "model.layers.0.self_attn"
    shapes = {f"{at}.q_b_proj": (48, 8), f"{at}.kv_b_proj": (56, 8), f"{at}.o_proj": (16, 24)}
    config = {"model_type": "deepseek_v3", "num_attention_heads": 4, "num_key_value_heads": 2}
    (attention,) = layout_from_shapes(shapes, config).attentions
    assert (attention.q, attention.k, attention.v) == (None, None, None)
    assert (attention.n_q, attention.n_kv, attention.o.size) == (4, 4, 6)


def test_the_order_is_encoder_first_then_layers_then_self_before_cross() -> None:
    shapes = {}
    for layer in range(11):
        for kind in ("EncDecAttention", "SelfAttention"):
            shapes[f"decoder.block.{layer}.layer.0.{kind}.o"] = (8, 8)
        shapes[f"encoder.block.{layer}.layer.0.SelfAttention.o"] = (8, 8)
    layout = layout_from_shapes(shapes, {"model_type": "t5", "num_heads": 2})
    assert [(a.stack, a.layer, a.kind) for a in layout.attentions[:12]] == [
        *(("enc", i, "self") for i in range(11)), ("dec", 0, "self"),
    ]  # fmt: skip
    assert [(a.layer, a.kind) for a in layout.attentions[-2:]] == [(10, "self"), (10, "cross")]
    assert not layout.is_plain and layout.starts[11] == 22


def test_counts_may_differ_by_stack_layer_and_tower() -> None:
    whisper = {
        "model.encoder.layers.0.self_attn.out_proj": (12, 12), "model.decoder.layers.0.self_attn.out_proj": (12, 12),
    }  # fmt: skip
    config: dict[str, Any] = {"encoder_attention_heads": 6, "decoder_attention_heads": 2}
    assert [a.n_q for a in layout_from_shapes(whisper, config).attentions] == [6, 2]
    layers = {f"layers.{i}.self_attn.o_proj": (12, 12) for i in range(2)}
    assert [a.n_q for a in layout_from_shapes(layers, {"num_attention_heads": [3, 4]}).attentions] == [3, 4]
    towers = {
        "vision_tower.encoder.layers.0.self_attn.out_proj": (8, 8),
        "language_model.layers.0.self_attn.o_proj": (12, 12),
    }
    config = {"vision_config": {"num_attention_heads": 4}, "text_config": {"num_attention_heads": 3}}
    assert [a.n_q for a in layout_from_shapes(towers, config).attentions] == [4, 3]
    # BLIP: the names of the towers are not those of the configuration.
    assert layout_from_shapes({"decoder.layers.0.self_attn.out_proj": (12, 12)}, config).attentions[0].n_q == 3


def test_layers_of_another_kind_are_passed_over_with_a_reason() -> None:
    shapes = llama(4)
    shapes |= {"model.layers.4.linear_attn.out_proj": (64, 64), "model.layers.5.conv.in_proj": (64, 64)}
    config = {"num_attention_heads": 8, "layer_types": ["full_attention"] * 3 + ["linear_attention"]}
    layout = layout_from_shapes(shapes, config, skipped={"head": "of the caller"})
    assert [a.layer for a in layout.attentions] == [0, 1, 2]
    assert {name: reason.split(":")[0] for name, reason in layout.skipped.items()} == {
        "head": "of the caller",
        "model.layers.3": "linear attention or a state space",
        "model.layers.4.linear_attn": "linear attention or a state space",
        "model.layers.5": "no attention that is known",
    }


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param({}, "the number of heads is not known", id="none"),
        pytest.param({"num_attention_heads": 3}, "a multiple of 3 heads", id="not-dividing"),
        pytest.param({"num_attention_heads": 8, "num_key_value_heads": 4}, "4, as the configuration", id="wrong-kv"),
        pytest.param({"num_attention_heads": 2, "num_key_value_heads": 2}, "a multiple of 64", id="coarser"),
        pytest.param({"num_attention_heads": True}, "not known", id="no-number"),
    ],
)
def test_heads_that_contradict_the_shapes_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(LoraforgeError, match=words):
        layout_from_shapes(llama(), config, "a/model")


def test_an_unknown_architecture_is_refused_with_what_it_has() -> None:
    shapes = {f"blocks.{i}.mix.{part}": (8, 8) for i in range(3) for part in ("post_proj", "q_head")}
    with pytest.raises(LoraforgeError, match="no attention is known in this model") as caught:
        layout_from_shapes(shapes, {"model_type": "odd", "num_attention_heads": 2}, "a/model")
    assert caught.value.exit_code == 3
    assert caught.value.got == "blocks.N.mix.post_proj, blocks.N.mix.q_head"
    assert caught.value.where == "a/model"


def test_two_towers_of_one_stack_are_refused() -> None:
    shapes = {f"{tower}_model.encoder.layers.0.self_attn.out_proj": (8, 8) for tower in ("text", "vision")}
    config = {"text_config": {"num_attention_heads": 2}, "vision_config": {"num_attention_heads": 2}}
    with pytest.raises(LoraforgeError, match="would have the same name"):
        layout_from_shapes(shapes, config)


def test_a_layer_without_output_projection_is_passed_over_in_a_model_and_kept_in_an_adapter() -> None:
    shapes = {name: shape for name, shape in llama().items() if name != "model.layers.1.self_attn.o_proj"}
    config = {"num_attention_heads": 8, "head_dim": 16}
    layout = layout_from_shapes(shapes, config)
    assert [a.layer for a in layout.attentions] == [0]
    assert "model.layers.1.self_attn.q_proj" in layout.skipped["model.layers.1"]
    attention = layout_from_shapes(shapes, config, partial=True).attentions[1]
    assert (attention.o.module, attention.o.size, attention.n_kv) == ("", 16, 2)


def test_an_adapter_alone_gets_its_heads_from_the_user() -> None:
    names = [f"base_model.model.model.layers.0.self_attn.{part}_proj" for part in "qv"]
    shapes = {names[0]: (128, 64), names[1]: (32, 64)}
    (attention,) = layout_from_heads(names, heads=8, kv_heads=2, shapes=shapes).attentions
    assert (attention.n_q, attention.n_kv, attention.k) == (8, 2, None)
    assert attention.q is not None and attention.q.size == 16
    assert attention.span("v", 7) == slice(16, 32)
    (attention,) = layout_from_heads(names, heads=8, shapes=shapes).attentions
    assert attention.n_kv == 2  # by its rows
    (attention,) = layout_from_heads(names[1:], heads=8, kv_heads=2, head_dim=16, shapes=shapes).attentions
    assert (attention.q, attention.o.size) == (None, 16)
    with pytest.raises(LoraforgeError, match="2 key-value heads by the shapes"):
        layout_from_heads(names, heads=8, kv_heads=4, shapes=shapes)
    with pytest.raises(LoraforgeError, match="no attention is known"):
        layout_from_heads(["lm_head"], heads=8, shapes={"lm_head": (4, 4)})


def test_an_adapter_of_a_known_family_has_its_fused_order_and_its_turned_weights() -> None:
    shapes = {"gpt_neox.layers.0.attention.query_key_value": (96, 32)}
    (attention,) = layout_from_heads([*shapes], heads=4, shapes=shapes, family="gpt_neox").attentions
    assert [attention.span(part, 1) for part in "qkv"] == [slice(24, 32), slice(32, 40), slice(40, 48)]
    shapes = {"transformer.h.0.attn.c_attn": (96, 32), "transformer.h.0.attn.c_proj": (32, 32)}
    (attention,) = layout_from_heads([*shapes], heads=4, shapes=shapes, family="gpt2").attentions
    assert attention.o.transposed and attention.v is not None and attention.v.transposed
    assert attention.v.offset == 64


def test_names_and_shapes_need_no_torch() -> None:
    script = "import sys, loraforge.measure.heads.families; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
