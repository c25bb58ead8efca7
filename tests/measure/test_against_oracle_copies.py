"""Importance and gate gradients of many models against copies whose weights are changed by hand.

A gate multiplies what the output projection reads, so a gate of 1 + e is that projection with the head's columns times
1 + e, and a closed one has columns of 0: neither needs a hook. Everything runs in float64; rows run
unpadded in the comparison.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from loraforge.measure.importance.gradients import gate_gradients
from loraforge.measure.importance.measure import measure_importance
from loraforge.measure.subjects.objectives import make_objective
from loraforge.measure.subjects.subject import Subject, open_subject
from tests.measure.oracle_subjects import CLOSE, SLOPE, losses, open_tiny

# A made-up head is what is wanted here.
pytestmark = pytest.mark.filterwarnings("ignore:the head .* has random weights")

OUTPUTS = {
    "deberta-v2": "deberta.encoder.layer.{i}.attention.output.dense",
    "llama": "model.layers.{i}.self_attn.o_proj",
    "qwen3": "model.layers.{i}.self_attn.o_proj",
    "gpt2": "transformer.h.{i}.attn.c_proj",
}
PAIRS = [
    ("deberta-v2", "classification"), ("llama", "classification"),
    ("llama", "causal"), ("qwen3", "causal"), ("gpt2", "causal"), ("t5", "text-to-text"), ("bart", "text-to-text"),
]  # fmt: skip


# These have norms (T5: the softmax too) in float32 whatever the model's dtype: 1e-7 of noise over the step. The smooth
# ones take steps of 0.02 and a rule of fourth order, which leave 1e-5; T5's ReLU forbids wide steps.
ROUGH = {"llama": (0.02, 5e-5), "qwen3": (0.02, 5e-5), "t5": (1e-3, 4e-4)}


def outputs(model: torch.nn.Module, family: str) -> list[tuple[tuple[str, str, int], str]]:
    """(stack, kind, layer) and output projection of every attention, encoder first, self before cross."""
    if family == "t5":
        found = [(("enc", "self", i), f"encoder.block.{i}.layer.0.SelfAttention.o") for i in range(2)]
        for i in range(2):
            found.append((("dec", "self", i), f"decoder.block.{i}.layer.0.SelfAttention.o"))
            found.append((("dec", "cross", i), f"decoder.block.{i}.layer.1.EncDecAttention.o"))
        return found
    if family == "bart":
        found = [(("enc", "self", i), f"model.encoder.layers.{i}.self_attn.out_proj") for i in range(2)]
        for i in range(2):
            for kind, name in (("self", "self_attn"), ("cross", "encoder_attn")):
                found.append((("dec", kind, i), f"model.decoder.layers.{i}.{name}.out_proj"))
        return found
    stack = "enc" if family == "deberta-v2" else "dec"
    return [((stack, "self", i), OUTPUTS[family].format(i=i)) for i in range(2)]


@contextmanager
def scaled(model: torch.nn.Module, module: str, head: int, heads: int, factor: float) -> Iterator[torch.nn.Module]:
    """The copy with an output projection that reads a head `factor` times."""
    projection = model.get_submodule(module)
    weight = projection.weight
    changed = weight.detach().clone()
    view = changed if type(projection).__name__ == "Conv1D" else changed.T  # (in, out)
    size = view.shape[0] // heads
    view[head * size : (head + 1) * size] *= factor
    projection.weight = torch.nn.Parameter(changed, requires_grad=False)
    try:
        yield model
    finally:
        projection.weight = weight


def changed_losses(
    subject: Subject, model: torch.nn.Module, module: str, head: int, heads: int, factor: float
) -> np.ndarray:
    with scaled(model, module, head, heads, factor) as other:
        return losses(subject, other)


def slopes(
    subject: Subject, model: torch.nn.Module, module: str, head: int, heads: int, step: float = 1e-5
) -> np.ndarray:
    """Central differences of each row's loss by a head's gate; of fourth order for wide steps."""

    def rise(e: float) -> np.ndarray:
        up, down = (changed_losses(subject, model, module, head, heads, 1 + sign * e) for sign in (1, -1))
        return up - down

    return (8 * rise(step) - rise(2 * step)) / (12 * step) if step > 0.01 else rise(step) / (2 * step)


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "-".join(pair))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Subject]:
    family, kind = request.param
    return family, open_tiny(tmp_path_factory.mktemp(family), family, kind, batch_size=4)


def heads_of(family: str) -> int:
    return 4 if family in ("llama", "qwen3") else 2


def test_exact_importance(tiny: tuple[str, Subject]) -> None:
    family, subject = tiny
    lines = iter(measure_importance(subject))
    copied = copy.deepcopy(subject.model)
    base, H = losses(subject, copied), heads_of(family)
    largest = 0.0
    for place, module in outputs(subject.model, family):
        for head in range(H):
            line = next(lines)
            assert (line["stack"], line["kind"], line["layer"], line["head"]) == (*place, head)
            d = changed_losses(subject, copied, module, head, H, 0.0) - base
            np.testing.assert_allclose(line["I"], d.mean(), rtol=1e-8, atol=1e-11)
            np.testing.assert_allclose(line["se"], d.std(ddof=1) / len(d) ** 0.5, rtol=1e-7, atol=1e-11)
            np.testing.assert_allclose(line["loss_base"], base.mean(), **CLOSE)
            largest = max(largest, abs(line["I"]))
    assert next(lines, None) is None
    assert largest > 1e-3


def test_gate_gradients(tiny: tuple[str, Subject]) -> None:
    family, subject = tiny
    found = np.asarray(gate_gradients(subject, make_objective("task", subject)).s)
    copied, H, column = copy.deepcopy(subject.model), heads_of(family), 0
    for _, module in outputs(subject.model, family):
        for head in range(H):
            step, close = ROUGH.get(family, (1e-5, SLOPE["atol"]))
            slope = slopes(subject, copied, module, head, H, step)
            np.testing.assert_allclose(found[:, column], slope, rtol=0, atol=close)
            column += 1
    assert column == found.shape[1]


def test_loss_over_all_tokens_of_a_text(tmp_path: Path) -> None:
    subject = open_tiny(tmp_path, "gpt2", "causal", batch_size=4)
    copied = copy.deepcopy(subject.model)

    def text_losses(model: torch.nn.Module) -> np.ndarray:
        found = []
        for i in subject.indices:
            ids = subject.data.examples[i]["input_ids"][None]
            with torch.no_grad():
                logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            found.append(float(-logs.gather(1, ids[0, 1:, None]).mean()))
        return np.array(found)

    base = text_losses(copied)
    for line in measure_importance(subject, objective="lm"):
        with scaled(copied, OUTPUTS["gpt2"].format(i=line["layer"]), line["head"], 2, 0.0) as other:
            d = text_losses(other) - base
        np.testing.assert_allclose(line["loss_base"], base.mean(), **CLOSE)
        np.testing.assert_allclose(line["I"], d.mean(), rtol=1e-8, atol=1e-11)


def test_divergence_at_the_answer(tmp_path: Path) -> None:
    """KL of the ungated model's next-token distribution from the gated one's, a row the mean over its answer."""
    subject = open_tiny(tmp_path, "qwen3", "causal", batch_size=4)
    copied = copy.deepcopy(subject.model)

    def logs(model: torch.nn.Module) -> list[torch.Tensor]:
        found = []
        for i in subject.indices:
            example = subject.data.examples[i]
            with torch.no_grad():
                z = model(input_ids=example["input_ids"][None]).logits[0, :-1]
            found.append(z[example["labels"][1:] != -100].log_softmax(-1))
        return found

    before = logs(copied)
    for line in measure_importance(subject, objective="kl"):
        with scaled(copied, OUTPUTS["qwen3"].format(i=line["layer"]), line["head"], 4, 0.0) as other:
            after = logs(other)
        rows = [float((a.exp() * (a - b)).sum(-1).mean()) for a, b in zip(before, after, strict=True)]
        np.testing.assert_allclose(line["I"], np.mean(rows), rtol=1e-8, atol=1e-11)


def test_groups_of_heads_together(tmp_path: Path) -> None:
    subject = open_tiny(tmp_path, "llama", "causal", batch_size=4)
    lines = measure_importance(subject, unit="kv")
    copied = copy.deepcopy(subject.model)
    base = losses(subject, copied)
    assert [(line["layer"], line["head"]) for line in lines] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    for line in lines:
        module = OUTPUTS["llama"].format(i=line["layer"])
        d = changed_losses(subject, copied, module, line["head"] // 2, 2, 0.0) - base
        np.testing.assert_allclose(line["I"], d.mean(), rtol=1e-8, atol=1e-11)


def test_an_adapter_is_gated_as_if_it_were_merged(tmp_path: Path) -> None:
    plain = open_tiny(tmp_path, "bert", "classification", batch_size=4)
    rng = np.random.default_rng(5)
    modules = [f"bert.encoder.layer.{i}.attention.{end}" for i in range(2) for end in ("self.query", "output.dense")]
    merged, factors = copy.deepcopy(plain.model), {}
    for name in modules:
        A, B = (rng.standard_normal(size).astype(np.float32) * 0.3 for size in ((3, 16), (16, 3)))
        factors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
        product = 2.0 * B.astype(np.float64) @ A.astype(np.float64)  # alpha 6 / r 3
        merged.get_submodule(name).weight.data += torch.from_numpy(product)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none", "task_type": None}
    settings |= {"target_modules": modules, "base_model_name_or_path": str(tmp_path / "base")}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file(factors, adapter / "adapter_model.safetensors")
    subject = open_subject(
        tmp_path / "base", adapter=adapter, task=plain.data.spec, dtype="float64", device="cpu", batch_size=4
    )
    lines, base = measure_importance(subject), losses(plain, merged)
    found = np.asarray(gate_gradients(subject, make_objective("task", subject)).s)
    assert len(lines) == 4
    for column, line in enumerate(lines):
        module = f"bert.encoder.layer.{line['layer']}.attention.output.dense"
        d = changed_losses(plain, merged, module, line["head"], 2, 0.0) - base
        np.testing.assert_allclose(line["I"], d.mean(), rtol=1e-8, atol=1e-11)
        np.testing.assert_allclose(found[:, column], slopes(plain, merged, module, line["head"], 2), **SLOPE)
