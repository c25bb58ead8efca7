"""Key maps for files with private names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraforge.adapters import open_adapter
from loraforge.errors import LoraforgeError

MAP = {"blocks.0.q": {"A": "w_a_000", "B": "w_b_000"}, "blocks.0.v": {"A": "w_a_001", "B": "w_b_001", "alpha": 6}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {f"w_{s}_{i:03d}": torch.randn(shape) for i in range(2) for s, shape in (("a", (3, 5)), ("b", (7, 3)))}
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def test_given_as_object_as_file_or_beside(file: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraforgeError, match="Sam_LoRA"):
        open_adapter(file)
    other = tmp_path / "map.json"
    other.write_text(json.dumps(MAP))
    (tmp_path / "sub").mkdir()
    beside = tmp_path / "sub" / "lora.safetensors"
    beside.write_bytes(file.read_bytes())
    (tmp_path / "sub" / "key_map.json").write_text(json.dumps(MAP))
    opened = [open_adapter(file, key_map=MAP), open_adapter(file, key_map=other), open_adapter(tmp_path / "sub")]
    for adapter in opened:
        assert adapter.modules == ("blocks.0.q", "blocks.0.v") and adapter.format == "keymap"
        assert adapter.info("blocks.0.q").scaling == 1.0 and adapter.info("blocks.0.v").scaling == 2.0
        assert adapter.load("blocks.0.v").shape == (7, 5)


def test_keys_that_are_left_out(file: Path) -> None:
    part = {"blocks.0.q": MAP["blocks.0.q"]}
    with pytest.raises(LoraforgeError, match="w_a_001"):
        open_adapter(file, key_map=part)
    assert open_adapter(file, key_map=part, ignore_unknown=True).modules == ("blocks.0.q",)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"a/b": MAP["blocks.0.q"]}, "no dotted module name"),
        ({"x": ["w_a_000", "w_b_000"]}, "is not"),
        ({"x": {"A": "w_a_000"}}, "is not"),
        ({"x": {"A": "w_a_000", "B": "w_b_009"}}, "does not have"),
        ({"x": {"A": "w_a_000", "B": ["w_b_000"]}}, "does not have"),
        ({"x": {**MAP["blocks.0.q"], "alpha": "6"}}, "no finite number"),
        ({"x": {"A": "w_b_000", "B": "w_a_000"}}, "do not fit"),
    ],
)
def test_wrong_entries(file: Path, change: dict[str, Any], what: str) -> None:
    with pytest.raises(LoraforgeError, match=what):
        open_adapter(file, key_map={**MAP, **change})


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_maps_that_are_no_object(file: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(LoraforgeError, match="key map"):
        open_adapter(file, key_map=tmp_path / "map.json")
