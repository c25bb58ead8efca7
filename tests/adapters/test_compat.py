from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraforge.adapters import all_modules, check_compatible, open_adapter, output_dtype
from loraforge.errors import InputProblems, LoraforgeError

from .folders import config, factors, simple, write_folder


def test_fitting_adapters_pass(tmp_path: Path) -> None:
    a = open_adapter(simple(tmp_path / "a"))
    unknown = open_adapter(simple(tmp_path / "b", base_model_name_or_path=None, task_type=None))
    assert check_compatible([a, unknown]) == [] and check_compatible([a]) == []


def test_differences_are_shown_together(tmp_path: Path) -> None:
    a = open_adapter(simple(tmp_path / "x" / "run"))
    shapes = {"layers.2.q": (7, 4, 5), "layers.10.q": (6, 4, 5)}
    b = open_adapter(
        simple(tmp_path / "y" / "run", modules=shapes, base_model_name_or_path="other", task_type="SEQ_CLS")
    )
    with pytest.raises(InputProblems) as caught:
        check_compatible([a, b])
    message = str(caught.value)
    assert "run: tiny, run-2: other" in message and "SEQ_CLS" in message and "run: 6 x 5, run-2: 7 x 5" in message
    with pytest.raises(LoraforgeError, match="'layers.2.q' has different shapes"):
        check_compatible([a, b], force=True)


def test_force_lets_names_differ_and_says_so(tmp_path: Path) -> None:
    a, b = open_adapter(simple(tmp_path / "a")), open_adapter(simple(tmp_path / "b", base_model_name_or_path="other"))
    with pytest.raises(LoraforgeError, match="different base models"):
        check_compatible([a, b])
    assert check_compatible([a, b], force=True) == ["The adapters name different base models (a: tiny, b: other)"]


def test_no_adapters() -> None:
    with pytest.raises(LoraforgeError, match="No adapter"):
        check_compatible([])


def test_union_of_modules(tmp_path: Path) -> None:
    a = open_adapter(simple(tmp_path / "a"))
    b = open_adapter(simple(tmp_path / "b", modules={"layers.9.q": (6, 4, 5), "layers.2.q": (6, 4, 5)}))
    assert all_modules([a, b]) == ["layers.2.q", "layers.9.q", "layers.10.q"]


def test_output_dtype(tmp_path: Path) -> None:
    made = [
        open_adapter(write_folder(tmp_path / str(dtype), factors({"q": (6, 4, 5)}, dtype=dtype), config()))
        for dtype in (torch.bfloat16, torch.float16, torch.float64)
    ]
    bf16, fp16, fp64 = made
    assert output_dtype([bf16, bf16]) == torch.bfloat16 and output_dtype([bf16, fp16]) == torch.float32
    assert output_dtype([fp64]) == torch.float32 and output_dtype([bf16], "float16") == torch.float16
    with pytest.raises(LoraforgeError, match="Unknown dtype"):
        output_dtype([bf16], "int8")
