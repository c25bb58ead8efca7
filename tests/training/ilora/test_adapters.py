"""Two adapters in one model: pairing, switching, saving and loading."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from loraforge.errors import LoraforgeError
from loraforge.training.ilora.adapters import active, add_stable, load_adapter, load_pair, pair_adapters, save_pair
from loraforge.training.ilora.ema import EmaPairs
from tests.training.ilora.models import bert, class_rows, collate, llama, t5, text_rows, vit, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def batch_of(rows):
    return {key: value for key, value in collate(rows).items() if key not in ("task", "labels")}


@pytest.mark.parametrize(
    ("build", "options", "tensors"),
    [
        (llama, {}, 12),
        (llama, {"use_dora": True}, 18),
        (bert, {"lora_bias": True}, 20),
        (llama, {"target_modules": ["q_proj", "embed_tokens"]}, 8),
        (llama, {"modules_to_save": ["lm_head"]}, 13),
        (llama, {"trainable_token_indices": [3, 4]}, 13),
        (bert, {}, 14),
        (t5, {}, 32),
        (vit, {}, None),
    ],
)
def test_every_kind_of_tensor_is_paired_and_starts_equal(build, options, tensors):
    model = build(**options)
    state = torch.get_rng_state()
    training = model.training
    add_stable(model)
    assert torch.equal(state, torch.get_rng_state()) and model.training == training
    pairs = pair_adapters(model)
    plastic, stable = weights(model), weights(model, "ema")
    assert len(pairs) == len(plastic) == (tensors or len(pairs))
    assert plastic.keys() == stable.keys()
    assert all(torch.equal(plastic[name], stable[name]) for name in plastic)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(pair.plastic) for pair in pairs}
    assert {id(pair.stable) for pair in pairs}.isdisjoint(id(pair.plastic) for pair in pairs)


def test_equal_adapters_give_equal_outputs_and_others_do_not():
    model = bert().eval()
    add_stable(model)
    batch = batch_of(class_rows(3))
    plastic = model(**batch).logits
    with active(model, "ema"):
        assert torch.equal(model(**batch).logits, plastic)
    with torch.no_grad():
        for pair in pair_adapters(model):
            pair.stable.add_(0.1)
    with active(model, "ema"):
        assert not torch.allclose(model(**batch).logits, plastic)
    assert torch.equal(model(**batch).logits, plastic)


def test_what_the_base_is_stays(tmp_path):
    model = llama(init_lora_weights="pissa")
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    add_stable(model)
    for name, p in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, base[name])
    assert all(torch.equal(pair.plastic, pair.stable) for pair in pair_adapters(model))


def test_a_module_that_is_called_default_is_no_adapter():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.default = torch.nn.Linear(4, 4)
            self.ema = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.ema(self.default(x))

    model = get_peft_model(Odd(), LoraConfig(target_modules=["default"], r=2))
    add_stable(model)
    assert [pair.name for pair in pair_adapters(model)] == [
        "base_model.model.default.lora_A.weight",
        "base_model.model.default.lora_B.weight",
    ]


def test_refusals_name_what_is_wrong():
    with pytest.raises(LoraforgeError, match="no stable adapter"):
        pair_adapters(llama())
    with pytest.raises(LoraforgeError, match="biases of the base"):
        add_stable(llama(bias="lora_only"))
    with pytest.raises(LoraforgeError, match="no adapter to train"):
        pair_adapters(torch.nn.Linear(2, 2))
    model = llama()
    add_stable(model)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(LoraforgeError, match="the two adapters would share") as error:
        pair_adapters(model)
    assert "lm_head" in error.value.got
    from peft import IA3Config

    with pytest.warns(FutureWarning):
        other = get_peft_model(
            llama().unload(), IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
        )
    with pytest.raises(LoraforgeError, match="this kind of adapter") as error:
        add_stable(other)
    assert error.value.got == "IA3"


def test_adapters_of_other_shapes_do_not_pair():
    model = llama()
    model.add_adapter("ema", LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(LoraforgeError) as error:
        pair_adapters(model)
    text = str(error.value)
    assert "ema: (3, 16)" in text and "as default: (2, 16)" in text
    assert "v_proj.lora_A.weight" in text and "ema: none" in text


@pytest.mark.parametrize("build", [llama, bert])
def test_each_adapter_is_saved_whole_at_the_root_of_its_own_folder(build, tmp_path):
    model = build()
    add_stable(model)
    with torch.no_grad():
        for pair in pair_adapters(model):
            pair.stable.mul_(0.5)
    save_pair(model, tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        f"{name}/{file}" for name in ("default", "ema") for file in ("adapter_config.json", "adapter_model.safetensors")
    ]
    plastic, stable = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("default", "ema"))
    assert plastic.keys() == stable.keys()
    assert all(torch.equal(plastic[name] * 0.5, stable[name]) for name in plastic)
    assert json.loads((tmp_path / "ema" / "adapter_config.json").read_text())["r"] == 2
    # PEFT itself reads both as what they are.
    batch = batch_of(class_rows(2) if build is bert else text_rows(2))
    model.eval()
    for name in ("default", "ema"):
        with active(model, name):
            wanted = model(**batch).logits
        again = PeftModel.from_pretrained(build().unload(), tmp_path / name).eval()
        torch.testing.assert_close(again(**batch).logits, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "options"),
    [(llama, {}), (llama, {"use_dora": True}), (bert, {})],
)
def test_loading_copies_tensors_into_either_adapter(build, options, tmp_path):
    model, other = build(seed=1, **options), build(seed=2, **options)
    for one in (model, other):
        add_stable(one)
    with torch.no_grad():
        for pair in pair_adapters(model):
            pair.stable.add_(1)
    save_pair(model, tmp_path)
    pairs = EmaPairs(pair_adapters(other))
    load_pair(other, tmp_path / "default", tmp_path / "ema", pairs)
    for adapter in ("default", "ema"):
        mine, theirs = weights(model, adapter), weights(other, adapter)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    load_adapter(other, tmp_path / "ema", "default")
    assert all(torch.equal(tensor, weights(model, "ema")[name]) for name, tensor in weights(other).items())
    trained = {id(p) for p in other.parameters() if p.requires_grad}
    assert trained == {id(pair.plastic) for pair in pairs.pairs} and other.active_adapter == "default"


def test_a_float32_average_of_bfloat16_adapters_is_saved_and_loaded_as_it_is(tmp_path):
    model = llama().to(torch.bfloat16)
    add_stable(model)
    pairs = EmaPairs(pair_adapters(model))
    with torch.no_grad():
        for pair in pairs.pairs:
            pair.plastic.add_(0.01)
    pairs.update(0.001)
    save_pair(model, tmp_path, pairs)
    saved = load_file(tmp_path / "ema" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any(bool((tensor != tensor.bfloat16().float()).any()) for tensor in saved.values())
    assert {t.dtype for t in load_file(tmp_path / "default" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    again = llama(seed=4).to(torch.bfloat16)
    add_stable(again)
    other = EmaPairs(pair_adapters(again))
    load_pair(again, tmp_path / "default", tmp_path / "ema", other)
    with other.full_precision(), pairs.full_precision():
        mine, theirs = weights(model, "ema"), weights(again, "ema")
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_does_not_fit_is_listed(tmp_path):
    model = llama()
    add_stable(model)
    with pytest.raises(LoraforgeError, match="there is no adapter for ema") as error:
        load_adapter(model, tmp_path / "nowhere", "ema")
    assert error.value.where == str(tmp_path / "nowhere")
    save_pair(model, tmp_path)
    path = tmp_path / "ema" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    before = weights(model, "ema")
    with pytest.raises(LoraforgeError) as error:
        load_adapter(model, tmp_path / "ema", "ema")
    assert name in error.value.where and error.value.got == "none"
    save_pair(llama(r=3), tmp_path / "wide", stable=False)
    with pytest.raises(LoraforgeError, match=r"\(3, 16\)"):
        load_adapter(model, tmp_path / "wide" / "default", "ema")
    assert all(torch.equal(before[key], value) for key, value in weights(model, "ema").items())
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(LoraforgeError, match="cannot be read"):
        load_adapter(model, tmp_path / "ema", "ema")


def test_an_adapter_that_is_not_there_cannot_be_switched_to():
    with pytest.raises(LoraforgeError, match="no such adapter") as error:
        active(llama(), "ema")
    assert error.value.expected == "default"
