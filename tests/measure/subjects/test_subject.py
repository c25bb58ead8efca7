from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loraforge.errors import LoraforgeError, UsageError
from loraforge.measure.subjects.objectives import make_objective
from loraforge.measure.subjects.subject import open_subject, state_sha256
from loraforge.measure.subjects.subset import choose_subset, write_subset
from loraforge.tasks import load_model, parse_task, write_task_card
from loraforge.training.job import Request, prepare
from loraforge.training.options import LoraOptions
from tests.measure.tiny_subjects import LABELS, opened, spec_of, write_adapter
from tests.tasks.tiny import tiny_base, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("subjects")
    tiny_base(place / "bert", "bert")
    return place


def training_start(base, task, seed, lora=None):
    """The model as training starts from it."""
    request = Request(
        base, task, Path("unused"), lora, {}, seed, False, False, None, None, False, "cpu", "float32", False, None, None
    )
    return prepare(request).model


@pytest.mark.parametrize("seed", [0, 7])
def test_theta0_is_where_training_with_this_seed_starts(folder, seed):
    task = spec_of(folder)
    start = training_start(folder / "bert", task, seed)
    subject = open_subject(folder / "bert", task=task, seed=seed)
    assert subject.record["theta0_sha256"] == state_sha256(start)
    assert subject.record["head"] == "fresh" and subject.fresh == ("classifier",)
    other = open_subject(folder / "bert", task=task, seed=seed + 1)
    assert other.record["theta0_sha256"] != subject.record["theta0_sha256"]


def test_lora_starts_from_the_same_head(folder):
    task = spec_of(folder)
    start = training_start(folder / "bert", task, 3, LoraOptions.read({"r": 2, "targets": ["query", "value"]}))
    subject = open_subject(folder / "bert", task=task, seed=3)
    head = dict(start.named_parameters())["base_model.model.classifier.modules_to_save.default.weight"]
    assert torch.equal(head, subject.model.get_parameter("classifier.weight"))


def test_a_saved_start_is_the_same_theta0(folder, tmp_path):
    task = spec_of(folder)
    subject = open_subject(folder / "bert", task=task, seed=3)
    subject.model.save_pretrained(tmp_path / "init")
    subject.tokenizer.save_pretrained(tmp_path / "init")
    saved = open_subject(tmp_path / "init", task=task, seed=11)
    assert saved.record["theta0_sha256"] == subject.record["theta0_sha256"]
    assert saved.record["head"] == "trained"


def test_frozen_and_in_evaluation_mode(folder):
    subject = opened(folder, "bert")
    assert not any(p.requires_grad for p in subject.model.parameters())
    assert not any(module.training for module in subject.model.modules())
    assert {p.dtype for p in subject.model.parameters()} == {torch.float64}


def test_batches_hold_every_row_once_longest_first(folder):
    subject = opened(folder, "bert", subset=10, batch_size=4)
    batches = subject.batches()
    assert sorted(row for batch in batches for row in batch.indices) == sorted(choose_subset(12, 10))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    lengths = [batch.inputs["attention_mask"].sum(1).tolist() for batch in batches]
    assert sum(lengths, []) == sorted(sum(lengths, []), reverse=True)
    for batch, again in zip(batches, subject.batches(), strict=True):
        assert batch.indices == again.indices
        for number, row in enumerate(batch.indices):
            example = subject.data.examples[row]
            kept = batch.inputs["attention_mask"][number].bool()
            assert torch.equal(batch.inputs["input_ids"][number][kept], example["input_ids"])
            assert batch.inputs["labels"][number] == example["labels"]


def test_order_given(folder):
    subject = opened(folder, "bert", subset=10, batch_size=4, order="given")
    rows = tuple(row for batch in subject.batches() for row in batch.indices)
    assert rows == tuple(choose_subset(12, 10)) == subject.indices
    assert [len(batch) for batch in subject.batches(7)] == [7, 3]


def test_repeat(folder):
    batch = opened(folder, "bert").batches()[0]
    twice = batch.repeat(2)
    assert twice.indices == batch.indices * 2
    for name, tensor in batch.inputs.items():
        assert torch.equal(twice.inputs[name], torch.cat([tensor, tensor]))


def test_a_subset_larger_than_the_data_is_all_of_it_and_says_so(folder):
    subject = opened(folder, "bert", subset=1024)
    assert len(subject.indices) == 12
    assert subject.record["subset"] == {"size": 12, "asked": 1024, "seed": 999} and subject.record["n"] == 12


def test_subset_from_a_file_and_by_numbers(folder, tmp_path):
    subject = opened(folder, "bert", subset=[5, 2])
    assert subject.indices == (5, 2)
    path = write_subset(tmp_path, [5, 2], {"size": 12, "data_sha256": subject.record["data_sha256"]})
    assert opened(folder, "bert", subset=path).indices == (5, 2)
    write_subset(tmp_path, [5, 2], {"size": 12, "data_sha256": "0" * 64})
    with pytest.raises(LoraforgeError, match="other data"):
        opened(folder, "bert", subset=path)


@pytest.mark.parametrize("subset", [[12], [-1], [], 0, [3, 4, 3]], ids=str)
def test_rows_that_are_not_there(folder, subset):
    with pytest.raises(LoraforgeError, match="subset"):
        opened(folder, "bert", subset=subset)


@pytest.mark.filterwarnings("ignore:.* are cut on the right to 3 tokens")
def test_the_record_tells_other_inputs_of_the_same_rows(folder):
    """Heads measured at one length must not be taken up by a measurement at another."""
    specs = [spec_of(folder), spec_of(folder), spec_of(folder, max_length=3)]
    whole, again, cut = (open_subject(folder / "bert", task=spec).record for spec in specs)
    assert whole == again and whole["data_sha256"] == cut["data_sha256"]
    assert whole["inputs_sha256"] != cut["inputs_sha256"]


@pytest.mark.parametrize("asked", [{"order": "random"}, {"batch_size": 0}], ids=["order", "size"])
def test_batches_that_cannot_be_made(folder, asked):
    with pytest.raises(UsageError, match="batches"):
        opened(folder, "bert", **asked)


def test_an_unmerged_adapter_is_the_merged_model(folder, tmp_path):
    merged = write_adapter(folder, folder / "bert", tmp_path / "lora")
    task = spec_of(folder)
    with open_subject(folder / "bert", adapter=tmp_path / "lora", task=task, dtype="float64") as subject:
        assert subject.record["head"] == "trained" and not subject.fresh
        found = losses_of(subject)
    whole = open_subject(merged, task=task, tokenizer=subject.tokenizer)
    # Two float64 products are added in another order.
    assert torch.allclose(found, losses_of(whole), rtol=0, atol=1e-10)
    plain = open_subject(folder / "bert", task=task, dtype="float64")
    assert (found - losses_of(plain)).abs().max() > 1e-2


def losses_of(subject):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        objective = make_objective("task", subject)
    with torch.no_grad():
        return torch.cat([objective.losses(subject.model, batch) for batch in subject.batches()])


def test_close_takes_the_adapter_out_of_a_model_in_memory(folder, tmp_path):
    write_adapter(folder, folder / "bert", tmp_path / "lora")
    model, _, _ = load_model(folder / "bert", "classification", head_labels=LABELS)
    before = {name: id(module) for name, module in model.named_modules()}
    subject = open_subject(model, adapter=tmp_path / "lora", task=spec_of(folder))
    assert any("lora_A" in name for name, _ in subject.model.named_modules())
    subject.close()
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_the_head_is_read_as_the_adapters_card_names_it(folder, tmp_path):
    """A card with the classes the other way round turns the labels round."""
    write_adapter(folder, folder / "bert", tmp_path / "lora")
    task = replace(spec_of(folder), labels=None)
    forth = open_subject(folder / "bert", adapter=tmp_path / "lora", task=task)
    write_task_card(tmp_path / "lora", task, "classification", LABELS[::-1], folder / "bert")
    back = open_subject(folder / "bert", adapter=tmp_path / "lora", task=task)
    assert [b.inputs["labels"].tolist() for b in forth.batches()] == [
        (1 - b.inputs["labels"]).tolist() for b in back.batches()
    ]
    assert back.record["labels"] == ["yes", "no"]


def test_a_model_without_classes_takes_the_tasks(folder):
    task = spec_of(folder)
    assert open_subject(folder / "bert", task=task).record["labels"] == list(LABELS)
    assert open_subject(folder / "bert", task=replace(task, labels=None)).record["labels"] == list(LABELS)
    named = open_subject(folder / "bert", task=replace(task, labels=None, train=None), labels=["yes", "no"])
    assert named.record["labels"] == ["yes", "no"]


def test_the_head_of_a_trained_model_and_of_another_task(folder, tmp_path):
    """A model whose configuration names its classes keeps its head for a task of these, and gets a new one else."""
    model, _, _ = load_model(folder / "bert", "classification", head_labels=["yes", "no"], seed=5)
    model.save_pretrained(tmp_path / "trained")
    tokenizer = opened(folder, "bert").tokenizer
    same = open_subject(tmp_path / "trained", task=spec_of(folder), tokenizer=tokenizer)
    assert same.record["labels"] == ["yes", "no"] and same.record["head"] == "trained"
    other = replace(spec_of(folder), labels={"no": "bad", "yes": "good"})
    fresh = open_subject(tmp_path / "trained", task=other, tokenizer=tokenizer)
    assert fresh.record["labels"] == ["bad", "good"] and fresh.record["head"] == "fresh"


def test_images(folder, tmp_path):
    from PIL import Image

    for label in LABELS:
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(2):
            image = Image.new("RGB", (8, 8), (90 * number, 40, 200 if label == "yes" else 0))
            image.save(tmp_path / "images" / label / f"{number}.png")
    base = tiny_base(tmp_path / "vit", "vit")
    task = parse_task({"id": "p", "test": str(tmp_path / "images"), "kind": "images", "labels": list(LABELS)}, "test")
    subject = open_subject(base, task=task, batch_size=3)
    assert [tuple(batch.inputs["pixel_values"].shape) for batch in subject.batches()] == [(3, 3, 8, 8), (1, 3, 8, 8)]
    assert len(subject.layout.heads) == 4 and bool(losses_of(subject).gt(0).all())


def test_captions_have_the_heads_of_both_parts(tmp_path):
    from PIL import Image

    rows = [{"image": f"{number}.png", "target": f"red {word}"} for number, word in enumerate(["cat", "dog up", "sun"])]
    for row in rows:
        Image.new("RGB", (8, 8), (80, 40, 0)).save(tmp_path / row["image"])
    base = tiny_base(tmp_path / "blip", "blip")
    task = parse_task({"id": "c", "test": str(write_rows(tmp_path / "rows.jsonl", rows))}, "test")
    subject = open_subject(base, task=task, batch_size=2)
    places = [(a.stack, a.kind, a.layer) for a in subject.layout.attentions]
    vision = [("enc", "self", 0), ("enc", "self", 1)]
    assert places == [*vision, *(("dec", kind, layer) for layer in range(2) for kind in ("self", "cross"))]
    assert bool(losses_of(subject).gt(0).all())
