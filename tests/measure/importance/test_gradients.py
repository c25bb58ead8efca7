from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from loraforge.errors import CheckFailed, LoraforgeError
from loraforge.measure.heads.gates import HeadGates
from loraforge.measure.heads.layout import HeadKey
from loraforge.measure.importance.estimates import fisher, taylor
from loraforge.measure.importance.gradients import gate_gradients
from loraforge.measure.subjects.objectives import make_objective
from loraforge.measure.subjects.subject import open_subject
from tests.measure.tiny_subjects import opened, spec_of, write_adapter
from tests.tasks.tiny import tiny_base

KINDS = {"bert": "classification", "llama": "causal", "t5": "text-to-text"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gradients")


@pytest.fixture(scope="module")
def subjects(folder):
    """A subject of a family and its objective `task`, opened once."""
    kept = {}

    def get(family):
        if family not in kept:
            subject = opened(folder, family, kind=KINDS[family], batch_size=3, subset=4)
            kept[family] = subject, make_objective("task", subject, warn=False)
        return kept[family]

    return get


class Wide(TorchFunctionMode):
    """Keeps float64 where models go over to float32 by themselves: norms and softmax of LLaMA and T5."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        narrows = function is torch.Tensor.float or (function is torch.Tensor.to and torch.float32 in args)
        if narrows and args[0].dtype == torch.float64:
            return args[0]
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)


def rows_losses(subject, objective, gates, values):
    """The loss of every row of the subset with the same gates for all of them; layout's heads flat."""
    found = {}
    for index, attention in enumerate(subject.layout.attentions):
        start = subject.layout.starts[index]
        gates.set(index, values[start : start + attention.n_q])
    with torch.no_grad():
        for batch in subject.batches():
            found |= dict(zip(batch.indices, objective.losses(subject.model, batch).tolist(), strict=True))
    return np.array([found[row] for row in subject.indices])


@pytest.mark.parametrize("family", KINDS)
def test_gradients_of_each_row_are_finite_differences(subjects, family):
    subject, objective = subjects(family)
    with Wide():
        found = gate_gradients(subject, objective)
    count = len(subject.layout.heads)
    assert found.s.shape == (4, count) and found.heads == subject.layout.heads and found.mode == "sample"
    step = 1e-5
    with Wide(), HeadGates(subject.model, subject.layout) as gates:
        for head in range(count):
            ends = []
            for sign in (1, -1):
                values = torch.ones(count, dtype=torch.float64)
                values[head] += sign * step
                ends.append(rows_losses(subject, objective, gates, values))
            # Central differences: h^2 times a third derivative, and 1e-16 / h of rounding.
            np.testing.assert_allclose(found.s[:, head], (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)
        plain = rows_losses(subject, objective, gates, torch.ones(count, dtype=torch.float64))
    np.testing.assert_allclose(found.losses, plain, rtol=1e-12)
    assert np.abs(found.s).max(0).min() > 0


def test_batches_are_means_of_rows(subjects):
    subject, objective = subjects("bert")
    rows = gate_gradients(subject, objective)
    batches = gate_gradients(subject, objective, per_sample=False, batch_size=2, order="given")
    assert batches.mode == "batch" and batches.n_samples == 4
    np.testing.assert_allclose(batches.s, rows.s.reshape(2, 2, -1).mean(1), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(batches.losses, rows.losses.reshape(2, 2).mean(1), rtol=1e-12)


def test_squares_of_batches_depend_on_their_size(subjects):
    """Over all batches of two rows, drawn with replacement: E[g^2] = (mean s)^2 + var(s) / 2."""
    subject, objective = subjects("bert")
    s = gate_gradients(subject, objective).s
    squares = []
    for pair in itertools.product(subject.indices, repeat=2):
        drawn = replace(subject, indices=pair, batch_size=2)
        squares.append(gate_gradients(drawn, objective, per_sample=False).s[0] ** 2)
    np.testing.assert_allclose(np.mean(squares, 0), s.mean(0) ** 2 + s.var(0) / 2, rtol=1e-9)


def test_one_batch_predicts_nothing(subjects):
    """|g| and its square are then of one number, whatever the data: the ratio is 1."""
    subject, objective = subjects("bert")
    whole = gate_gradients(subject, objective, per_sample=False, batch_size=4)
    assert len(whole.s) == 1
    np.testing.assert_allclose(fisher(whole, eps=0.0).p, 1.0, rtol=1e-12)
    assert fisher(gate_gradients(subject, objective), eps=0.0).p.max() < 1 - 1e-6


def test_rows_do_not_depend_on_the_rows_beside_them(folder):
    subject = opened(folder, "bert", like=3, subset=9)
    objective = make_objective("task", subject, warn=False)
    alone = gate_gradients(subject, objective, batch_size=1)
    for size in (2, 4, 9):
        np.testing.assert_allclose(gate_gradients(subject, objective, batch_size=size).s, alone.s, rtol=0, atol=1e-13)


def test_chosen_heads(subjects):
    subject, objective = subjects("t5")
    keys = [HeadKey("dec", "cross", 1, 0), HeadKey("enc", "self", 0, 1)]
    found = gate_gradients(subject, objective, keys=keys)
    assert found.heads == (keys[1], keys[0])
    columns = [subject.layout.heads.index(key) for key in found.heads]
    np.testing.assert_array_equal(found.s, gate_gradients(subject, objective).s[:, columns])
    for wrong in ([HeadKey("dec", "self", 9, 0)], []):
        with pytest.raises(LoraforgeError, match="no such heads"):
            gate_gradients(subject, objective, keys=wrong)


def test_an_unmerged_adapter_has_the_gradients_of_the_merged_model(folder, tmp_path):
    tiny_base(folder / "bert", "bert")
    merged = write_adapter(folder, folder / "bert", tmp_path / "lora")
    task = spec_of(folder)
    wrapped = open_subject(folder / "bert", adapter=tmp_path / "lora", task=task, dtype="float64")
    whole = open_subject(merged, task=task, tokenizer=wrapped.tokenizer)
    found = [gate_gradients(subject, make_objective("task", subject)) for subject in (wrapped, whole)]
    assert found[0].heads == found[1].heads
    np.testing.assert_allclose(found[0].s, found[1].s, rtol=1e-8, atol=1e-12)


def test_train_mode_is_drawn_by_its_seed(folder):
    tiny_base(folder / "dropping", "bert", dropout=0.3)
    subject = opened(folder, "dropping")
    objective = make_objective("task", subject, warn=False)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = gate_gradients(subject, objective, train_mode=True, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in subject.model.modules())
    np.testing.assert_array_equal(first.s, gate_gradients(subject, objective, train_mode=True, seed=1).s)
    assert not np.allclose(first.s, gate_gradients(subject, objective, train_mode=True, seed=2).s)
    assert not np.allclose(first.s, gate_gradients(subject, objective).s)


def test_bfloat16_with_float32_gates(folder):
    subject = opened(folder, "llama", kind="causal", dtype="bfloat16")
    narrow = gate_gradients(subject, make_objective("task", subject))
    other = opened(folder, "llama", kind="causal")
    wide = gate_gradients(other, make_objective("task", other))
    # bfloat16 keeps 8 bits, and sums over the vocabulary of what it rounded.
    assert np.abs(narrow.s - wide.s).max() < 0.1 * np.abs(wide.s).max()
    assert all(p.dtype == torch.bfloat16 for p in subject.model.parameters())


def test_no_gradient_reaches_a_parameter(subjects):
    subject, objective = subjects("bert")
    gate_gradients(subject, objective)
    assert all(p.grad is None and not p.requires_grad for p in subject.model.parameters())


def test_a_loss_that_is_not_finite_is_named(folder):
    subject = opened(folder, "bert", batch_size=3)
    objective = make_objective("task", subject, warn=False)
    subject.model.get_parameter("classifier.weight").data[0, 0] = float("nan")
    with pytest.raises(CheckFailed, match="the loss is not finite") as caught:
        gate_gradients(subject, objective)
    assert "batch 0" in str(caught.value)


def test_a_gradient_that_is_not_finite_is_named(subjects):
    subject, objective = subjects("bert")

    class Rooted:
        """The square root of 0 times the loss: 0, with a gradient of infinity times 0."""

        name, record = "task", {}
        reference = staticmethod(lambda model, batch: None)
        losses = staticmethod(lambda model, batch, reference=None: (0 * objective.losses(model, batch)).sqrt())

    with pytest.raises(CheckFailed, match="a gradient is not finite") as caught:
        gate_gradients(subject, Rooted())
    assert "batch 0, row " in str(caught.value) and "enc self layer 0 head 0" in str(caught.value)


def test_kl_has_no_gradient(subjects):
    subject, _ = subjects("bert")
    with pytest.raises(LoraforgeError, match="the gradient of kl is 0"):
        gate_gradients(subject, make_objective("kl", subject))


def test_taylor_of_a_small_change_is_its_effect(subjects):
    """A gate that goes from 1 to 1 - h raises the mean loss by h times the importance."""
    subject, objective = subjects("bert")
    gradients = gate_gradients(subject, objective)
    step = 1e-6
    with HeadGates(subject.model, subject.layout) as gates:
        for head in range(4):
            values = torch.ones(4, dtype=torch.float64)
            values[head] -= step
            risen = rows_losses(subject, objective, gates, values).mean() - gradients.losses.mean()
            assert risen / step == pytest.approx(taylor(gradients).value[head], rel=1e-3, abs=1e-7)
