from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError, UsageError
from loraforge.measure.heads.layout import HeadKey
from loraforge.measure.importance.estimates import michel, taylor
from loraforge.measure.importance.gradients import gate_gradients, measure_fisher
from loraforge.measure.subjects.objectives import make_objective
from tests.measure.tiny_subjects import opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fisher")


def test_lines_and_what_is_beside_them(folder, tmp_path):
    subject = opened(folder, "t5", kind="text-to-text", batch_size=5)
    path = tmp_path / "deep" / "gradfisher_pre.jsonl"
    lines = measure_fisher(subject, out=path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines
    assert list(lines[0])[:6] == ["layer", "head", "G", "F", "Ppred", "n_batches"]
    assert [HeadKey(x["stack"], x["kind"], x["layer"], x["head"]) for x in lines] == list(subject.layout.heads)
    assert {(line["mode"], line["n_samples"], line["n_batches"]) for line in lines} == {("sample", 12, 12)}
    gradients = gate_gradients(subject, make_objective("task", subject))
    np.testing.assert_allclose([line["S"] for line in lines], -taylor(gradients).value, rtol=1e-9)
    np.testing.assert_allclose([line["M"] for line in lines], michel(gradients).value, rtol=1e-9)
    about = json.loads((path.parent / "gradfisher_pre.meta.json").read_text())
    assert about["subject"]["theta0_sha256"] == subject.record["theta0_sha256"]
    assert about["rows"] == list(subject.indices) and about["mode"] == "sample" and not about["train_mode"]
    with pytest.raises(LoraforgeError, match="the output exists"):
        measure_fisher(subject, out=path)
    measure_fisher(subject, out=path, overwrite=True)


def test_the_documents_lines(folder):
    """Its definitions, taken here with hooks of our own on one gate a head and the models' own loss of a batch."""
    subject = opened(folder, "bert", subset=12)
    with pytest.warns(UserWarning, match="random weights"):
        lines = measure_fisher(subject, profile="document", batch_size=5)
    assert list(lines[0]) == ["layer", "head", "G", "F", "Ppred", "n_batches"] and lines[0]["n_batches"] == 3
    gates = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)

    def hook(layer):
        def gated(module, inputs):
            x = inputs[0]
            return ((x.view(*x.shape[:2], 2, -1) * gates[layer][:, None]).flatten(2),)

        return gated

    hooks = [
        layer.attention.output.dense.register_forward_pre_hook(hook(number))
        for number, layer in enumerate(subject.model.bert.encoder.layer)
    ]
    found = []
    for at in range(0, 12, 5):
        inputs = subject.batch(subject.data, subject.indices[at : at + 5]).inputs
        found.append(torch.autograd.grad(subject.model(**inputs).loss, gates)[0].numpy())
    for each in hooks:
        each.remove()
    g, f = np.abs(found).mean(0), np.square(found).mean(0)
    for line in lines:
        place = line["layer"], line["head"]
        # The models' loss is float64 like ours; the tiny base has no dropout, so train mode changes nothing.
        assert [line["G"], line["F"], line["Ppred"]] == pytest.approx(
            [g[place], f[place], g[place] ** 2 / (f[place] + 1e-6)], rel=1e-6
        )


def test_the_document_cannot_name_heads_of_two_stacks(folder):
    with pytest.raises(LoraforgeError, match="do not name"):
        measure_fisher(opened(folder, "t5", kind="text-to-text"), profile="document")


def test_unknown_words(folder):
    subject = opened(folder, "bert")
    with pytest.raises(UsageError, match="unknown mode 'batches'"):
        measure_fisher(subject, mode="batches")
    with pytest.raises(UsageError, match="unknown profile"):
        measure_fisher(subject, profile="paper")
