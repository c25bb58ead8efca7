from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.measure.subjects.objectives import make_objective
from loraforge.measure.subjects.probe import head_parameters
from loraforge.measure.subjects.subject import open_subject
from tests.measure.tiny_subjects import losses_of, opened, spec_of, write_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("probe")


def test_probe_learns_and_leaves_the_model_as_it_is(folder):
    subject = opened(folder, "bert")
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    task = torch.cat(losses_of(make_objective("task", subject, warn=False), subject)).mean()
    objective = make_objective("probe", subject, probe_steps=60, probe_lr=3e-2)
    assert objective.record["probe_loss_last"] < 0.5 * objective.record["probe_loss_first"]
    assert objective.record["probe_parameters"] == 2 * 16 + 2
    assert torch.cat(losses_of(objective, subject)).mean() < 0.7 * task
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())
    again = make_objective("probe", subject, probe_steps=60, probe_lr=3e-2)
    assert again.record == objective.record


def test_probe_without_steps_is_task(folder):
    subject = opened(folder, "bert")
    probe = losses_of(make_objective("probe", subject, probe_steps=0), subject)
    task = losses_of(make_objective("task", subject, warn=False), subject)
    assert all(torch.equal(a, b) for a, b in zip(probe, task, strict=True))


def test_probe_never_trains_on_measured_rows(folder):
    task = spec_of(folder)
    subject = open_subject(folder / "bert", task=task, split="train", subset=12)
    assert make_objective("probe", subject, probe_steps=1).record["probe_rows"] == 30 - 12
    whole = open_subject(folder / "bert", task=task, split="train")
    with pytest.raises(LoraforgeError, match="none is left"):
        make_objective("probe", whole)
    same = open_subject(folder / "bert", task=replace(task, test=task.train, rows=20))
    with pytest.raises(LoraforgeError, match="the same file"):
        make_objective("probe", same)


def test_probe_without_training_rows(folder):
    subject = open_subject(folder / "bert", task=replace(spec_of(folder), train=None))
    with pytest.raises(LoraforgeError, match="never on the measured ones, and the task has none"):
        make_objective("probe", subject)


def test_probe_of_an_adapter_trains_its_own_head(folder, tmp_path):
    """PEFT keeps two heads; the one that answers is trained, and neither changes."""
    opened(folder, "bert")
    write_adapter(folder, folder / "bert", tmp_path / "lora")
    with open_subject(folder / "bert", adapter=tmp_path / "lora", task=spec_of(folder)) as subject:
        before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
        names = head_parameters(subject.model)
        objective = make_objective("probe", subject, probe_steps=20, probe_lr=3e-2)
        task = make_objective("task", subject)
        assert torch.cat(losses_of(objective, subject)).mean() < torch.cat(losses_of(task, subject)).mean()
        assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())
    assert [name.partition("classifier.")[2] for name in names] == [
        "modules_to_save.default.weight", "modules_to_save.default.bias",
    ]  # fmt: skip
