"""Parts that belong together are joined by their tokens; others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.input_stats import load_stats, merge_stats

from .test_file import NAMES, write


def part(folder: Path, i: int, n: int, value: float, tokens: int, **fields: Any) -> Path:
    tensors = {name: torch.full((2,), value, dtype=torch.float64) for name in NAMES}
    counts = dict.fromkeys(NAMES, tokens)
    return write(folder / f"p{i}-{n}-{value}.safetensors", tensors, part=[i, n], tokens=counts, **fields)


def test_means_are_weighed_by_tokens(tmp_path: Path) -> None:
    parts = [part(tmp_path, 2, 2, 4.0, 30), part(tmp_path, 1, 2, 1.0, 10)]
    found = merge_stats(parts, tmp_path / "out.safetensors")
    assert load_stats(tmp_path / "out.safetensors")[NAMES[0]].tolist() == [3.25, 3.25]
    assert found["tokens"] == {"fewest": 40, "most": 40} and found["samples"] == 4 and found["part"] == [1, 1]
    again = merge_stats(parts[::-1], tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    assert again["parts"] == [str(p) for p in parts[::-1]]


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"kind": "gram"}, "kind"),
        ({"base": {"name": "tiny", "sha256": "ff"}}, "base model"),
        ({"data": "22"}, "data"),
        ({"dtype": "float64"}, "dtype"),
    ],
)
def test_parts_of_another_run_are_refused(tmp_path: Path, fields: dict[str, Any], what: str) -> None:
    parts = [part(tmp_path, 1, 2, 1.0, 10), part(tmp_path, 2, 2, 4.0, 30, **fields)]
    with pytest.raises(LoraforgeError, match=f"parts of another {what}"):
        merge_stats(parts, tmp_path / "out.safetensors")


def test_every_part_once(tmp_path: Path) -> None:
    one, two, other = part(tmp_path, 1, 3, 1.0, 1), part(tmp_path, 2, 3, 1.0, 1), part(tmp_path, 2, 2, 1.0, 1)
    for parts in ([one, two], [one, two, two], [one, two, other]):
        with pytest.raises(LoraforgeError, match="not the parts of one run") as caught:
            merge_stats(parts, tmp_path / "out.safetensors")
        assert "each of the" in str(caught.value.expected)
    with pytest.raises(LoraforgeError, match="no part"):
        merge_stats([], tmp_path / "out.safetensors")


def test_an_unfinished_run_is_no_part(tmp_path: Path) -> None:
    """Its sums would count as means."""
    parts = [part(tmp_path, 1, 2, 1.0, 10), part(tmp_path, 2, 2, 4.0, 30, done=1)]
    with pytest.raises(LoraforgeError, match="unfinished run"):
        merge_stats(parts, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_the_output_is_no_part_and_free(tmp_path: Path) -> None:
    parts = [part(tmp_path, 1, 2, 1.0, 1), part(tmp_path, 2, 2, 1.0, 1)]
    with pytest.raises(LoraforgeError, match="exists already"):
        merge_stats(parts, parts[0])
    with pytest.raises(LoraforgeError, match="one of the parts"):
        merge_stats(parts, parts[0], overwrite=True)
