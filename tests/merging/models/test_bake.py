"""Base + merged update as a model: the same logits as the base with the adapter in PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from loraforge.adapters import open_adapter, resolve_heads
from loraforge.errors import InputProblems, LoraforgeError
from loraforge.merging.models.bake import bake
from loraforge.types import Dense, RowStream

# PEFT still reads an attribute that transformers renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape"),  # it takes a bias for a broken factor
]

IDS = torch.tensor([[1, 5, 2, 7, 3], [4, 4, 6, 0, 1]])
LLAMA = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 29, "max_position_embeddings": 16, "attention_bias": True,
}  # fmt: skip


def llama(tie=False):
    return LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tie))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=29, n_positions=16))


def bert():
    config = BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=29,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def t5():
    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=29, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def vit():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_channels=2,
    )  # fmt: skip
    return ViTForImageClassification(config)


def logits(model):
    model.eval()
    name = model.config.model_type
    inputs = {"input_ids": IDS}
    if name == "t5":
        inputs["decoder_input_ids"] = IDS[:, :3]
    if name == "vit":
        inputs = {"pixel_values": torch.linspace(-1, 1, 128).reshape(1, 2, 8, 8)}
    with torch.no_grad():
        return model(**inputs).logits


def write(model, place, **options):
    """Base and adapter folders, and the logits of both together."""
    torch.manual_seed(7)
    model.save_pretrained(place / "base")
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **options))
    wrapped.save_pretrained(place / "lora", save_embedding_layers=False)
    return logits(wrapped)


def stream_of(adapter):
    for module in reversed(adapter.modules):  # any order will do
        bias = adapter.bias(module)
        yield module, adapter.load(module), None if bias is None else bias * adapter.info(module).scaling


def run(place, out="out", base="base", **options):
    adapter = open_adapter(place / "lora")
    heads = resolve_heads([adapter])
    return bake(
        stream_of(adapter),
        place / base,
        place / out,
        adapters=[adapter],
        modules=adapter.modules,
        heads=heads,
        **options,
    )


LINEAR = {"llama": ["q_proj", "o_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"], "t5": ["q", "wo", "wi"]}


@pytest.mark.parametrize(
    ("make", "auto", "options"),
    [
        (llama, AutoModelForCausalLM, {"target_modules": LINEAR["llama"]}),
        (llama, AutoModelForCausalLM, {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
        (llama, AutoModelForCausalLM, {"target_modules": ["q_proj"], "lora_bias": True}),
        (gpt2, AutoModelForCausalLM, {"target_modules": LINEAR["gpt2"], "fan_in_fan_out": True}),
        (t5, AutoModelForSeq2SeqLM, {"target_modules": LINEAR["t5"]}),
        (
            bert,
            AutoModelForSequenceClassification,
            {"target_modules": ["query", "dense"], "task_type": TaskType.SEQ_CLS},
        ),
        (vit, AutoModelForImageClassification, {"target_modules": ["q_proj", "projection"]}),
    ],
    ids=["llama", "llama-embeddings", "llama-bias", "gpt2", "t5", "bert-head", "vit-conv"],
)
def test_logits(make, auto, options, tmp_path):
    torch.manual_seed(0)
    expected = write(make(), tmp_path, **options)
    report = run(tmp_path, shard_bytes=3000)
    found = logits(auto.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(report["files"]) > 1
    plain = logits(auto.from_pretrained(tmp_path / "base"))
    assert (plain - expected).abs().max() > 1e-3


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_weights_are_untied(target, tmp_path):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="tie"):
        expected = write(llama(tie=True), tmp_path, target_modules=[target])
    assert "lm_head.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    report = run(tmp_path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert any("untied" in note for note in report["warnings"])
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_names_of_a_bare_base(tmp_path):
    """The adapter of a classifier against a base saved without its head and prefix."""
    torch.manual_seed(0)
    model = bert()
    expected = write(
        model, tmp_path, target_modules=["query"], modules_to_save=["classifier"], task_type=TaskType.SEQ_CLS
    )
    full = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    full.bert.save_pretrained(tmp_path / "bare")
    assert not any(n.startswith("bert.") for n in load_file(tmp_path / "bare" / "model.safetensors"))
    report = run(tmp_path, base="bare")
    assert any("classifier.weight: a head that the base does not have" in note for note in report["warnings"])
    found = logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_streams_of_rows_lose_nothing(tmp_path):
    torch.manual_seed(0)
    write(llama(), tmp_path, target_modules=["q_proj", "down_proj"])
    adapter = open_adapter(tmp_path / "lora")
    kinds = []

    def stream():
        for module in adapter.modules:
            delta = adapter.load(module).delta()
            form = RowStream(tuple(delta.shape), delta.dtype, delta.device, lambda i, j, delta=delta: delta[i:j], 2)
            kinds.append(form if len(kinds) % 2 else Dense(delta))
            yield module, kinds[-1], None

    bake(stream(), tmp_path / "base", tmp_path / "out", adapters=[adapter], modules=adapter.modules)
    base, out = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    for name in base:
        module = name.removesuffix(".weight")
        expected = base[name] + adapter.load(module).delta() if module in adapter.modules_set else base[name]
        assert torch.equal(out[name], expected), name


def test_dtype(tmp_path):
    write(llama(), tmp_path, target_modules=["q_proj"])
    report = run(tmp_path, dtype="bfloat16")
    assert report["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_heads_of_another_size(tmp_path):
    torch.manual_seed(0)
    two = bert()
    two.config.num_labels = 2
    BertModel(two.config)
    write(bert(), tmp_path, target_modules=["query"], modules_to_save=["classifier"], task_type=TaskType.SEQ_CLS)
    state = load_file(tmp_path / "base" / "model.safetensors")
    state["classifier.weight"], state["classifier.bias"] = torch.zeros(2, 16), torch.zeros(2)
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    del config["id2label"], config["label2id"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    run(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 3
    assert model.classifier.out_features == 3


def test_a_bias_without_place(tmp_path):
    write(LlamaForCausalLM(LlamaConfig(**LLAMA | {"attention_bias": False})), tmp_path, target_modules=["up_proj"])
    adapter = open_adapter(tmp_path / "lora")
    state = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    biased = {k: v for k, v in state.items()} | {
        k.replace("lora_B.weight", "lora_B.bias"): torch.ones(len(v)) for k, v in state.items() if "lora_B" in k
    }
    save_file(biased, tmp_path / "lora" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config | {"lora_bias": True}))
    with pytest.raises(InputProblems, match="2 problems") as caught:
        run(tmp_path)
    assert "mlp.up_proj.bias" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert adapter.modules


def test_another_base(tmp_path):
    write(llama(), tmp_path, target_modules=["q_proj"])
    gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputProblems) as caught:
        run(tmp_path, base="gpt2")
    assert "model.layers.0.self_attn.q_proj" in str(caught.value)
    wide = LlamaForCausalLM(LlamaConfig(**LLAMA | {"hidden_size": 32}))
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(InputProblems, match="problems") as caught:
        run(tmp_path, base="wide")
    assert "[32, 32] in the base" in str(caught.value)


def test_quantised_base(tmp_path):
    write(llama(), tmp_path, target_modules=["q_proj"])
    state = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(state | {name: state[name].to(torch.int8)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(LoraforgeError, match="quantised") as caught:
        run(tmp_path)
    assert name in str(caught.value)


def test_baked_equals_peft_for_two_adapters(tmp_path):
    """The whole way through `loraforge.merge`."""
    import loraforge

    torch.manual_seed(0)
    write(llama(), tmp_path, target_modules=["q_proj", "v_proj"])
    loraforge.merge(
        [tmp_path / "lora", tmp_path / "lora"], "task-arithmetic", weights=[0.5, 0.25], base=tmp_path / "base",
        out=tmp_path / "model", output_kind="model",
    )  # fmt: skip
    loraforge.merge([tmp_path / "lora", tmp_path / "lora"], "task-arithmetic", weights=[0.5, 0.25]).save(
        tmp_path / "peft"
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = logits(PeftModel.from_pretrained(base, tmp_path / "peft"))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [True, False], ids=["gpt-oss", "mixtral-fused"])
def test_experts(transposed, tmp_path):
    """Stacked experts, stored (in, out) or (out, in); the second only where the base's file holds them stacked."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 29, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8,
    }  # fmt: skip
    model = GptOssForCausalLM(GptOssConfig(**sizes)) if transposed else MixtralForCausalLM(MixtralConfig(**sizes))
    expected = write(model, tmp_path, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    if not transposed:
        with pytest.raises(InputProblems, match="problems"):
            run(tmp_path)
        plain = MixtralForCausalLM.from_pretrained(tmp_path / "base")
        plain.save_pretrained(tmp_path / "base", save_original_format=False)
    run(tmp_path)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
