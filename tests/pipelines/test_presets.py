"""Every preset's pipeline from data to report on a stand-in of its shape: other base, other data, smaller numbers."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from loraforge.adapters import open_adapter
from loraforge.pipelines import open_pipeline, pipeline_presets, run_pipeline
from tests.pipelines.stand_ins import STAND_INS, stand_in

MODELS = {
    **dict.fromkeys(("GLUE_t5", "GLUE_bart", "EMOTION_t5_large"), tf.AutoModelForSeq2SeqLM),
    "TASKS_blip_base": tf.BlipForConditionalGeneration,
    "PIQA_SIQA_qwen3": tf.AutoModelForCausalLM,
    "VIT_B_16_8": tf.AutoModelForImageClassification,
}  # fmt: skip
METRICS = {
    "GLUE_t5": ["exact_match", "exact_match"], "GLUE_bart": ["exact_match"] * 2, "PIQA_SIQA_qwen3": ["accuracy"] * 2,
    "EMOTION_t5_large": ["exact_match"] * 4, "TASKS_blip_base": ["rougeL"] * 2, "VIT_B_16_8": ["accuracy"] * 8,
}  # fmt: skip

# The one that compares instead of merging has its own test.
MERGING = [name for name in STAND_INS if name in MODELS]


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> scale * B A in float64, from the files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, down in tensors.items():
        if key.endswith("lora_A.weight"):
            up = tensors[key.replace("lora_A", "lora_B")]
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank = down.shape[0]
            alpha = next(
                (a for name, a in config.get("alpha_pattern", {}).items() if module.endswith(name)),
                config["lora_alpha"],
            )
            found[module] = up.double() @ down.double() * (alpha / rank)
    return found


def test_every_preset_with_a_pipeline_has_a_stand_in() -> None:
    assert sorted(STAND_INS) == pipeline_presets()


@pytest.mark.parametrize("preset", MERGING)
def test_preset_runs_from_data_to_report(preset: str, tmp_path: Path) -> None:
    data, settings = stand_in(preset, tmp_path)
    out = tmp_path / "run"
    found = run_pipeline(preset, out=out, data=data, settings=settings)
    pipeline = open_pipeline(preset, data=data)
    ids, merges = [task.id for task in pipeline.tasks], [merge.name for merge in pipeline.merges]
    assert {stage["state"] for stage in found["stages"]} == {"done"}
    assert [task["id"] for task in found["tasks"]] == ids
    assert [task["metric"] for task in found["tasks"]] == METRICS[preset]
    _check_rows(found, ids, merges)
    _check_adapters(out, pipeline, ids)
    _check_average(out, ids)
    _check_loads(MODELS[preset].from_pretrained(settings["base"]), out / "merged" / merges[0])
    _check_files(out, found)
    again = run_pipeline(preset, out=out, data=data, settings=settings)
    assert {stage["state"] for stage in again["stages"]} == {"skipped"} and again["rows"] == found["rows"]


def _check_rows(found: dict[str, Any], ids: list[str], merges: list[str]) -> None:
    """Base, adapters, merges and the row of own adapters, which is the diagonal."""
    kinds = [(row["name"], row["kind"]) for row in found["rows"]]
    assert [entry for entry in kinds if entry[1] != "own"] == [
        ("base", "base"), *((name, "adapter") for name in ids), *((name, "merge") for name in merges)
    ]  # fmt: skip
    rows = {row["name"]: row for row in found["rows"]}
    (own,) = (row for row in found["rows"] if row["kind"] == "own")
    assert own["scores"] == [rows[name]["scores"][i] for i, name in enumerate(ids)]
    for name in merges:
        row = rows[name]
        assert all(0 <= score <= 1 for score in row["scores"])
        assert row["mean"] == pytest.approx(sum(row["scores"]) / len(ids))
        assert row["rank"] >= 1 and row["bytes"] > 0 and row["seconds"] > 0


def _check_adapters(out: Path, pipeline: Any, ids: list[str]) -> None:
    """The adapters are what the recipe says, but for the rank that the stand-in sets."""
    for name in ids:
        config = json.loads((out / "adapters" / name / "adapter_config.json").read_text())
        assert config["r"] == 2 and config["lora_alpha"] == pipeline.lora["alpha"]
        assert config["lora_dropout"] == pipeline.lora["dropout"]
        adapter = open_adapter(str(out / "adapters" / name))
        targets = pipeline.lora["targets"]
        if isinstance(targets, list):
            assert {module.rpartition(".")[2] for module in adapter.modules} == set(targets)
        account = json.loads((out / "adapters" / name / "run.json").read_text())
        assert account["seed"] == pipeline.seed == 42


def _check_loads(model: torch.nn.Module, folder: Path) -> None:
    """PEFT loads a merge, and every module has the scale 1."""
    with warnings.catch_warnings():
        # PEFT asks transformers for a property under its old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        loaded = PeftModel.from_pretrained(model, folder)
    scales = {module.scaling["default"] for module in loaded.modules() if isinstance(module, LoraLayer)}
    assert scales == {1.0}


def _check_average(out: Path, ids: list[str]) -> None:
    """The plain average of the merges is the mean of the adapters' deltas, and there is something to average."""
    average, own = deltas(out / "merged" / "weighted-average"), [deltas(out / "adapters" / name) for name in ids]
    assert average.keys() == own[0].keys()
    for module, delta in average.items():
        wanted = torch.stack([each[module] for each in own]).mean(dim=0)
        assert (delta - wanted).norm() <= 1e-5 * wanted.norm(), module
    assert all(any(delta.norm() > 0 for delta in each.values()) for each in own)


def _check_files(out: Path, found: dict[str, Any]) -> None:
    assert found["paths"]["numbers"] == str(out / "results.json")
    assert json.loads((out / "results.json").read_text())["rows"] == found["rows"]
    page = (out / "report.html").read_text()
    assert all(str(row["name"]) in page for row in found["rows"] if row["kind"] == "merge")
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert all(os.path.exists(path) for path in found["paths"].values())
    assert not [path for path in out.rglob("*") if path.name.endswith(".part")]
