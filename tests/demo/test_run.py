"""The demo from end to end on two domains: everything it promises is there, loads and agrees with itself."""

from __future__ import annotations

import json
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraforge.demo import run_demo
from loraforge.demo.digits import as_pixels, domain, load_splits
from loraforge.demo.evaluation import accuracy, adapter_accuracies
from loraforge.demo.training import Recipe, linear_modules
from loraforge.errors import LoraforgeError, UsageError

METHODS = ["iteris-plus", "weighted-average", "svd"]
TASKS = ["rotated", "mirrored"]


class _NoNetwork(socket.socket):
    def connect(self, *args: object) -> None:
        raise AssertionError(f"the demo opened a connection: {args}")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[tuple[str, str, int, int]]]:
    out, told = tmp_path_factory.mktemp("demo") / "out", []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(socket, "socket", _NoNetwork)
        # Merges warn of small calibration sets and of kernels that are not built: news for a user, none here.
        warnings.simplefilter("ignore", UserWarning)
        found = run_demo(out, methods=METHODS, quick=True, progress=lambda *step: told.append(step))
    return out, found, told


def test_folder_holds_all_that_was_promised(demo: Any) -> None:
    out, found, _ = demo
    for name in ("results.json", "picture.png", "report.html", "base/config.json", "base/model.safetensors"):
        assert (out / name).is_file(), name
    for task in TASKS:
        pixels = load_file(out / "calibration" / f"{task}.safetensors")["pixel_values"]
        assert pixels.shape == (Recipe().quick().calibration, 1, 8, 8)
    for folder in [*(out / "adapters" / t for t in TASKS), *(out / "merged" / m for m in METHODS)]:
        assert (folder / "adapter_model.safetensors").is_file() and (folder / "adapter_config.json").is_file()
    assert [p.name for p in out.parent.iterdir()] == ["out"], "no draft is left"
    assert all(Path(path).exists() for path in found["paths"].values())


def test_results_are_whole_and_the_file_says_the_same(demo: Any) -> None:
    out, found, _ = demo
    assert found["tasks"] == TASKS
    assert [row["name"] for row in found["rows"]] == ["base", "separate adapters", *METHODS]
    for row in found["rows"]:
        assert len(row["accuracies"]) == len(TASKS) and all(0 <= a <= 100 for a in row["accuracies"])
        assert row["mean"] == pytest.approx(sum(row["accuracies"]) / len(TASKS))
    for row in found["rows"][2:]:
        folder = out / "merged" / row["name"]
        assert row["bytes"] == (folder / "adapter_model.safetensors").stat().st_size and row["seconds"] > 0
    assert json.loads((out / "results.json").read_text()) == {k: v for k, v in found.items() if k != "paths"}


def test_adapters_learned_their_domains(demo: Any) -> None:
    base, single = demo[1]["rows"][:2]
    # Ten classes: 10 % is chance. Each adapter must beat the base on its own task by a clear margin.
    assert all(own > plain + 10 for own, plain in zip(single["accuracies"], base["accuracies"], strict=True))
    assert demo[1]["plain_accuracy"] > 50


def test_numbers_come_from_the_saved_adapters(demo: Any) -> None:
    out, found, _ = demo
    from transformers import ViTForImageClassification

    base = ViTForImageClassification.from_pretrained(str(out / "base"), local_files_only=True)
    _, test = load_splits(found["seed"])
    test = test.head(found["sizes"]["test"])
    splits = {name: as_pixels(test, domain(name), part="test") for name in TASKS}
    assert [accuracy(base, split) for split in splits.values()] == found["rows"][0]["accuracies"]
    for row in found["rows"][2:]:
        measured = adapter_accuracies(base, out / "merged" / row["name"], splits)
        assert list(measured.values()) == row["accuracies"]
    assert not any("lora" in name for name, _ in base.named_modules()), "measuring leaves the base as it is"


def test_head_is_shared_and_untouched(demo: Any) -> None:
    out, _, _ = demo
    from transformers import ViTForImageClassification

    base = ViTForImageClassification.from_pretrained(str(out / "base"), local_files_only=True)
    assert len(linear_modules(base)) == 6 * Recipe().quick().layers and "classifier" not in linear_modules(base)
    for task in TASKS:
        assert not any("classifier" in key for key in load_file(out / "adapters" / task / "adapter_model.safetensors"))


def test_no_file_names_the_draft_folder(demo: Any) -> None:
    out, found, _ = demo
    for file in [*out.rglob("*.json"), *out.rglob("*.md"), out / "report.html"]:
        assert "/.out." not in file.read_text(encoding="utf-8"), file
    config = json.loads((out / "adapters" / "rotated" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == (out / "base").absolute()
    assert found["reports"]["svd"]["adapters"][0]["path"] == str(Path("adapters") / "rotated")


def test_report_page_names_every_method(demo: Any) -> None:
    page = (demo[0] / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in (*METHODS, *TASKS)) and "http" not in page


def test_progress_tells_every_phase(demo: Any) -> None:
    told = demo[2]
    assert {phase for phase, *_ in told} == {"train base", "train adapters", "measure", "merge"}
    assert all(0 <= done <= total for _, _, done, total in told)
    assert {detail for phase, detail, *_ in told if phase == "merge"} == set(METHODS)


def test_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(LoraforgeError, match="--overwrite"):
        run_demo(tmp_path, quick=True)
    assert (tmp_path / "keep.txt").read_text() == "mine"


def test_unknown_method_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="weighted-average"):
        run_demo(tmp_path / "out", methods=["weighted-averag"], quick=True)
    assert list(tmp_path.iterdir()) == []


def test_training_does_not_move_the_global_generator() -> None:
    from loraforge.demo.training import build_base

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (build_base(Recipe().quick(), seed=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
