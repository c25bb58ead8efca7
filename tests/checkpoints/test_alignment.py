"""Tensors of a fine-tuned model against its base: by name and shape, with one prefix put aside."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from loraforge.checkpoints import align, open_checkpoint
from loraforge.errors import LoraforgeError


def model(path, **shapes):
    save_file({name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}, path)
    return open_checkpoint(path)


def test_equal_names(tmp_path):
    base = model(tmp_path / "b.safetensors", a__weight=(2, 3), head__weight=(4, 2), a__bias=(2,))
    tuned = model(tmp_path / "t.safetensors", a__weight=(2, 3), head__weight=(7, 2), a__bias=(2,), extra=(1,))
    found = align(base, tuned)
    assert found.names == {"a.weight": "a.weight", "a.bias": "a.bias"}
    assert found.missing == ("head.weight",)
    assert found.own == ("extra", "head.weight")
    assert found.notes == ()


@pytest.mark.parametrize("wrapped", ["model", "base"])
def test_one_prefix(tmp_path, wrapped):
    plain = {"layers__0__weight": (2, 3), "layers__1__weight": (3, 2)}
    longer = {f"vit__{name}": shape for name, shape in plain.items()} | {"classifier__weight": (4, 2)}
    base = model(tmp_path / "b.safetensors", **(plain if wrapped == "model" else longer))
    tuned = model(tmp_path / "t.safetensors", **(longer if wrapped == "model" else plain))
    found = align(base, tuned)
    pairs = {"layers.0.weight": "vit.layers.0.weight", "layers.1.weight": "vit.layers.1.weight"}
    assert found.names == (pairs if wrapped == "model" else {v: k for k, v in pairs.items()})
    assert len(found.notes) == 1
    assert "vit." in found.notes[0]


def test_another_model(tmp_path):
    base = model(tmp_path / "b.safetensors", a=(2,), b=(2,), c=(2,))
    tuned = model(tmp_path / "t.safetensors", a=(2,), x=(2,))
    with pytest.raises(LoraforgeError, match="1 of 3 tensors"):
        align(base, tuned)
