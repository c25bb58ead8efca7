"""DoRA updates against the base: equal to what PEFT merges, exact or cut with the error that is reported."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

import loraforge as lf
from loraforge.adapters import open_adapter
from loraforge.errors import LoraforgeError
from loraforge.linalg.rank import RankRule
from loraforge.merging.models.dora import DoraLoader, additive, default_rule, dora_update
from loraforge.types import Dense, LowRank

# PEFT still reads an attribute that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=23, n_positions=8)), [
        "c_attn",
        "c_proj",
    ]


def vit():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_channels=2,
    )  # fmt: skip
    return ViTForImageClassification(config), ["q_proj", "projection"]


def trained(model: nn.Module, targets, folder, **options):
    """A DoRA adapter with factors and magnitudes away from their start; the wrapped model."""
    wrapped = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=6, target_modules=targets, use_dora=True, init_lora_weights=False, **options)
    )
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "magnitude" in name:
                weight *= 1 + 0.1 * torch.randn_like(weight)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return wrapped


@pytest.mark.parametrize("make", [gpt2, vit])
def test_equals_what_peft_merges(make, tmp_path):
    torch.manual_seed(0)
    model, targets = make()
    model.save_pretrained(tmp_path / "base")
    conv1d = make is gpt2
    wrapped = trained(model, targets, tmp_path / "dora", fan_in_fan_out=conv1d)
    merged = dict(wrapped.merge_and_unload().named_parameters())
    adapter = open_adapter(tmp_path / "dora")
    base = dict(make()[0].from_pretrained(tmp_path / "base").named_parameters())
    load = DoraLoader(tmp_path / "base", dense=True)
    assert adapter.modules
    for module in adapter.modules:
        found = load(adapter, module)
        expected = (merged[f"{module}.weight"] - base[f"{module}.weight"]).detach()
        expected = expected.T if conv1d else expected.flatten(1)
        torch.testing.assert_close(found.delta(), expected, rtol=1e-5, atol=1e-5)
    assert load.summary() is None


def test_cut_updates_and_their_errors(tmp_path):
    torch.manual_seed(1)
    model, targets = vit()
    model.save_pretrained(tmp_path / "base")
    trained(model, targets, tmp_path / "dora")
    adapter = open_adapter(tmp_path / "dora")
    whole, cut = DoraLoader(tmp_path / "base", dense=True), DoraLoader(tmp_path / "base")
    for module in adapter.modules:
        exact, found = whole(adapter, module).delta(), cut(adapter, module)
        assert 3 <= found.rank <= 12
        away = float((found.delta() - exact).norm())
        assert cut.lost(adapter, module) == pytest.approx(away, rel=1e-3)
        assert cut(adapter, module) is found, "a second reading decomposes nothing"
    assert f"{len(adapter.modules)} DoRA modules were cut" in str(cut.summary())


def test_the_report_counts_the_cut_and_a_rank_controls_it(tmp_path):
    """Totals bound the true error of the written delta; more rank, less error; a model loses nothing."""
    torch.manual_seed(1)
    model, targets = vit()
    model.save_pretrained(tmp_path / "base")
    trained(model, targets, tmp_path / "dora")
    adapter = open_adapter(tmp_path / "dora")
    whole = DoraLoader(tmp_path / "base", dense=True)
    exact = {module: whole(adapter, module).delta(torch.float64) for module in adapter.modules}
    size = sum(float(delta.square().sum()) for delta in exact.values()) ** 0.5
    errors = []
    for options in ({}, {"rank": 14}):
        found = lf.merge([adapter], method="task-arithmetic", base=tmp_path / "base", **options)
        away = {m: found.modules[m].delta(torch.float64) - delta for m, delta in exact.items()}
        true = sum(float(delta.square().sum()) for delta in away.values()) ** 0.5 / size
        assert true <= found.report["relative_error"] * 1.05 + 1e-6
        assert sum("DoRA modules were cut" in w for w in found.report["warnings"]) == 1
        errors.append(true)
    assert errors[1] < errors[0]
    out = tmp_path / "model"
    lf.merge([adapter], method="task-arithmetic", base=tmp_path / "base", output_kind="model", out=out)
    before = dict(type(model).from_pretrained(tmp_path / "base").named_parameters())
    after = dict(type(model).from_pretrained(out).named_parameters())
    for module, delta in exact.items():
        moved = (after[f"{module}.weight"] - before[f"{module}.weight"]).detach().flatten(1).double()
        torch.testing.assert_close(moved, delta, rtol=1e-4, atol=1e-5)


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    B, A, W = (torch.randn(s, generator=generator, dtype=torch.float64) for s in [(6, 2), (2, 9), (6, 9)])
    magnitude = 1 + torch.rand(6, generator=generator, dtype=torch.float64)
    return LowRank(B.to(dtype), A.to(dtype), 0.5), magnitude.to(dtype), W.to(dtype)


def test_rows_have_the_trained_norms():
    update, magnitude, W = problem()
    moved = W + additive(update, magnitude, W).delta()
    torch.testing.assert_close(moved.norm(dim=1), magnitude, rtol=1e-12, atol=0)
    plain = W + update.delta()
    torch.testing.assert_close(nn.functional.normalize(moved), nn.functional.normalize(plain), rtol=1e-12, atol=1e-12)


def test_magnitudes_at_their_start_give_the_plain_update():
    update, _, W = problem()
    norms = (W + update.delta()).norm(dim=1)
    torch.testing.assert_close(additive(update, norms, W).delta(), update.delta(), rtol=1e-12, atol=1e-12)
    found, error = dora_update(update, norms, W)
    assert found.rank == 2
    assert error < 1e-12


def test_dtypes_and_rules():
    update, magnitude, W = problem(torch.float32)
    assert additive(update, magnitude, W).weight.dtype == torch.float32
    found, error = dora_update(update, magnitude, W, RankRule(rank=1))
    exact = additive(update, magnitude, W).delta()
    assert found.rank == 1
    assert error == pytest.approx(float((found.delta() - exact).norm() / exact.norm()), rel=1e-5)
    assert default_rule(8) == RankRule(energy=0.99, min_rank=8, max_rank=32)


def test_refusals(tmp_path):
    update, magnitude, W = problem()
    with pytest.raises(LoraforgeError, match="do not fit"):
        additive(update, magnitude, W.T)
    with pytest.raises(LoraforgeError, match="no direction"):
        additive(LowRank(update.B, update.A * 0), magnitude, W * 0)
    with pytest.raises(LoraforgeError, match="files"):
        DoraLoader(nn.Linear(2, 2))


def test_plain_modules_pass(tmp_path):
    torch.manual_seed(3)
    model, _ = vit()
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
        tmp_path / "lora"
    )
    adapter = open_adapter(tmp_path / "lora")
    module = adapter.modules[0]
    plain = DoraLoader(tmp_path / "base")(adapter, module)
    whole = DoraLoader(tmp_path / "base", dense=True)(adapter, module)
    assert torch.equal(plain.B, adapter.load(module).B)
    assert isinstance(whole, Dense)
    assert torch.equal(whole.delta(), plain.delta())
