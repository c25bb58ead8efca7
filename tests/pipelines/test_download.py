"""Fetching base and data of a recipe, on a stand-in of the hub's functions."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow
import pytest
import yaml
from huggingface_hub.errors import GatedRepoError
from PIL import Image
from pyarrow import parquet

from loraforge.errors import InputProblems, LoraforgeError, UsageError
from loraforge.pipelines import download, run_pipeline
from loraforge.pipelines.hub import read_address
from tests.pipelines.hub import Hub

TEXTS = [{"text": f"row {i}", "label": i % 2, "note": None} for i in range(5)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """One model with more files than are needed, one set of texts in two files, one of images."""
    hub = Hub(tmp_path, monkeypatch)
    model = hub.folder / "owner/model"
    model.mkdir(parents=True)
    for name, size in (("config.json", 2), ("tokenizer.json", 3), ("model.safetensors", 50), ("pytorch_model.bin", 60),
                       ("tf_model.h5", 70), ("README.md", 5), ("onnx/model.onnx", 9)):  # fmt: skip
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"x" * size)
    for number, rows in enumerate((TEXTS[:3], TEXTS[3:])):
        _write(hub.folder / f"owner/texts/default/train/{number:04d}.parquet", rows)
    _write(hub.folder / "owner/texts/default/test/0000.parquet", TEXTS[:2])
    images = [{"image": {"bytes": _png(i), "path": f"{i}.png"}, "label": i % 2} for i in range(4)]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["apple pie", "a/b"]}}
    _write(hub.folder / "owner/images/small/train/0000.parquet", images, features)
    hub.licences = {"owner/model": "apache-2.0", "owner/texts": ["mit", "cc0"]}
    return hub


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def write_recipe(folder: Path, **changes: Any) -> Path:
    tasks = [
        {"id": "t", "train": "hf://owner/texts:train", "test": "hf://owner/texts#default:test"},
        {"id": "i", "train": "hf://owner/images#small", "kind": "images"},
        {"id": "own", "train": "by/hand.jsonl"},
    ]
    sources = {
        "by/": {"from": "the shelf", "size": "1 MB", "note": "ask first"},
        "owner/images": {"licence": "see page"},
    }
    content = {"base": "owner/model", "method": "svd", "pipeline": {"tasks": tasks, "sources": sources}} | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _write(path: Path, rows: list[dict[str, Any]], features: dict[str, Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path)


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_everything_is_fetched_told_and_laid_out(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    told: list[str] = []
    found = download(recipe, tell=told.append)
    states = {item["name"]: item["state"] for item in found["items"]}
    assert states == {
        "owner/model": "fetched", "hf://owner/texts:train": "fetched", "hf://owner/texts#default:test": "fetched",
        "hf://owner/images#small": "fetched", str(tmp_path / "by/hand.jsonl"): "by hand",
    }  # fmt: skip
    # Of a model what transformers reads: one set of weights, no other framework's.
    fetched = {path.removeprefix("owner/model/") for path in hub.fetched if "model/" in path}
    assert fetched == {"config.json", "tokenizer.json", "model.safetensors"}
    assert "owner/model: 0.0 MB in 3 files, licence: apache-2.0" in told[0] and "licence: mit, cc0" in told[1]
    assert "licence: see page" in told[3]
    assert found["bytes"] == 55 + sum(p.stat().st_size for p in (hub.folder / "owner").rglob("*.parquet"))
    rows = (tmp_path / "hub/owner/texts/default/train.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == TEXTS
    images = tmp_path / "hub/owner/images/small/train"
    names = sorted(str(path.relative_to(images)) for path in images.rglob("*.png"))
    assert names == ["a_b/0000002.png", "a_b/0000004.png", "apple_pie/0000001.png", "apple_pie/0000003.png"]
    assert (images / names[0]).read_bytes() == _png(1)
    assert not list(tmp_path.rglob("*.fetch")) and not list(tmp_path.rglob("*.part"))


def test_what_is_there_stays(hub: Hub, recipe: Path) -> None:
    download(recipe)
    hub.fetched.clear()
    found = download(recipe)
    assert hub.fetched == [] and found["bytes"] == 0
    assert [item["state"] for item in found["items"]] == ["there"] * 4 + ["by hand"]


def test_a_broken_transfer_is_taken_up(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    hub.fails_at = "default/train/0001.parquet"
    with pytest.raises(LoraforgeError, match="(?s)cannot be reached.*owner/texts.*the line is dead.*is kept"):
        download(recipe)
    assert not (tmp_path / "hub/owner/texts/default/train.jsonl").exists()
    hub.fails_at = None
    before = list(hub.fetched)
    download(recipe)
    assert "owner/texts/default/train/0000.parquet" in before and len(set(hub.fetched)) == len(hub.fetched)
    assert len((tmp_path / "hub/owner/texts/default/train.jsonl").read_text().splitlines()) == 5


def test_a_dry_run_uses_no_network(hub: Hub, recipe: Path) -> None:
    hub.error = AssertionError("no network in a dry run")
    found = download(recipe, dry_run=True)
    assert [item["state"] for item in found["items"]] == ["missing"] * 4 + ["by hand"]
    assert found["items"][-1]["from"] == "the shelf" and found["items"][-1]["note"] == "ask first"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "owner/nothing"}, "no such model or data set"),
        ({"base": "owner/images"}, "no weights that PyTorch reads"),
        ({"pipeline": {"tasks": [{"id": "t", "train": "hf://owner/texts:dev"}]}}, "no such split.*default: train"),
        ({"pipeline": {"tasks": [{"id": "t", "train": "hf://:x"}]}}, "not the address of a data set"),
    ],
)
def test_what_the_hub_does_not_have_is_told_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(LoraforgeError, match=f"(?s){message}"):
        download(write_recipe(tmp_path, **changes))
    assert hub.fetched == []


def test_terms_that_were_not_accepted(hub: Hub, recipe: Path) -> None:
    hub.error = GatedRepoError.__new__(GatedRepoError)
    with pytest.raises(LoraforgeError, match="(?s)accepted its terms.*owner/model.*hf auth login"):
        download(recipe)


def test_offline_fails_at_once_with_the_reason(tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library, switched off: its error is ours."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoraforgeError, match=r"(?s)cannot be reached or refuses.*owner/model.*HF_HUB_OFFLINE"):
        download(recipe)
    assert not (tmp_path / "hub").exists()


def test_a_run_without_its_files_names_them_all(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(InputProblems) as caught:
        run_pipeline(recipe, out=tmp_path / "run")
    text = str(caught.value)
    assert len(caught.value.problems) == 5 and f"loraforge download {recipe} fetches it" in text and "the shelf" in text
    assert not (tmp_path / "run").exists()


def test_a_run_fetches_only_when_told_to(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraforgeError, match="by/hand.jsonl"):
        run_pipeline(recipe, out=tmp_path / "run", fetch_missing=True)
    assert "owner/model/config.json" in hub.fetched
    found = run_pipeline(recipe, out=tmp_path / "run", settings={"tasks.own.train": "recipe.yaml"}, only="download")
    assert found["stages"] == [] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("hf://a/b", ("a/b", None, "train")),
        ("hf://a/b#c:validation", ("a/b", "c", "validation")),
        ("hf://glue:test", ("glue", None, "test")),
    ],
)
def test_addresses(address: str, parts: tuple[str, str | None, str], tmp_path: Path) -> None:
    split = read_address(address)
    assert (split.name, split.config, split.split) == parts
    assert split.place(tmp_path) == tmp_path / "hub" / parts[0] / (parts[1] or "default") / parts[2]


def test_unknown_presets_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="did you mean 'GLUE_t5'"):
        download("GLUE_t6")
