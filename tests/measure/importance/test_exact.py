"""Exact ablation against columns of weights set to zero, in loops and losses written here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loraforge.errors import CheckFailed, UsageError
from loraforge.measure.importance.ablation import make_fills
from loraforge.measure.importance.choice import units_of
from loraforge.measure.importance.exact import exact_differences
from loraforge.measure.importance.measure import measure_importance
from loraforge.measure.importance.passes import Passes
from loraforge.measure.subjects.objectives import make_objective
from loraforge.measure.subjects.subject import Subject
from tests.measure.deep_subjects import deep

pytestmark = pytest.mark.filterwarnings("ignore:the head .* has random weights")
# Family -> output projections by (stack, kind), with the number of the layer to fill in; whether heads are rows.
OUTPUTS: dict[str, dict[tuple[str, str], str]] = {
    "bert": {("enc", "self"): "bert.encoder.layer.{}.attention.output.dense"},
    "gpt2": {("dec", "self"): "transformer.h.{}.attn.c_proj"},
    "llama": {("dec", "self"): "model.layers.{}.self_attn.o_proj"},
    "t5": {
        ("enc", "self"): "encoder.block.{}.layer.0.SelfAttention.o",
        ("dec", "self"): "decoder.block.{}.layer.0.SelfAttention.o",
        ("dec", "cross"): "decoder.block.{}.layer.1.EncDecAttention.o",
    },
}
HEADS = {"bert": 2, "gpt2": 2, "llama": 4, "t5": 2}
KV_HEADS = 2  # of the llama
Opener = Callable[[str, str], Subject]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Opener:
    """Opened once a family and dtype."""
    folder = tmp_path_factory.mktemp("exact")
    return cache(lambda family, dtype: deep(folder, family, dtype=dtype))


def losses(subject: Subject, family: str) -> Tensor:
    """(N,) losses in the order of the batches: of a class, or the mean over a row's label tokens."""
    found = []
    for batch in subject.batches():
        inputs = dict(batch.inputs)
        labels = inputs["labels"]
        if family == "t5":
            logits = subject.model(**inputs).logits
        else:
            logits = subject.model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        for row, wanted in zip(logits, labels, strict=True):
            if family == "bert":
                found.append(-row.log_softmax(-1)[wanted])
                continue
            scores, target = (row, wanted) if family == "t5" else (row[:-1], wanted[1:])
            found.append(-torch.stack([scores[t].log_softmax(-1)[k] for t, k in enumerate(target) if k != -100]).mean())
    return torch.stack(found)


@contextmanager
def without(model: nn.Module, name: str, heads: list[int], count: int) -> Iterator[None]:
    """The time in which the columns of some heads (rows in GPT-2) are zero."""
    weight = model.get_parameter(f"{name}.weight").data
    kept = weight.clone()
    side = 0 if "c_proj" in name else 1
    size = weight.shape[side] // count
    for head in heads:
        weight.narrow(side, head * size, size).zero_()
    yield
    weight.copy_(kept)


def brute(subject: Subject, family: str, group: int = 1) -> dict[tuple[str, str, int, int], Tensor]:
    """Differences by head (of a group the first), with columns of zeros."""
    with torch.no_grad():
        base = losses(subject, family).double()
        found = {}
        for (stack, kind), pattern in OUTPUTS[family].items():
            for layer in range(3):
                for head in range(0, HEADS[family], group):
                    name = pattern.format(layer)
                    with without(subject.model, name, list(range(head, head + group)), HEADS[family]):
                        found[stack, kind, layer, head] = losses(subject, family).double() - base
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", OUTPUTS)
def test_closed_gates_are_columns_of_zeros(subjects: Opener, family: str, dtype: str) -> None:
    subject = subjects(family, dtype)
    right = brute(subject, family)
    lines = measure_importance(subject)  # several heads a pass
    assert {(line["stack"], line["kind"], line["layer"], line["head"]) for line in lines} == set(right)
    # Losses near 3: eight units of the last place of float32; of float64 some thousand, through 3 layers.
    close = 1e-6 if dtype == "float32" else 1e-12
    base = losses(subject, family).double()
    for line in lines:
        differences = right[line["stack"], line["kind"], line["layer"], line["head"]]
        assert line["I"] == pytest.approx(float(differences.mean()), abs=close)
        assert line["loss_base"] == pytest.approx(float(base.mean()), abs=close)
        assert line["loss_ablate"] == pytest.approx(float((base + differences).mean()), abs=close)
    assert max(abs(line["I"]) for line in lines) > 1e-2


def test_heads_of_a_group_are_closed_together(subjects: Opener) -> None:
    subject = subjects("llama", "float64")
    right = brute(subject, "llama", HEADS["llama"] // KV_HEADS)
    lines = measure_importance(subject, unit="kv")
    assert [(line["layer"], line["head"]) for line in lines] == [(layer, head) for layer in range(3) for head in (0, 2)]
    for line in lines:
        assert line["unit"] == "kv"
        assert line["I"] == pytest.approx(float(right["dec", "self", line["layer"], line["head"]].mean()), abs=1e-12)


@pytest.mark.parametrize("tokens", [1, 40, 10**6])
def test_heads_that_share_passes(subjects: Opener, tokens: int) -> None:
    subject = subjects("bert", "float32")
    alone = measure_importance(subject, tokens_per_pass=1)
    together = measure_importance(subject, tokens_per_pass=tokens)
    for one, other in zip(alone, together, strict=True):
        assert other["I"] == pytest.approx(one["I"], abs=1e-6)  # products of other shapes round otherwise
    if tokens == 1:
        assert alone == together


@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("ablate", ["mean", "resample"])
def test_other_outputs_in_a_head_s_place(subjects: Opener, family: str, ablate: str) -> None:
    """Row by row without padding, with the head's outputs replaced by a hook."""
    subject = subjects(family, "float64")
    lines = measure_importance(subject, ablate=ablate, seed=3)
    rows = [subject.batch(subject.data, [row]) for row in subject.indices]
    order = sorted(subject.indices)
    random.Random(3).shuffle(order)
    donor = dict(zip(order, [*order[1:], order[0]], strict=True))
    objective = make_objective("task", subject, warn=False)
    for (stack, kind), pattern in OUTPUTS[family].items():
        for layer in (0, 2):
            module = subject.model.get_submodule(pattern.format(layer))
            seen: list[Tensor] = []
            handle = module.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0][0].clone()))
            with torch.no_grad():
                base = [float(objective.losses(subject.model, row)) for row in rows]
            handle.remove()
            for head in range(HEADS[family]):
                size = seen[0].shape[-1] // HEADS[family]
                part = slice(head * size, (head + 1) * size)
                mean = torch.cat(seen)[:, part].mean(0)
                rises = []
                for at, row in enumerate(rows):
                    given = seen[subject.indices.index(donor[row.indices[0]])][:, part]

                    def put(_module: nn.Module, args: Any, part=part, given=given, mean=mean) -> Any:
                        x = args[0].clone()
                        for t in range(x.shape[1]):
                            x[0, t, part] = mean if ablate == "mean" else given[t % len(given)]
                        return (x, *args[1:])

                    handle = module.register_forward_pre_hook(put)
                    with torch.no_grad():
                        rises.append(float(objective.losses(subject.model, row)) - base[at])
                    handle.remove()
                line = next(
                    line for line in lines
                    if (line["stack"], line["kind"], line["layer"], line["head"]) == (stack, kind, layer, head)
                )  # fmt: skip
                # Masked positions weigh exp(-1e308) or so: nothing. The rest is float64 through 3 layers.
                assert line["I"] == pytest.approx(sum(rises) / len(rises), abs=1e-10)
                assert line["ablate"] == ablate


def test_one_row_has_no_other_to_resample_from(subjects: Opener, tmp_path: Any) -> None:
    subject = deep(tmp_path, "bert", subset=1)
    with pytest.raises(UsageError, match="no other sample"):
        measure_importance(subject, ablate="resample")
    with pytest.raises(UsageError, match="unknown ablation"):
        make_fills("median", subject)


def test_a_loss_that_is_no_number_names_head_and_batch(subjects: Opener) -> None:
    subject = subjects("bert", "float64")
    module = subject.model.get_submodule(OUTPUTS["bert"]["enc", "self"].format(1))
    half = 8  # of 16

    def poison(_module: nn.Module, args: Any) -> Any:
        x = args[0]
        closed = (x[..., half:] == 0).flatten(1).all(1)
        return (x.masked_fill(closed[:, None, None], torch.nan),)

    def run() -> None:
        with Passes(subject, make_objective("task", subject)) as passes:
            module_handles.append(module.register_forward_pre_hook(poison))
            list(exact_differences(passes, units_of(subject.layout), make_fills("zero", subject)))

    module_handles: list[Any] = []
    try:
        with pytest.raises(CheckFailed, match="batch 0, enc self layer 1 head 1"):
            run()
    finally:
        for handle in module_handles:
            handle.remove()
    bias = subject.model.get_parameter("classifier.bias").data
    kept = bias.clone()
    bias.fill_(torch.nan)
    try:
        with pytest.raises(CheckFailed, match="batch 0") as caught:
            measure_importance(subject)
    finally:
        bias.copy_(kept)
    assert "head" not in str(caught.value.where)
    assert not any(module._forward_pre_hooks for module in subject.model.modules())


def test_kl_needs_no_labels_and_is_not_below_zero(subjects: Opener) -> None:
    """Of the output distribution with a head closed from that with all open."""
    subject = subjects("gpt2", "float64")
    lines = measure_importance(subject, objective="kl", cache_bytes=0)
    assert measure_importance(subject, objective="kl") == lines
    assert all(line["I"] > 0 and line["loss_base"] == 0.0 for line in lines)
    line = lines[3]
    with torch.no_grad():
        whole = [subject.model(**_unlabelled(batch)).logits.log_softmax(-1) for batch in subject.batches()]
        name = OUTPUTS["gpt2"]["dec", "self"].format(line["layer"])
        with without(subject.model, name, [line["head"]], HEADS["gpt2"]):
            cut = [subject.model(**_unlabelled(batch)).logits.log_softmax(-1) for batch in subject.batches()]
    values = []
    for batch, p, q in zip(subject.batches(), whole, cut, strict=True):
        divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)[:, :-1]
        labelled = batch.inputs["labels"][:, 1:] != -100
        values += [float(row[mask].mean()) for row, mask in zip(divergence, labelled, strict=True)]
    assert line["I"] == pytest.approx(sum(values) / len(values), rel=1e-9)


def _unlabelled(batch: Any) -> dict[str, Tensor]:
    return {name: value for name, value in batch.inputs.items() if name != "labels"}
