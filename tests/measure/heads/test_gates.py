"""Gates against zeroed columns, on every architecture that is known here."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraforge.errors import LoraforgeError
from loraforge.measure.heads.find import layout_of_model, modules_of
from loraforge.measure.heads.gates import HeadGates
from loraforge.measure.heads.layout import HeadLayout
from loraforge.measure.heads.specimens import random_inputs
from tests.measure.tiny_heads import ARCHITECTURES, build, outputs

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
ROWS = 2


@cache
def subject(name: str) -> tuple[nn.Module, HeadLayout, dict[str, Any], Tensor]:
    """A model that no test changes, its layout, inputs of two rows and its output."""
    model = build(name).requires_grad_(False)
    inputs = random_inputs(model, seed=1)
    return model, layout_of_model(model), inputs, outputs(model, inputs)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def gates_of(layout: HeadLayout, index: int, head: int) -> Tensor:
    gate = torch.ones(layout.attentions[index].n_q)
    gate[head] = 0
    return gate


@every_architecture
def test_a_closed_gate_is_a_zeroed_slice_of_the_output_projection(name: str) -> None:
    _, layout, inputs, plain = subject(name)
    model = build(name)
    projections = modules_of(model)
    with torch.no_grad(), HeadGates(model, layout) as gates:
        for index, attention in enumerate(layout.attentions):
            head = index % attention.n_q
            gates.set(index, gates_of(layout, index, head))
            gated = outputs(model, inputs)
            gates.clear()
            weight = projections[attention.o.module].weight
            kept = weight.clone()
            # Conv1D holds (in, out): its heads are rows.
            weight[attention.o.span(head) if attention.o.transposed else (slice(None), attention.o.span(head))] = 0
            zeroed = outputs(model, inputs)
            weight.copy_(kept)
            assert torch.equal(gated, zeroed)
            assert not torch.allclose(gated, plain, atol=1e-4)


@every_architecture
def test_open_and_cleared_gates_change_no_bit(name: str) -> None:
    model, layout, inputs, plain = subject(name)
    with torch.no_grad(), HeadGates(model, layout) as gates:
        assert torch.equal(outputs(model, inputs), plain)
        for index, attention in enumerate(layout.attentions):
            gates.set(index, torch.ones(attention.n_q))
        gates.clear()
        assert torch.equal(outputs(model, inputs), plain)


@every_architecture
def test_every_gate_gets_a_gradient(name: str) -> None:
    model, layout, inputs, _ = subject(name)
    leaves = [torch.ones(a.n_q, requires_grad=True) for a in layout.attentions]
    with HeadGates(model, layout) as gates:
        for index, leaf in enumerate(leaves):
            gates.set(index, leaf)
        result = outputs(model, inputs)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(0))
    for gradient in torch.autograd.grad((result * weights).sum(), leaves):
        assert (gradient.abs() > 1e-6).all()


@every_architecture
def test_a_row_of_gates_a_sample_is_that_gate_for_the_sample(name: str) -> None:
    model, layout, inputs, _ = subject(name)
    rows = [
        torch.rand(ROWS, a.n_q, generator=torch.Generator().manual_seed(i)) for i, a in enumerate(layout.attentions)
    ]
    with torch.no_grad(), HeadGates(model, layout) as gates:
        for index, gate in enumerate(rows):
            gates.set(index, gate)
        together = outputs(model, inputs)
        for row in range(ROWS):
            for index, gate in enumerate(rows):
                gates.set(index, gate[row])
            # Experts take their tokens from all rows, so their products have other shapes and other roundings.
            assert torch.allclose(together[row], outputs(model, inputs)[row], atol=1e-5)


@every_architecture
def test_bfloat16_models_run_forward_and_backward(name: str) -> None:
    layout = subject(name)[1]
    model = build(name).to(torch.bfloat16)
    leaf = torch.ones(layout.attentions[-1].n_q, requires_grad=True)
    with HeadGates(model, layout) as gates:
        gates.set(len(layout.attentions) - 1, leaf)
        result = outputs(model, random_inputs(model, seed=1))
        result.float().square().sum().backward()
    assert result.dtype == torch.bfloat16
    assert leaf.grad is not None and leaf.grad.dtype == torch.float32 and torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_hooks_are_there_only_inside(name: str) -> None:
    model, layout, inputs, plain = subject(name)
    gates = HeadGates(model, layout)
    assert hooks(model) == 0
    with gates:
        assert hooks(model) == len(layout.attentions)
        gates.set(0, torch.zeros(layout.attentions[0].n_q))
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="broken"), gates:
        raise RuntimeError("broken")
    assert hooks(model) == 0
    assert torch.equal(outputs(model, inputs), plain)


def test_gates_are_not_entered_twice() -> None:
    model, layout, _, _ = subject("bert")
    with HeadGates(model, layout) as gates, pytest.raises(LoraforgeError, match="in use already"), gates:
        pass
    assert hooks(model) == 0


def test_a_gate_gradient_is_the_finite_difference() -> None:
    # Its norms stay in float64; those of Llama are rounded to float32.
    model = build("gpt2").double().requires_grad_(False)
    layout, inputs = layout_of_model(model), random_inputs(model, seed=2)

    def value(gate: Tensor) -> Tensor:
        with HeadGates(model, layout) as gates:
            gates.set(1, gate)
            return outputs(model, inputs).pow(3).sum(dim=(1, 2))

    at = torch.rand(ROWS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.autograd.gradcheck(value, (at,), eps=1e-6, atol=1e-4)


def test_what_fills_a_head_takes_its_place_by_share() -> None:
    model, layout, inputs, _ = subject("llama")
    width = layout.attentions[1].n_q * layout.attentions[1].o.size
    fill = torch.randn(width, generator=torch.Generator().manual_seed(4))
    gate = torch.tensor([[1.0, 0.25, 0.0, 1.0], [0.0, 1.0, 0.5, 1.0]])
    projection = modules_of(model)[layout.attentions[1].o.module]
    seen: list[Tensor] = []
    handle = projection.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    try:
        with torch.no_grad(), HeadGates(model, layout) as gates:
            gates.record(1)
            gates.set(1, gate, fill)
            outputs(model, inputs)
            before = gates.capture(1)
    finally:
        handle.remove()
    for row in range(ROWS):
        for head in range(4):
            part = slice(head * 4, head * 4 + 4)
            share = gate[row, head]
            # The product and sum of two float32 numbers, in another order of the same operations.
            expected = before[row, :, part] * share + fill[part] * (1 - share)
            assert torch.allclose(seen[0][row, :, part], expected, atol=1e-6)


def test_inputs_are_kept_only_on_demand() -> None:
    model, layout, inputs, _ = subject("bert")
    with torch.no_grad(), HeadGates(model, layout) as gates:
        outputs(model, inputs)
        with pytest.raises(LoraforgeError, match="no input of the projection was kept"):
            gates.capture(0)
        gates.record()
        gates.set(0, torch.zeros(4))
        outputs(model, inputs)
        assert gates.capture(0).shape == (ROWS, 8, 16)
        assert gates.capture(0).abs().min() > 0  # from before the gate
        gates.record(1)
        outputs(model, inputs)
        with pytest.raises(LoraforgeError, match="record"):
            gates.capture(0)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 2, 4), ()], ids=str)
def test_a_gate_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    model, layout, _, _ = subject("bert")
    with HeadGates(model, layout) as gates, pytest.raises(LoraforgeError, match="does not fit its attention"):
        gates.set(0, torch.ones(shape))


def test_a_gate_of_another_number_of_samples_is_refused() -> None:
    model, layout, inputs, plain = subject("bert")
    with HeadGates(model, layout) as gates:
        gates.set(0, torch.ones(ROWS + 1, 4))
        with pytest.raises(LoraforgeError, match="one row a sample"):
            outputs(model, inputs)
    assert hooks(model) == 0
    assert torch.equal(outputs(model, inputs), plain)


def test_a_model_of_another_width_is_refused_and_never_passed() -> None:
    layout = subject("bert")[1]
    model = build("bert", hidden_size=32)
    with HeadGates(model, layout), pytest.raises(LoraforgeError, match="not that of the layout"):
        outputs(model, random_inputs(model))


def test_a_model_without_the_projections_is_refused() -> None:
    with pytest.raises(LoraforgeError, match="not that of the model"):
        HeadGates(build("gpt2"), subject("bert")[1])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "deberta-v2", "gpt_neox"])
def test_an_unmerged_adapter_is_gated_as_the_merged_model(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    base = build(name)
    layout = layout_of_model(base)
    inputs = random_inputs(base, seed=1)
    # The names of all parts, the output projection among them: its adapter must see the gated input.
    parts = [p.module for a in layout.attentions for p in (a.q, a.k, a.v, a.o) if p is not None]
    config = LoraConfig(r=2, lora_alpha=8, target_modules=sorted(set(parts)), fan_in_fan_out=name == "gpt2")
    torch.manual_seed(5)
    wrapped = get_peft_model(base, config).eval()
    for key, parameter in wrapped.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.3)
    assert layout_of_model(wrapped) == layout
    index = len(layout.attentions) - 1
    with torch.no_grad():
        with HeadGates(wrapped, layout) as gates:
            gates.set(index, gates_of(layout, index, 1))
            unmerged = outputs(wrapped, inputs)
        assert not torch.allclose(unmerged, outputs(wrapped, inputs), atol=1e-4)
        merged = wrapped.merge_and_unload()
        with HeadGates(merged, layout) as gates:
            gates.set(index, gates_of(layout, index, 1))
            # W + BA is rounded once where W x + B A x is rounded twice.
            assert torch.allclose(outputs(merged, inputs), unmerged, atol=1e-5)
