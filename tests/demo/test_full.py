"""The demo with full models on two domains: everything is there, loads with transformers and agrees with itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import ViTForImageClassification

from loraforge.demo import run_demo
from loraforge.demo.digits import as_pixels, domain, load_splits
from loraforge.demo.evaluation import accuracy
from loraforge.demo.full import FULL_METHODS
from loraforge.demo.training import Recipe
from loraforge.merging.methods import METHODS

CHOSEN = ["iso-c", "task-arithmetic", "weighted-average"]


def test_from_training_to_the_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run_demo(out, methods=CHOSEN, quick=True, full=True)
    assert [row["name"] for row in found["rows"]] == ["base", "separate models", *CHOSEN]
    assert found["command"] == "loraforge demo --full"
    assert all(Path(path).exists() for path in found["paths"].values())
    assert json.loads((out / "results.json").read_text())["rows"] == found["rows"]
    base, own = found["rows"][0]["mean"], found["rows"][1]["mean"]
    assert own > base + 10, "fine-tuning helps"
    weights = json.loads((out / "merged" / "task-arithmetic" / "run.json").read_text())["weights"]
    assert weights == [0.3, 0.3]
    assert str(out) in (out / "merged" / "iso-c" / "run.json").read_text()
    _, test = load_splits(0)
    split = as_pixels(test.head(Recipe().quick().test), domain("rotated"), part="test")
    for row in found["rows"][2:]:
        model = ViTForImageClassification.from_pretrained(out / "merged" / row["name"])
        assert accuracy(model, split) == pytest.approx(row["accuracies"][0])


def test_methods_take_models() -> None:
    assert all(METHODS[name].checkpoints for name in FULL_METHODS)
