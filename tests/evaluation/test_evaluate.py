"""The table of adapters x tasks against PEFT by hand: own heads, heads kept apart, full models, averages, bad input."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import loraforge as lf
from loraforge.errors import InputProblems, LoraforgeError, UsageError
from loraforge.evaluation import evaluate
from loraforge.evaluation.score import score_task
from loraforge.evaluation.subjects import adapted, open_subjects
from loraforge.tasks import TaskSpec, load_model, load_task
from tests.evaluation.material import adapter_of, rows_of, task_of
from tests.tasks.tiny import tiny_base, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, two tasks of 2 and 3 classes, an adapter each, and their merge with the heads kept apart."""
    folder = tmp_path_factory.mktemp("evaluate")
    base = tiny_base(folder / "base-model", "bert")
    two, three = task_of(folder, "two", ("neg", "pos"), seed=1), task_of(folder, "three", ("x", "y", "z"), seed=2)
    adapters = [
        adapter_of(folder / "loras" / "two", base, two, seed=1),
        adapter_of(folder / "loras" / "three", base, three, seed=2),
    ]
    lf.merge(adapters, method="weighted-average").save(folder / "merged")
    return {"folder": folder, "base": base, "two": two, "three": three, "adapters": adapters,
            "merged": folder / "merged"}  # fmt: skip


@pytest.fixture(scope="module")
def found(place):
    """One evaluation of everything."""
    return evaluate(
        place["base"], [*place["adapters"], place["merged"]], [place["two"], place["three"]], outcomes=True
    )  # fmt: skip


def row(found, name):
    return next(row for row in found["rows"] if row["name"] == name)


def by_hand(place, adapter, spec, head=None):
    """Labels that PEFT's own model predicts, one row at a time; `head` is put over its own."""
    model, _, _ = load_model(place["base"], "classification", head_labels=spec.labels)
    wrapped = PeftModel.from_pretrained(model, adapter).eval()
    if head is not None:
        inner = wrapped.get_base_model()
        with torch.no_grad():
            inner.classifier.weight.copy_(head["classifier.weight"])
            inner.classifier.bias.copy_(head["classifier.bias"])
    data = load_task(spec, "test", base=place["base"])
    answers = []
    for example in data.examples:
        inputs = {key: value[None] for key, value in example.items() if key not in ("labels", "task")}
        with torch.no_grad():
            answers.append(spec.labels[int(wrapped(**inputs).logits.argmax())])
    return answers


@pytest.mark.parametrize("name", ["two", "three"])
def test_an_adapter_answers_with_its_own_head_as_in_peft(place, found, name):
    adapter = place["folder"] / "loras" / name
    cell = row(found, name)["cells"][name]
    assert cell["predictions"] == by_hand(place, adapter, place[name])
    assert cell["head"] == "own"


@pytest.mark.parametrize("name", ["two", "three"])
def test_a_merged_adapter_answers_each_task_with_the_head_kept_for_it(place, found, name):
    head = load_file(place["merged"] / "heads" / name / "heads.safetensors")
    cell = row(found, "merged")["cells"][name]
    assert cell["predictions"] == by_hand(place, place["merged"], place[name], head)
    assert cell["head"] == f"the head kept for {name}"


def test_the_base_answers_with_the_head_of_the_tasks_own_adapter(place, found):
    model, _, _ = load_model(place["base"], "classification", head_labels=place["three"].labels)
    tensors = load_file(place["adapters"][1] / "adapter_model.safetensors")
    with torch.no_grad():
        model.classifier.weight.copy_(tensors["base_model.model.classifier.weight"])
        model.classifier.bias.copy_(tensors["base_model.model.classifier.bias"])
    expected = score_task(model, load_task(place["three"], "test", base=place["base"]))
    cell = row(found, "base")["cells"]["three"]
    assert cell["predictions"] == expected.predictions
    assert cell["head"] == "the head of three"


def test_an_adapter_has_no_score_on_a_task_that_its_head_is_not_of(found):
    cell = row(found, "two")["cells"]["three"]
    assert cell["value"] is None and "its own head is of task 'two'" in cell["reason"]
    assert row(found, "two")["average"] is None and row(found, "two")["average_reason"] == "no score on three"


def test_averages_and_shares_are_those_of_the_cells(found):
    merged, own = row(found, "merged"), row(found, "own adapters")
    scores = [merged["cells"][task]["value"] for task in ("two", "three")]
    owns = [row(found, task)["cells"][task]["value"] for task in ("two", "three")]
    assert merged["average"] == pytest.approx(np.mean(scores))
    assert merged["normalised"] == pytest.approx(np.mean([a / b for a, b in zip(scores, owns, strict=True)]))
    assert [own["cells"][task]["value"] for task in ("two", "three")] == owns
    assert own["normalised"] == 1.0
    low, high = merged["average_interval"]
    assert low < merged["average"] < high


def test_a_score_is_the_mean_of_its_rows_and_differences_pair_them(found):
    base, merged = (row(found, name)["cells"]["three"] for name in ("base", "merged"))
    for cell in (base, merged):
        assert cell["value"] == pytest.approx(np.mean(cell["outcomes"]))
    told = next(d for d in found["differences"] if (d["row"], d["task"]) == ("merged", "three"))
    assert told["against"] == "base"
    assert told["difference"] == pytest.approx(merged["value"] - base["value"])
    apart = np.array(merged["outcomes"]) - np.array(base["outcomes"])
    half = (told["interval"][1] - told["interval"][0]) / 2
    assert half == pytest.approx(1.96 * apart.std() / np.sqrt(len(apart)), rel=0.2)


def test_the_base_is_untouched_by_what_it_carried(place):
    model, _, _ = load_model(place["base"], "classification", head_labels=place["two"].labels)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    for subject in open_subjects([*place["adapters"], place["merged"]], []):
        with adapted(model, subject) as wrapped:
            assert any("lora_A" in key for key in wrapped.state_dict())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(module is modules[name] for name, module in model.named_modules())


def test_batches_of_other_sizes_give_the_same_predictions(place, found):
    again = evaluate(
        place["base"], [place["merged"]], [place["two"], place["three"]], batch_tokens=8, outcomes=True,
        heads={task: str(place["merged"] / "heads" / task) for task in ("two", "three")},
    )  # fmt: skip
    for task in ("two", "three"):
        expected = row(found, "merged")["cells"][task]["predictions"]
        assert row(again, "merged")["cells"][task]["predictions"] == expected


def test_heads_names_a_head_for_an_adapter_of_another_task(place):
    found = evaluate(place["base"], place["adapters"][:1], [place["three"]], outcomes=True,
                     heads={"three": str(place["adapters"][1])})  # fmt: skip
    head = load_file(place["merged"] / "heads" / "three" / "heads.safetensors")
    expected = by_hand_with_other_size(place, head)
    assert row(found, "two")["cells"]["three"]["predictions"] == expected


def by_hand_with_other_size(place, head):
    """The first adapter's body under a head of three rows, by PEFT."""
    model, _, _ = load_model(place["base"], "classification", head_labels=place["two"].labels)
    wrapped = PeftModel.from_pretrained(model, place["adapters"][0]).eval()
    data = load_task(place["three"], "test", base=place["base"])
    answers = []
    for example in data.examples:
        inputs = {key: value[None] for key, value in example.items() if key not in ("labels", "task")}
        with torch.no_grad():
            pooled = wrapped.get_base_model().bert(**inputs).pooler_output
        logits = pooled @ head["classifier.weight"].T + head["classifier.bias"]
        answers.append(place["three"].labels[int(logits.argmax())])
    return answers


def test_the_card_says_what_the_task_does_not(place):
    """A file of rows is enough: labels, fields and kind come from the adapter's task.json."""
    bare = TaskSpec(id="three", test=place["three"].test)
    found = evaluate(place["base"], place["adapters"][1:], [bare], outcomes=True)
    expected = by_hand(place, place["adapters"][1], place["three"])
    assert row(found, "three")["cells"]["three"]["predictions"] == expected


def test_labels_in_another_order_are_matched_by_name(place):
    turned = replace(place["three"], labels=("z", "x", "y"))
    found = evaluate(place["base"], place["adapters"][1:], [turned], outcomes=True)
    expected = by_hand(place, place["adapters"][1], place["three"])
    assert row(found, "three")["cells"]["three"]["predictions"] == expected


def test_an_adapter_without_a_card_is_matched_by_name_or_by_size(place, tmp_path):
    adapter = shutil.copytree(place["adapters"][1], tmp_path / "checkpoint-500")
    (adapter / "task.json").unlink()
    alone = evaluate(place["base"], [adapter], [place["three"], place["two"]], outcomes=True)
    cells = row(alone, "checkpoint-500")["cells"]
    assert cells["three"]["predictions"] == by_hand(place, adapter, place["three"])
    assert cells["two"]["value"] is None
    owned = evaluate(place["base"], [adapter], [place["three"]], own={"three": "checkpoint-500"})
    assert row(owned, "checkpoint-500")["normalised"] == 1.0


def test_generation_choice_and_perplexity_share_a_table(tmp_path):
    base = tiny_base(tmp_path / "qwen", "qwen3")
    answers = TaskSpec(id="answers", kind="causal", metric=("exact_match", "rougeL"),
                       test=[{"text": "red blue", "target": "sun"}, {"text": "one", "target": "two"}])  # fmt: skip
    choices = TaskSpec(id="choices", kind="choice", choices=["a", "b"],
                       test=[{"text": "up", "a": "sun", "b": "moon", "answer": i % 2} for i in range(4)])  # fmt: skip
    plain = TaskSpec(id="plain", loss_on="all", test=[{"text": "red blue sun moon"}, {"text": "cat dog"}])
    adapter = adapter_of(tmp_path / "lora", base, answers, kind="causal", targets=("q_proj", "v_proj"), save=())
    found = evaluate(base, [adapter], [answers, choices, plain], outcomes=True)
    cells = row(found, "lora")["cells"]
    assert list(cells["answers"]["metrics"]) == ["exact_match", "rougeL"]
    assert len(set(cells["choices"]["predictions"])) == 1 and cells["choices"]["value"] == 0.5
    assert cells["plain"]["value"] > 1 and cells["plain"]["value"] != row(found, "base")["cells"]["plain"]["value"]
    assert row(found, "lora")["average"] is None
    assert row(found, "lora")["average_reason"] == "perplexities and shares have no common mean"


def test_full_models_bring_their_own_heads_and_lend_them_to_the_base(place, tmp_path):
    model, _, _ = load_model(place["base"], "classification", head_labels=place["two"].labels, seed=9)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(3)
    model.save_pretrained(tmp_path / "two")
    found = evaluate(place["base"], [], [place["two"]], models=[tmp_path / "two"], outcomes=True)
    expected = score_task(model, load_task(place["two"], "test", base=place["base"]))
    assert row(found, "two")["cells"]["two"]["predictions"] == expected.predictions
    assert row(found, "base")["cells"]["two"]["head"] == "the head of two"


def test_undefined_values_are_none_with_the_reason_and_valid_json(place):
    found = evaluate(place["base"], place["adapters"][:1], [place["two"]], metrics=["spearman", "accuracy"])
    constant = [
        cell for r in found["rows"] for cell in r["cells"].values() if cell["value"] is None and "metrics" in cell
    ]
    for cell in constant:
        assert "constant" in cell["reason"]
    json.dumps(found, allow_nan=False)


def test_the_same_call_gives_the_same_numbers(place):
    one, two = (evaluate(place["base"], place["adapters"][:1], [place["two"]], seed=3) for _ in range(2))
    for found in (one, two):
        found.pop("seconds")
        for line in found["rows"]:
            for cell in line["cells"].values():
                cell.pop("seconds", None)
    assert one == two


def test_limit_takes_the_same_rows_for_every_row(place):
    found = evaluate(place["base"], place["adapters"][:1], [place["two"]], limit=7)
    assert found["tasks"][0]["n"] == 7 and found["tasks"][0]["available"] == 24
    assert {row(found, name)["cells"]["two"]["n"] for name in ("base", "two")} == {7}


def test_the_number_that_training_reports_comes_again_from_the_saved_adapter(place, tmp_path):
    from loraforge.training.single import train_lora

    spec = replace(place["three"], train=place["three"].test)
    train_lora(place["base"], spec, tmp_path / "three", lora={"r": 2}, train={"max_steps": 2, "learning_rate": 0.02},
               device="cpu")  # fmt: skip
    kept = json.loads((tmp_path / "three" / "run.json").read_text())["metrics"]["test"]
    found = evaluate(place["base"], [tmp_path / "three"], [spec], device="cpu")
    assert row(found, "three")["cells"]["three"]["value"] == kept["metrics"]["accuracy"]


# Bad input.


def test_an_adapter_that_no_task_has_a_head_for_is_refused(place):
    with pytest.raises(LoraforgeError, match="'two' can be scored on no task") as caught:
        evaluate(place["base"], place["adapters"][:1], [place["three"]])
    assert "its own head is of task 'two'" in str(caught.value) and "--heads three=ADAPTER" in str(caught.value)


def test_a_head_with_other_classes_than_the_task_is_refused(place):
    wrong = replace(place["three"], labels=("x", "y", "w"))
    with pytest.raises(LoraforgeError, match="no row for classes of the task") as caught:
        evaluate(place["base"], place["adapters"][1:], [wrong])
    assert "w" in str(caught.value) and "x, y, z" in str(caught.value)


def test_a_head_with_another_number_of_classes_is_refused(place, tmp_path):
    adapter = shutil.copytree(place["adapters"][0], tmp_path / "three")
    (adapter / "task.json").unlink()
    with pytest.raises(LoraforgeError, match="not one for the classes of task 'three'") as caught:
        evaluate(place["base"], [adapter], [place["three"]])
    assert "3 rows: x, y, z" in str(caught.value)


def test_metric_of_another_kind_missing_split_and_unknown_names_are_refused(place):
    with pytest.raises(UsageError, match="no metric 'rougeL'"):
        evaluate(place["base"], [], [place["two"]], metrics="rougeL")
    with pytest.raises(LoraforgeError, match="the task has no eval split") as caught:
        evaluate(place["base"], [], [place["two"]], split="eval")
    assert "found: test" in str(caught.value)
    with pytest.raises(InputProblems) as many:
        evaluate(place["base"], place["adapters"], [place["two"]], heads={"tow": "two"}, own={"two": "twoo"})
    assert "did you mean 'two'" in str(many.value)
    with pytest.raises(LoraforgeError, match="--against names no row"):
        evaluate(place["base"], place["adapters"], [place["two"], place["three"]], against="none")
    with pytest.raises(UsageError, match="unknown choice mode"):
        evaluate(place["base"], [], [place["two"]], choice_mode="mean")


def test_all_missing_adapters_are_named_at_once(place, tmp_path):
    with pytest.raises(InputProblems) as caught:
        evaluate(place["base"], [tmp_path / "a", tmp_path / "b"], [place["two"]])
    assert str(tmp_path / "a") in str(caught.value) and str(tmp_path / "b") in str(caught.value)


def test_an_adapter_of_another_base_is_refused(place, tmp_path):
    other = tiny_base(tmp_path / "wide", "bert", hidden=24)
    adapter = adapter_of(tmp_path / "two", other, place["two"])
    with pytest.raises(LoraforgeError, match="another width|does not fit the base"):
        evaluate(place["base"], [adapter], [place["two"]])
    deep = tiny_base(tmp_path / "deep", "bert", layers=3)
    adapter = adapter_of(tmp_path / "deep-two", deep, place["two"])
    with pytest.raises(LoraforgeError, match="the base lacks modules of the adapter"):
        evaluate(place["base"], {"two": adapter}, [place["two"]])


def test_logits_that_are_not_finite_are_refused(place):
    model, _, _ = load_model(place["base"], "classification", head_labels=place["two"].labels)
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(LoraforgeError, match="logits are not finite"):
        score_task(model, load_task(place["two"], "test", base=place["base"]))


def test_score_task_keeps_the_models_mode(place):
    model, _, _ = load_model(place["base"], "classification", head_labels=place["two"].labels)
    model.train()
    model.bert.encoder.eval()
    score_task(model, load_task(place["two"], "test", base=place["base"]))
    assert model.training and not model.bert.encoder.training and model.classifier.training


def test_classes_are_told_apart_among_the_tasks_own_rows_of_a_shared_head(place, tmp_path):
    """A sequence's head: the largest logit of another task's class does not count."""
    names = ("two:neg", "two:pos", "three:x", "three:y", "three:z")
    model, _, _ = load_model(place["base"], "classification", head_labels=names)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([100.0, 0.0, -50.0, 0.0, -50.0]))
    path = write_rows(tmp_path / "three.jsonl", rows_of(("x", "y", "z"), 9, 4))
    spec = TaskSpec(id="three", test=str(path), labels=("x", "y", "z"))
    data = load_task(spec, "test", base=place["base"], head_labels=names, label_space="per-task")
    score = score_task(model, data, metrics=["accuracy", "f1_macro"])
    assert score.predictions == ["y"] * 9
    share = sum(label == "y" for label in [r["label"] for r in rows_of(("x", "y", "z"), 9, 4)]) / 9
    assert score.value == pytest.approx(share)
