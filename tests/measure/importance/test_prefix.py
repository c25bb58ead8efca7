"""Passes that begin in the middle of a model give what whole passes give, to the bit, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraforge.measure.heads.find import modules_of
from loraforge.measure.importance.ablation import make_fills
from loraforge.measure.importance.choice import units_of
from loraforge.measure.importance.exact import exact_differences
from loraforge.measure.importance.passes import Passes
from loraforge.measure.importance.prefix import Prefix, PrefixCache
from loraforge.measure.subjects.objectives import make_objective
from loraforge.measure.subjects.subject import Subject, open_subject
from tests.measure.deep_subjects import deep, naive
from tests.measure.tiny_subjects import spec_of, write_adapter
from tests.tasks.tiny import tiny_base

# A made-up head is what is wanted here.
pytestmark = pytest.mark.filterwarnings("ignore:the head .* has random weights", "ignore:.*is_gradient_checkpointing.*")
FAMILIES = ("bert", "deberta-v2", "llama", "gpt2", "t5", "bart", "vit")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """Opened once a family."""
    folder = tmp_path_factory.mktemp("prefix")
    return cache(lambda family: deep(folder, family))


@pytest.fixture
def bert(subjects: Callable[[str], Subject]) -> Subject:
    return subjects("bert")


def found(subject: Subject, **options: Any) -> tuple[Tensor, Passes]:
    """(heads, N) in the layout's order."""
    with Passes(subject, make_objective("task", subject), **{"tokens_per_pass": 1, **options}) as passes:
        pairs = dict(exact_differences(passes, units_of(subject.layout), make_fills("zero", subject)))
    return torch.stack([pairs[unit] for unit in units_of(subject.layout)]), passes


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_whole_passes_to_the_bit(subjects: Callable[[str], Subject], family: str) -> None:
    subject = subjects(family)
    differences, passes = found(subject)
    assert passes.why_whole is None and passes.cache.rerun == 0
    assert torch.equal(differences, naive(subject, make_objective("task", subject)))
    assert differences.abs().mean(1).min() > 0.0  # every head does something, so equality says something


def test_equal_with_an_unmerged_adapter(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "bert", layers=3)
    write_adapter(tmp_path, base, tmp_path / "adapter")
    with open_subject(base, adapter=tmp_path / "adapter", task=spec_of(tmp_path), batch_size=4) as subject:
        differences, passes = found(subject)
        assert passes.why_whole is None
        assert torch.equal(differences, naive(subject, make_objective("task", subject)))


def test_layers_below_do_not_run(bert: Subject) -> None:
    """Of 3 layers x 2 heads x 3 batches: 6 (3 + 2 + 1) layer runs a batch, and some once a layer or batch."""
    ran: dict[str, int] = {}
    handles = [
        module.attention.register_forward_hook(lambda *_, name=name: ran.__setitem__(name, ran.get(name, 0) + 1))
        for name, module in modules_of(bert.model).items()
        if type(module).__name__ == "BertLayer"
    ]
    try:
        found(bert)
    finally:
        for handle in handles:
            handle.remove()
    batches, heads = 3, 2
    base, saved = batches, batches  # the plain pass, and the one that saves the layer's output
    assert list(ran.values()) == [
        batches * heads + base + saved,
        batches * 2 * heads + base + saved + 1,  # and one that checks the second layer's start
        batches * 3 * heads + base + 2,
    ]


@pytest.mark.parametrize(
    ("family", "limit"), [("bert", 0), ("bert", 1600), ("t5", 2000)], ids=["nothing", "a-batch", "a-batch-of-t5"]
)
def test_a_limit_of_memory_changes_no_number(subjects: Callable[[str], Subject], family: str, limit: int) -> None:
    differences, passes = found(subjects(family), cache_bytes=limit)
    assert torch.equal(differences, naive(subjects(family), make_objective("task", subjects(family))))
    assert passes.cache.most_bytes <= limit
    assert (passes.cache.rerun > 0) == (limit < 2**20)
    assert (passes.cache.most_bytes > 0) == (limit > 0)


def test_a_skip_around_layers_is_seen_and_passes_run_whole(bert: Subject) -> None:
    """What a layer far below gave is used again by a hook: passes that leave it out would be wrong."""
    layers = [module for module in bert.model.modules() if type(module).__name__ == "BertLayer"]
    kept: dict[str, Tensor] = {}

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        kept["first"] = output

    handles = [
        layers[0].register_forward_hook(keep),
        layers[2].register_forward_pre_hook(lambda _module, args: (args[0] + kept["first"], *args[1:])),
    ]
    try:
        with pytest.warns(UserWarning, match="every pass is run whole"):
            differences, passes = found(bert)
        assert passes.why_whole is not None
        assert torch.equal(differences, naive(bert, make_objective("task", bert)))
    finally:
        for handle in handles:
            handle.remove()


def test_what_layers_share_by_name_is_seen_and_passes_run_whole(bert: Subject) -> None:
    """A layer takes what one far below put aside, as shared keys and values: without it, it breaks."""
    layers = [module for module in bert.model.modules() if type(module).__name__ == "BertLayer"]
    shared: dict[str, Tensor] = {}
    handles = [
        bert.model.register_forward_pre_hook(lambda _module, _args: shared.clear()),
        layers[0].attention.register_forward_hook(lambda _module, _args, output: shared.update(first=output[0])),
        layers[2].register_forward_pre_hook(lambda _module, args: (args[0] + shared["first"], *args[1:])),
    ]
    try:
        with pytest.warns(UserWarning, match="every pass is run whole"):
            differences, _ = found(bert)
        assert torch.equal(differences, naive(bert, make_objective("task", bert)))
    finally:
        for handle in handles:
            handle.remove()


def prefix_of(subject: Subject) -> tuple[Prefix, dict[str, nn.Module], Any]:
    """The prefix of a subject, its layers, and a forward of its first batch."""
    names = list(dict.fromkeys(attention.block for attention in subject.layout.attentions))
    prefix, objective = Prefix(subject.model, names), make_objective("task", subject, warn=False)

    def forward() -> Tensor:
        with torch.no_grad():
            return objective.losses(subject.model, subject.batches()[0])

    with prefix.watched() as calls:
        forward()
    assert [call.layer for call in calls] == list(prefix.order) == names and prefix.is_regular
    modules = modules_of(subject.model)
    return prefix, {name: modules[name] for name in names}, forward


def test_forwards_are_restored_after_an_error(bert: Subject) -> None:
    prefix, layers, forward = prefix_of(bert)
    plain = forward()
    saved = prefix.advance(forward, 2, 3)
    with pytest.raises(ZeroDivisionError), prefix.replayed(saved):
        assert "forward" in vars(layers[prefix.order[0]])
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in layers.values())
    assert torch.equal(forward(), plain)

    def broken() -> None:
        forward()  # ends behind the second layer
        raise AssertionError("not reached")

    prefix.advance(broken, 2, 3)
    handle = layers[prefix.order[0]].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prefix.advance(forward, 2, 3)
    handle.remove()
    assert not any(layer._forward_hooks for layer in layers.values())
    assert torch.equal(forward(), plain)


def test_a_forward_of_others_comes_back(bert: Subject) -> None:
    prefix, layers, forward = prefix_of(bert)
    saved = prefix.advance(forward, 1, 3)
    layer = layers[prefix.order[0]]
    own = layer.forward
    layer.forward = own
    try:
        with prefix.replayed(saved):
            assert layer.forward is not own
        assert vars(layer)["forward"] is own
    finally:
        del layer.forward


def test_what_was_saved_is_not_written_into(subjects: Callable[[str], Subject]) -> None:
    """A layer that changes its input in place gets a copy each time."""
    subject = subjects("gpt2")
    prefix, layers, forward = prefix_of(subject)
    saved = prefix.advance(forward, 1, 3)

    def write(_module: nn.Module, args: Any) -> None:
        args[0].mul_(1.5)

    handle = layers[prefix.order[1]].register_forward_pre_hook(write)
    try:
        with prefix.replayed(saved):
            first = forward()
        with prefix.replayed(saved):
            assert torch.equal(forward(), first)
    finally:
        handle.remove()


def test_repeated_rows_are_the_batch_again_and_again(subjects: Callable[[str], Subject]) -> None:
    """With tuples of outputs and position biases as T5 passes them on."""
    subject = subjects("t5")
    prefix, _, forward = prefix_of(subject)
    below = len(prefix.order) - 1
    saved = prefix.advance(forward, below, 3)
    assert len(saved.outputs) == 2 and saved.nbytes > 0  # an encoder's and a decoder's
    objective, batch = make_objective("task", subject), subject.batches()[0]
    with torch.no_grad(), prefix.replayed(saved, 4):
        losses = objective.losses(subject.model, batch.repeat(4))
    # Products of other shapes round otherwise.
    torch.testing.assert_close(losses, forward().repeat(4), rtol=1e-5, atol=1e-5)


def test_a_layer_that_runs_twice_is_not_regular(bert: Subject) -> None:
    name = bert.layout.attentions[0].block
    prefix = Prefix(bert.model, [name])
    layer = modules_of(bert.model)[name]
    with torch.no_grad(), prefix.watched() as calls:
        layer(layer(torch.zeros(1, 2, 16)))
    assert not prefix.is_regular
    assert [(call.tokens, call.nbytes) for call in calls] == [(2, 128), (2, 128)]  # 2 x 16 numbers of 4 bytes


def test_the_cache_goes_on_from_where_it_is(bert: Subject) -> None:
    prefix, _, forward = prefix_of(bert)
    kept = PrefixCache(prefix, 2**20)
    two = kept.at(0, forward, 2, 3)
    assert kept.at(0, forward, 2, 3) is two
    fresh = prefix.advance(forward, 2, 3)
    assert all(torch.equal(two.outputs[name], fresh.outputs[name]) for name in fresh.outputs)
    assert kept.at(0, forward, 1, 3).below == 1  # back again: run from the embeddings
