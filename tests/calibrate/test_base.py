from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraforge.calibrate.base import check_inputs, encoder_decoder, load_base, prefer_kwargs
from loraforge.calibrate.modules import is_transposed, resolve_modules, weight_view
from loraforge.errors import InputProblems, LoraforgeError

BERT = tf.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
GPT2 = tf.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=16)
T5 = tf.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0)
QUERY = "encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    tf.BertModel(BERT).save_pretrained(folder)
    return folder


def test_a_folder_is_loaded_frozen_and_quietly(bert_folder, capfd) -> None:
    model, config = load_base(
        bert_folder, task_type="SEQ_CLS", wanted=[f"bert.{QUERY}"], shapes={f"bert.{QUERY}": (8, 8)}
    )
    assert type(model).__name__ == "BertModel" and config.hidden_size == 8
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert next(model.parameters()).dtype == torch.float32
    half, _ = load_base(bert_folder, dtype="bfloat16")
    assert next(half.parameters()).dtype == torch.bfloat16
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16])
def test_rotary_frequencies_keep_their_precision(made_in: torch.dtype) -> None:
    """In bfloat16 they are off by up to 2^-9 of themselves: half a radian at position 256."""
    config = tf.LlamaConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    torch.manual_seed(0)
    given = tf.LlamaForCausalLM(config)
    want = given.model.rotary_emb.inv_freq.clone()
    if made_in != torch.float32:
        given.model.embed_tokens.to(made_in), given.model.layers.to(made_in)
        given.model.norm.to(made_in), given.lm_head.to(made_in)
    model, _ = load_base(given, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, want) and want.dtype == torch.float32
    assert torch.isfinite(model(torch.arange(12)[None]).logits).all()
    wider, _ = load_base(given, dtype="float64")
    assert wider.model.rotary_emb.inv_freq.dtype == torch.float64


def test_the_task_types_class_is_the_second_guess(tmp_path) -> None:
    tf.BertForSequenceClassification(BERT).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"architectures": ["BertModel"]}))
    model, _ = load_base(tmp_path, task_type="SEQ_CLS", wanted=["classifier"])
    assert type(model).__name__ == "BertForSequenceClassification"
    with pytest.raises(LoraforgeError, match="no such module"):
        load_base(tmp_path, wanted=["classifier"])


def test_an_architecture_that_transformers_lacks(tmp_path, bert_folder) -> None:
    for file in bert_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"architectures": ["NoSuchModel"]}))
    assert type(load_base(tmp_path, wanted=[QUERY])[0]).__name__ == "BertModel"


def test_weights_made_up_by_the_loader_are_refused(tmp_path, bert_folder) -> None:
    for file in bert_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if k != f"{QUERY}.weight"}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(LoraforgeError, match="(?s)no weight for a module.*query"):
        load_base(tmp_path, wanted=[f"bert.{QUERY}"])
    tensors[f"{QUERY}.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoraforgeError, match="(?s)not finite.*query"):
        load_base(tmp_path, wanted=[QUERY])
    assert load_base(tmp_path, wanted=[QUERY.replace("query", "value")])


def test_bases_that_cannot_be_loaded(tmp_path, bert_folder) -> None:
    with pytest.raises(LoraforgeError, match="folder does not exist"):
        load_base(tmp_path / "absent")
    with pytest.raises(LoraforgeError, match="(?s)not on this machine.*hf download nobody/nothing"):
        load_base("nobody/nothing")
    with pytest.raises(LoraforgeError, match="no config.json"):
        load_base(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LoraforgeError, match="config.json cannot be read"):
        load_base(tmp_path)
    (tmp_path / "config.json").write_bytes((bert_folder / "config.json").read_bytes())
    with pytest.raises(LoraforgeError, match="(?s)weights cannot be loaded.*BertModel"):
        load_base(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((bert_folder / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(LoraforgeError, match="weights cannot be loaded"):
        load_base(tmp_path)
    with pytest.raises(LoraforgeError, match="unknown dtype"):
        load_base(bert_folder, dtype="int8")


def test_a_model_in_memory() -> None:
    model = tf.GPT2LMHeadModel(GPT2)
    found, config = load_base(model, wanted=["transformer.h.0.attn.c_attn"], dtype="float64")
    assert found is model and config is model.config and next(found.parameters()).dtype == torch.float64
    plain = nn.Sequential(nn.Linear(2, 3))
    assert load_base(plain, wanted=["0"])[1] is None


def test_real_models_load(data_dir) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    model, config = load_base(data_dir / "models" / "stories260K-llama-hf", task_type="CAUSAL_LM", wanted=names)
    assert type(model).__name__ == "LlamaForCausalLM" and not encoder_decoder(config)


def test_names_with_a_prefix_too_many_or_too_few() -> None:
    inner, outer = tf.BertModel(BERT), tf.BertForSequenceClassification(BERT)
    for model, given, meant in (
        (inner, f"bert.{QUERY}", QUERY),
        (outer, QUERY, f"bert.{QUERY}"),
        (inner, QUERY, QUERY),
    ):
        assert resolve_modules(model, [given]) == {given: model.get_submodule(meant)}
    assert list(resolve_modules(outer, ["classifier", f"bert.{QUERY}"])) == ["classifier", f"bert.{QUERY}"]


def test_one_prefix_for_all_decides_what_one_name_leaves_open() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"q": nn.Linear(2, 2), "v": nn.Linear(2, 2)})

    model = nn.ModuleDict({"left": block(), "right": nn.ModuleDict({"q": nn.Linear(2, 2)})})
    with pytest.raises(LoraforgeError, match="(?s)fits several modules.*left.q, right.q"):
        resolve_modules(model, ["q"])
    found = resolve_modules(model, ["q", "v"])
    assert found == {"q": model["left"]["q"], "v": model["left"]["v"]}


def test_absent_modules_are_listed_with_close_names() -> None:
    model = tf.BertModel(BERT)
    with pytest.raises(InputProblems, match="(?s)self.quary.*close names: .*self.query.*wrong.module") as caught:
        resolve_modules(model, [QUERY.replace("query", "quary"), "wrong.module", QUERY])
    assert len(caught.value.problems) == 2
    with pytest.raises(InputProblems, match="and 30 more of 40 modules"):
        resolve_modules(model, [f"layers.{i}.absent" for i in range(40)])
    with pytest.raises(LoraforgeError, match="two names mean one module"):
        resolve_modules(model, [QUERY, f"bert.{QUERY}"])


class Scaled(nn.Module):
    """Linear with a weight of its own, as (m, n) or (n, m)."""

    def __init__(self, transposed: bool, power: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.bias = nn.Parameter(torch.randn(2 if transposed else 3))
        self.transposed, self.power = transposed, power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ (self.weight if self.transposed else self.weight.T)) ** self.power + self.bias


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(2, 3, 4))


def test_kinds_of_modules() -> None:
    model = nn.ModuleDict({
        "linear": nn.Linear(2, 3), "conv1d": Conv1D(3, 2), "own": Scaled(False), "own_t": Scaled(True),
        "square": Scaled(True, 2), "embedding": nn.Embedding(3, 2), "conv": nn.Conv2d(2, 3, 1), "norm": nn.LayerNorm(2),
        "experts": Experts(), "wrapped": nn.ModuleDict({"base_layer": nn.Linear(2, 3)}),
    })  # fmt: skip
    model["wrapped"].base_layer = nn.Linear(2, 3)
    good = resolve_modules(
        model, ["linear", "conv1d", "own", "own_t"], {"linear": (3, 2), "conv1d": (3, 2), "own_t": (2, 3)}
    )
    assert [is_transposed(m) for m in good.values()] == [False, True, False, True]
    for name, words in {
        "embedding": "Embedding", "conv": "Conv2d", "norm": "LayerNorm", "square": "not linear",
        "experts": "routed experts", "wrapped": "wrapped by an adapter",
    }.items():  # fmt: skip
        with pytest.raises(LoraforgeError, match=f"(?s){words}") as caught:
            resolve_modules(model, [name])
        assert name in str(caught.value)


def test_shapes_must_be_the_adapters() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(2, 3), "conv1d": Conv1D(3, 2)})
    with pytest.raises(InputProblems, match=r"(?s)\(3, 2\) in the base.*\(2, 3\) in the adapter"):
        resolve_modules(model, ["linear", "conv1d"], {"linear": (2, 3), "conv1d": (2, 3)})


def test_quantised_weights_are_refused() -> None:
    linear = nn.Linear(2, 3)
    linear.weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(LoraforgeError, match="quantised"):
        resolve_modules(nn.Sequential(linear), ["0"])


@pytest.mark.parametrize("module", [nn.Linear(2, 3), Conv1D(3, 2), Scaled(True), Scaled(False)])
def test_weight_view_writes_into_the_module(module: nn.Module) -> None:
    view = weight_view(module)
    x = torch.randn(4, view.shape[1])
    before = module(x)
    delta = torch.randn_like(view)
    view.add_(delta)
    # The view must reach the module's own storage: the change of the outputs is the delta's product, to fp32 rounding.
    assert torch.allclose(module(x) - before, x @ delta.T, atol=1e-5)


def test_forward_options_and_inputs() -> None:
    bert, vit = tf.BertModel(BERT), tf.ViTModel(tf.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    assert prefer_kwargs(bert)["use_cache"] is False and "use_cache" not in prefer_kwargs(vit)
    assert encoder_decoder(T5) and not encoder_decoder(BERT) and not encoder_decoder(None)
    check_inputs(bert, ["input_ids", "attention_mask"], "a.safetensors")
    with pytest.raises(LoraforgeError, match="(?s)does not take 'pixel_values'.*a.safetensors"):
        check_inputs(bert, ["input_ids", "pixel_values"], "a.safetensors")


class Passing(nn.Module):
    """Hands its inputs on, whatever they are called."""

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return inputs["anything"]


class PassingAll(nn.Module):
    def forward(self, *inputs: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        return named["anything"]


class Positional(nn.Module):
    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return inputs[0]


def test_a_forward_without_names_takes_any_input() -> None:
    check_inputs(Passing(), ["anything"], "a.safetensors")
    check_inputs(PassingAll(), ["anything"], "a.safetensors")
    with pytest.raises(LoraforgeError, match="does not take 'inputs'"):
        check_inputs(Positional(), ["inputs"], "a.safetensors")
