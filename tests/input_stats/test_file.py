"""The file of input statistics: read back, matched to modules, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraforge.errors import InputProblems, LoraforgeError
from loraforge.input_stats.file import KEY, Contents, load_stats, match_names, read_contents, stats_for, write_contents

NAMES = ["model.layers.0.q", "model.layers.0.v"]


def about(**fields: Any) -> dict[str, Any]:
    known = {
        "kind": "diag", "part": [1, 1], "modules": NAMES, "tokens": dict.fromkeys(NAMES, 5),
        "base": {"name": "tiny", "sha256": "00"}, "data": "11", "sources": [], "samples": 2, "batches": 1,
        "dtype": "float32", "versions": {},
    }  # fmt: skip
    return known | fields


def write(path: Path, tensors: Any = None, **fields: Any) -> Path:
    values = {n: torch.arange(1.0, 4.0, dtype=torch.float64) * (i + 1) for i, n in enumerate(NAMES)}
    write_contents(path, Contents(about(**fields), tensors or values))
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    found = load_stats(write(tmp_path / "s.safetensors"))
    assert list(found) == NAMES and found[NAMES[1]].tolist() == [2.0, 4.0, 6.0]
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_modules_by_name_prefix_and_weight(tmp_path: Path) -> None:
    path = write(tmp_path / "s.safetensors")
    assert list(stats_for(path, NAMES)) == NAMES
    assert stats_for(path, ["layers.0.q"])["layers.0.q"].tolist() == [1.0, 2.0, 3.0]
    assert list(stats_for(path, ["base.model.layers.0.v"])) == ["base.model.layers.0.v"]
    assert stats_for(path, ["model.layers.0.v.weight"])["model.layers.0.v.weight"].tolist() == [2.0, 4.0, 6.0]


def test_missing_modules_are_all_named(tmp_path: Path) -> None:
    path = write(tmp_path / "s.safetensors")
    with pytest.raises(LoraforgeError, match="lack modules") as caught:
        stats_for(path, [NAMES[0], "model.layers.0.k", "model.layers.1.q"])
    assert "model.layers.0.k, model.layers.1.q" in str(caught.value.got) and caught.value.where == str(path)
    # The last part of a name is no name: block 1 must not get the statistics of block 0.
    with pytest.raises(LoraforgeError, match="lack modules"):
        stats_for(path, ["model.layers.1.q"])


def test_widths_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "s.safetensors")
    assert stats_for(path, NAMES, dict.fromkeys(NAMES, 3))
    with pytest.raises(InputProblems, match="2 problems"):
        stats_for(path, NAMES, dict.fromkeys(NAMES, 7))


def test_a_gram_gives_its_diagonal(tmp_path: Path) -> None:
    grams = {name: torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64) for name in NAMES}
    path = write(tmp_path / "s.safetensors", grams, kind="gram")
    assert stats_for(path, NAMES)[NAMES[0]].tolist() == [2.0, 3.0] and load_stats(path)[NAMES[0]].shape == (2, 2)


def test_one_prefix_has_to_fit_all() -> None:
    known = ["a.q", "a.v", "b.q", "b.k"]
    assert match_names(["q", "v"], known) == {"q": "a.q", "v": "a.v"}
    assert match_names(["q"], known) == {}, "two prefixes fit equally well"
    assert match_names(["x.a.q", "y.b.q", "x.a.v"], known) == {"x.a.q": "a.q", "x.a.v": "a.v"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"part": [2, 3]}, "only a part"), ({"done": 1}, "only a part"), ({"modules": ["x"]}, "disagree")],
)
def test_parts_and_contradictions_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "s.safetensors", **fields)
    for read in (load_stats, lambda p: stats_for(p, NAMES)):
        with pytest.raises(LoraforgeError, match=message):
            read(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraforgeError, match="no such file"):
        load_stats(tmp_path / "none.safetensors")
    save_file({"x": torch.ones(2, dtype=torch.float64)}, tmp_path / "w.safetensors")
    with pytest.raises(LoraforgeError, match="holds no input statistics"):
        load_stats(tmp_path / "w.safetensors")
    save_file({"x": torch.ones(2, dtype=torch.float64)}, tmp_path / "v.safetensors", {KEY: json.dumps([1])})
    with pytest.raises(LoraforgeError, match="holds no input statistics"):
        load_stats(tmp_path / "v.safetensors")
    cut = write(tmp_path / "s.safetensors").read_bytes()[:-8]
    (tmp_path / "cut.safetensors").write_bytes(cut)
    with pytest.raises(LoraforgeError):
        load_stats(tmp_path / "cut.safetensors")


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = {name: torch.tensor([1.0, float("inf")], dtype=torch.float64) for name in NAMES}
    with pytest.raises(LoraforgeError, match="not finite"):
        load_stats(write(tmp_path / "s.safetensors", broken))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoraforgeError, match="cannot be written"):
        write(tmp_path / "file" / "s.safetensors")


def test_contents_keep_what_an_unfinished_run_needs(tmp_path: Path) -> None:
    path = write(tmp_path / ".s.unfinished", {NAMES[0]: torch.ones(3, dtype=torch.float64)}, done=4)
    found = read_contents(path)
    assert found.about["done"] == 4 and list(found.tensors) == NAMES[:1]
