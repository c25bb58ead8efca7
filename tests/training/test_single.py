from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from loraforge.errors import LoraforgeError, UsageError
from loraforge.evaluation.score import score_task
from loraforge.tasks import load_model, load_task, parse_task, read_task_card
from loraforge.training.log import read_log
from loraforge.training.single import train_full, train_lora
from tests.tasks.tiny import tiny_base, write_rows

TRAIN = {"num_train_epochs": 10, "per_device_train_batch_size": 8, "learning_rate": 0.05, "save_strategy": "no"}
LORA = {"r": 4, "targets": "all-linear"}
BRIEF = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01}
LONGER = {**BRIEF, "max_steps": 15, "learning_rate": 0.1, "save_strategy": "no"}


def task(rows: Path, **more: Any) -> dict[str, Any]:
    return {"id": "mood", "train": str(rows), "eval": str(rows), **more}


@pytest.fixture(scope="module")
def trained(bert: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("trained") / "out"
    record = train_lora(bert, task(rows_file), out, lora=LORA, train=TRAIN, snapshots=[0, 10, 20], tensorboard=True,
                        device="cpu")  # fmt: skip
    return out, record


def test_a_small_task_is_learnt(trained: tuple[Path, dict[str, Any]]) -> None:
    out, record = trained
    score = record["metrics"]["eval"]
    # Half of the rows are of one class.
    assert score["metrics"]["accuracy"] >= 0.75 and score["n"] == 16
    log = read_log(out / "train_log.jsonl")
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0]
    assert [line["step"] for line in log if "eval_accuracy" in line] == list(range(2, 21, 2))


# PEFT asks for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_folder_is_what_peft_loads_and_scores_the_same(
    trained: tuple[Path, dict[str, Any]], bert: Path, rows_file: Path
) -> None:
    out, record = trained
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    model = PeftModel.from_pretrained(base, str(out)).eval()
    rows = load_task(parse_task(task(rows_file), "test"), "eval", base=bert)
    assert score_task(model, rows).metrics == record["metrics"]["eval"]["metrics"]


def test_what_lies_in_the_folder(trained: tuple[Path, dict[str, Any]], bert: Path, rows_file: Path) -> None:
    out, record = trained
    assert sorted(entry.name for entry in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "report.html", "run.json", "snapshots",
        "task.json", "tensorboard", "train_log.jsonl",
    ]  # fmt: skip
    (events,) = (out / "tensorboard").glob("events.*")
    assert b"train/loss" in events.read_bytes()
    assert json.loads((out / "run.json").read_text())["metrics"] == json.loads(json.dumps(record["metrics"]))
    assert record["base_sha256"] == {
        "model.safetensors": hashlib.sha256((bert / "model.safetensors").read_bytes()).hexdigest()
    }
    assert record["data"]["train"]["sha256"] == hashlib.sha256(rows_file.read_bytes()).hexdigest()
    assert (record["steps"], record["modules"], record["targets"]) == (20, 13, ["dense", "key", "query", "value"])
    card = read_task_card(out)
    assert card is not None and (card["id"], card["labels"]) == ("mood", ["down", "up"])
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "score"]
    report = (out / "report.html").read_text()
    assert "http" not in report.replace("http-equiv", "") and "<svg" in report
    assert "LoRA on mood" in report and "eval rows" in report
    assert f"accuracy | {record['metrics']['eval']['metrics']['accuracy']:.6g} |" in (out / "README.md").read_text()


def test_snapshots_are_adapters_on_the_way(trained: tuple[Path, dict[str, Any]]) -> None:
    out, record = trained
    assert record["snapshots"] == [{"step": s, "path": f"snapshots/step-{s}"} for s in (0, 10, 20)]
    first, middle, last = (load_file(out / row["path"] / "adapter_model.safetensors") for row in record["snapshots"])
    assert all(not bool(first[key].any()) for key in first if "lora_B" in key)
    assert any(not torch.equal(middle[key], last[key]) for key in last)
    final = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(final[key], last[key]) for key in final)


def test_the_same_command_gives_the_same_bytes(bert: Path, rows_file: Path, tmp_path: Path) -> None:
    for name in "ab":
        train_lora(bert, task(rows_file), tmp_path / name, train=BRIEF, seed=3, device="cpu")
    files = ("adapter_model.safetensors", "adapter_config.json", "train_log.jsonl", "task.json")
    one, same = ([(tmp_path / name / file).read_bytes() for file in files] for name in "ab")
    assert one == same


def test_the_best_weights_are_reloaded_and_a_worsening_run_ends(bert: Path, rows_file: Path, tmp_path: Path) -> None:
    # A learning rate that only ruins: the first evaluation stays the best.
    ruin = {"num_train_epochs": 9, "learning_rate": 30.0, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    train = {**ruin, "metric_for_best_model": "loss", "per_device_train_batch_size": 16, "optim": "sgd"}
    record = train_lora(
        bert, task(rows_file), tmp_path / "o", train=train, early_stopping=2, snapshots=[1, 2, 3], device="cpu"
    )
    losses = [line["eval_loss"] for line in read_log(tmp_path / "o" / "train_log.jsonl") if "eval_loss" in line]
    best = losses.index(min(losses)) + 1
    assert record["best"] == {"metric": "loss", "value": min(losses), "step": best}
    assert record["stopped_early"] and record["steps"] == best + 2 == len(losses)
    kept = load_file(tmp_path / "o" / "snapshots" / f"step-{best}" / "adapter_model.safetensors")
    final = load_file(tmp_path / "o" / "adapter_model.safetensors")
    assert all(torch.equal(final[key], kept[key]) for key in kept)


def test_full_fine_tuning_gives_a_model_folder(bert: Path, rows_file: Path, tmp_path: Path) -> None:
    record = train_full(bert, task(rows_file), tmp_path / "o", train={**BRIEF, "save_strategy": "no"}, device="cpu")
    assert record["trainable_parameters"] == record["parameters"]
    model, _, fresh = load_model(tmp_path / "o", "classification", head_labels=("down", "up"))
    assert fresh == ()
    rows = load_task(parse_task(task(rows_file), "test"), "eval", base=tmp_path / "o")
    assert score_task(model, rows).metrics == record["metrics"]["eval"]["metrics"]
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "o", bert))
    assert ours.get("use_cache") == theirs.get("use_cache")
    before, after = load_file(bert / "model.safetensors"), load_file(tmp_path / "o" / "model.safetensors")
    key = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(before[key], after[f"bert.{key}"])


KINDS = {
    "llama": ("causal", {"text": "good red", "target": "up"}),
    "t5": ("text-to-text", {"text": "good red", "target": "up"}),
    "qwen3": ("choice", {"text": "good", "choices": ["up", "down"], "answer": 0}),
}


@pytest.mark.parametrize("family", KINDS)
def test_other_kinds(family: str, tmp_path: Path) -> None:
    kind, row = KINDS[family]
    base, rows = tiny_base(tmp_path / "base", family), write_rows(tmp_path / "r.jsonl", [row] * 4)
    train = {**LONGER, "gradient_checkpointing": family == "llama", "bf16": family == "qwen3"}
    lora, wanted = {"r": 4, "targets": "all-linear"}, {"id": "t", "train": str(rows), "test": str(rows)}
    record = train_lora(base, wanted, tmp_path / "o", lora=lora, train=train, device="cpu")
    assert record["task"]["kind"] == kind
    assert record["metrics"]["test"]["metrics"][record["metrics"]["test"]["main"]] == 1.0


def test_images_and_captions(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    for i in range(4):
        folder = tmp_path / "images" / ("dark" if i % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 255 * (1 - i % 2), np.uint8)).save(folder / f"{i}.png")
    vit = tiny_base(tmp_path / "vit", "vit")
    record = train_lora(vit, task(tmp_path / "images"), tmp_path / "v", train=BRIEF, device="cpu")
    assert (record["task"]["kind"], record["labels"]) == ("images", ["dark", "light"])
    rows = [{"image": f"images/dark/{i}.png", "text": "the", "target": "moon"} for i in (1, 3)]
    blip = tiny_base(tmp_path / "blip", "blip")
    captions = {"id": "t", "train": str(write_rows(tmp_path / "captions.jsonl", rows))}
    record = train_lora(blip, captions, tmp_path / "b", lora={"targets": "all-linear"},
                        train={**LONGER, "learning_rate": 0.03}, device="cpu")  # fmt: skip
    assert record["model_class"] == "BlipForConditionalGeneration"
    losses = [line["loss"] for line in read_log(tmp_path / "b" / "train_log.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "good", "label": "a"}, {"words": "bad", "label": "b"}], "text"),
        ([], "r.jsonl"),
        ([{"text": "good", "label": "a"}], "classes"),
    ],
    ids=["missing field", "empty", "one class"],
)
def test_data_that_cannot_be_used_leave_nothing(
    bert: Path, tmp_path: Path, rows: list[dict[str, str]], expected: str
) -> None:
    file = write_rows(tmp_path / "r.jsonl", rows)
    with pytest.raises(LoraforgeError) as raised:
        train_lora(bert, {"id": "t", "train": str(file)}, tmp_path / "out", device="cpu")
    assert expected in str(raised.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["r.jsonl"]


def test_an_unknown_label_of_the_eval_rows_is_named(bert: Path, rows_file: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "e.jsonl", [{"text": "good", "label": "sideways"}])
    with pytest.raises(LoraforgeError, match="sideways"):
        train_lora(bert, task(rows_file, eval=str(other)), tmp_path / "out", device="cpu")


def test_contradicting_settings(bert: Path, rows_file: Path, tmp_path: Path) -> None:
    bare, out = {"id": "t", "train": str(rows_file)}, tmp_path / "o"
    with pytest.raises(LoraforgeError, match="early stopping needs eval rows"):
        train_lora(bert, bare, out, early_stopping=1, device="cpu")
    with pytest.raises(LoraforgeError, match="metrics cannot be taken while weights are dealt out"):
        fsdp = {"fsdp": "full_shard", "metric_for_best_model": "accuracy"}
        train_lora(bert, task(rows_file), out, train=fsdp, early_stopping=1, device="cpu")
    with pytest.raises(UsageError, match="unknown recipe"):
        train_lora(bert, bare, out, recipe="document-lor", device="cpu")
    with pytest.raises(UsageError, match="is for train-full"):
        train_lora(bert, bare, out, recipe="document-full", device="cpu")
    with pytest.raises(UsageError, match="does not reach"):
        train_lora(bert, bare, out, train=BRIEF, snapshots=[3], device="cpu")
    assert not out.exists() and not (tmp_path / ".o.part").exists()


def test_a_dry_run_writes_nothing_and_a_recipe_fills_in(tmp_path: Path, rows_file: Path) -> None:
    base = tiny_base(tmp_path / "base", "deberta-v2")
    record = train_lora(
        base, task(rows_file), tmp_path / "o", recipe="document-lora", train={"num_train_epochs": 1}, dry_run=True,
        device="cpu",
    )  # fmt: skip
    assert record["dry_run"] and record["task"]["max_length"] == 256
    assert record["lora"]["targets"] == ["query_proj", "key_proj", "value_proj", "dense"]
    assert (record["train"]["learning_rate"], record["train"]["num_train_epochs"]) == (2e-4, 1.0)
    # Four attention and two feed-forward modules a layer; the pooler is trained in full.
    assert record["modules"] == 12 and "pooler" in record["fresh"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base"]
