"""The doctor confirms what is right, refuses what is wrong, and leaves the model as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraforge.errors import LoraforgeError
from loraforge.measure.heads.doctor import check_layout, confirmed_layout
from loraforge.measure.heads.find import layout_of_model, modules_of
from loraforge.measure.heads.layout import HeadLayout
from loraforge.measure.heads.specimens import random_inputs
from tests.measure.tiny_heads import ARCHITECTURES, build, outputs

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def failures(model: nn.Module, layout: HeadLayout | None = None, **options: Any) -> list[str]:
    report = check_layout(model, layout, **options)
    assert report.passed == all(entry["passed"] for entry in report.checks)
    return [f"{entry['check']}: {entry['why']}" for entry in report.checks if not entry["passed"]]


@every_architecture
def test_an_architecture_is_confirmed_head_by_head(name: str) -> None:
    model = build(name)
    report = check_layout(model, every=True)
    assert [entry for entry in report.checks if not entry["passed"]] == []
    layout = report.layout
    for attention in layout.attentions:
        label = f"{attention.stack} {attention.kind} {attention.layer}"
        names = {entry["check"] for entry in report.checks if entry["attention"] == label}
        # Latent attention is confirmed by the projection from its latent space.
        parts = [part for part in "qkv" if attention.part(part) is not None] or ["q"]
        expected = {f"{part} of head {head}" for part in parts for head in range(attention.n_q)}
        assert names == expected | {"once", "gate"}
    # No bit of another head changes, whatever the architecture.
    assert {entry["value"] for entry in report.checks if " of head " in entry["check"]} == {0.0}


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "deepseek_v3", "olmo2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_any_dtype_is_confirmed(name: str, dtype: torch.dtype) -> None:
    assert failures(build(name).to(dtype)) == []


@pytest.mark.parametrize("name", ["bert", "qwen2", "gpt_neox", "deberta-v2"])
def test_weights_as_the_initialiser_leaves_them_are_confirmed(name: str) -> None:
    # Queries and keys near zero make attention uniform: with the model's own activations nothing would change.
    model = build(name)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert failures(model) == []


@pytest.mark.parametrize(
    ("name", "part"),
    [*((name, part) for name in ("bert", "llama", "gpt2", "phi3") for part in "qkv"), ("falcon-new", "v")],
)
def test_disturbed_weights_say_the_same_as_the_doctor(name: str, part: str) -> None:
    """The layout test itself, on weights: rows of a head are disturbed, only its slice of o's input changes."""
    model = build(name)
    layout, inputs = layout_of_model(model), random_inputs(model)
    attention = layout.attentions[0]
    projection = attention.part(part)
    assert projection is not None
    modules = modules_of(model)
    seen: list[Tensor] = []
    modules[attention.o.module].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    weight = modules[projection.module].weight.detach()
    view = weight.T if projection.transposed else weight
    for block in range(projection.heads):
        rows = projection.span(block)
        kept = view[rows].clone()
        seen.clear()
        outputs(model, inputs)
        view[rows] += torch.randn(kept.shape, generator=torch.Generator().manual_seed(block))
        outputs(model, inputs)
        view[rows] = kept
        changed = (seen[1] - seen[0]).abs().amax(dim=(0, 1)).reshape(attention.n_q, -1).gt(0)
        group = (
            range(block, block + 1) if part == "q" else range(block * attention.group, (block + 1) * attention.group)
        )
        assert changed.any(1).nonzero().flatten().tolist() == [*group]


def wrong_heads(name: str, **config: Any) -> list[str]:
    model = build(name)
    for key, value in config.items():
        setattr(model.config, key, value)
    return failures(model)


def test_heads_that_are_cut_too_fine_are_refused() -> None:
    found = wrong_heads("bert", num_attention_heads=8)
    assert "q of head 0: other heads changed as well" in found
    assert "k of head 0: other heads changed as well" in found


def test_heads_that_are_cut_too_coarse_are_refused() -> None:
    found = wrong_heads("bert", num_attention_heads=2)
    assert "q of head 0: only a part of the head changed" in found
    found = wrong_heads("llama", num_attention_heads=2, num_key_value_heads=1)
    assert "q of head 1: only a part of the head changed" in found


def test_another_order_of_a_fused_projection_is_refused() -> None:
    model = build("gpt_neox")
    layout = layout_of_model(model)
    stacked = []
    for attention in layout.attentions:
        parts = {p: replace(attention.part(p), offset=16 * i, stride=0) for i, p in enumerate("qkv")}
        stacked.append(replace(attention, **parts))
    found = failures(model, replace(layout, attentions=tuple(stacked)))
    assert any("other heads changed" in line or "nothing changed" in line for line in found)


def test_groups_of_another_head_are_refused() -> None:
    model = build("llama")
    layout = layout_of_model(model)
    # As if key-value heads were shared by every second query head.
    turned = [
        replace(a, k=replace(a.k, offset=4, stride=-4), v=replace(a.v, offset=4, stride=-4)) for a in layout.attentions
    ]
    found = failures(model, replace(layout, attentions=tuple(turned)))
    assert any(line.startswith("k of head") for line in found) and any(line.startswith("v of head") for line in found)
    assert not any(line.startswith("q of head") for line in found)


def test_a_real_layout_that_nobody_described_is_refused() -> None:
    import transformers as tf

    config = tf.CodeGenConfig(vocab_size=40, n_embd=16, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    with pytest.raises(LoraforgeError, match="not confirmed by what the model does") as caught:
        confirmed_layout(tf.CodeGenModel(config))
    assert caught.value.exit_code == 3
    assert "h.0.attn.out_proj" in str(caught.value.got)


def test_shared_layers_are_refused() -> None:
    import transformers as tf

    config = tf.AlbertConfig(
        vocab_size=40, hidden_size=16, embedding_size=16, intermediate_size=32, num_attention_heads=4,
        num_hidden_layers=3,
    )  # fmt: skip
    assert failures(tf.AlbertModel(config)) == ["once: its projection ran 3 times a pass"]


def test_the_output_projection_must_have_the_stated_columns() -> None:
    model = build("gpt2", n_embd=16)
    layout = layout_of_model(model)
    plain = [replace(a, o=replace(a.o, size=2)) for a in layout.attentions]
    found = failures(model, replace(layout, attentions=tuple(plain)))
    assert any(line.startswith("gate: its weight is (16, 16)") for line in found)
    other = [replace(a, o=replace(a.o, module=a.q.module)) for a in layout.attentions]
    assert failures(model, replace(layout, attentions=tuple(other)))


def test_a_layout_of_another_model_is_refused() -> None:
    (line,) = failures(build("gpt2"), layout_of_model(build("bert")))
    assert line == "names: it lacks encoder.layer.0.attention.output.dense"


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], list[bool], list[bool], int]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()], hooks


def unchanged(model: nn.Module, before: tuple[dict[str, Tensor], list[bool], list[bool], int]) -> bool:
    after = snapshot(model)
    same = all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())
    return same and after[0].keys() == before[0].keys() and after[1:] == before[1:]


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2", "jamba"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = build(name).train()
    next(model.children()).eval()
    before = snapshot(model)
    drawn = torch.get_rng_state()
    assert failures(model) == []
    assert unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), drawn)


class Broken(nn.Module):
    """Breaks at its n-th run."""

    def __init__(self, inner: nn.Module, at: int) -> None:
        super().__init__()
        self.inner, self.left = inner, at

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of order")
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("at", [0, 1, 5])
def test_the_model_is_left_as_it_was_by_a_forward_that_breaks(at: int) -> None:
    model = build("bert").train()
    model.embeddings = Broken(model.embeddings, at)
    before = snapshot(model)
    (line,) = failures(model)
    assert line == "runs: RuntimeError: out of order"
    assert unchanged(model, before)
    with pytest.raises(LoraforgeError, match="out of order"):
        confirmed_layout(model)


def test_it_says_the_same_again_and_tries_few_heads_by_default() -> None:
    model = build("llama")
    first, again = check_layout(model, seed=3), check_layout(model, seed=3)
    assert first.checks == again.checks
    tried = {entry["check"] for entry in first.checks if entry["check"].startswith("q")}
    assert {"q of head 0", "q of head 3"} <= tried and len(first.checks) < len(check_layout(model, every=True).checks)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_model_with_an_adapter_is_confirmed(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = build(name)
    layout = layout_of_model(model)
    parts = {p.module for a in layout.attentions for p in (a.q, a.k, a.v, a.o) if p is not None}
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=sorted(parts), fan_in_fan_out=name == "gpt2"))
    assert failures(wrapped) == []
    assert confirmed_layout(wrapped) == layout
