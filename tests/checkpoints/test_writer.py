"""Model folders: every tensor in its place, whatever the order of writing and the number of shards."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loraforge.checkpoints import ModelWriter, copy_config, dtype_change, open_checkpoint
from loraforge.errors import LoraforgeError

TENSORS = {
    "flag": torch.tensor([True, False, True]),
    "a.weight": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "b.weight": torch.ones(3, dtype=torch.float16),
    "c.weight": torch.arange(4, dtype=torch.float64).reshape(2, 2),
    "empty": torch.zeros(0, 4),
    "steps": torch.tensor(3),
}
LAYOUT = {name: (tuple(t.shape), t.dtype) for name, t in TENSORS.items()}


@pytest.mark.parametrize("shard_bytes", [1, 64, 10**6])
def test_round_trip(tmp_path, shard_bytes):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, order in zip(folders, (list(TENSORS), list(reversed(TENSORS))), strict=True):
        with ModelWriter(folder, LAYOUT, shard_bytes) as writer:
            for name in order:
                writer.write(name, TENSORS[name])
            report = writer.finish()
    assert report.parameters == sum(t.numel() for t in TENSORS.values())
    found = open_checkpoint(folders[0])
    for name, tensor in TENSORS.items():
        assert torch.equal(found.read(name), tensor)
    for file in report.files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()
        with safe_open(folders[0] / file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
    sizes = [sum(found.numel(n) * found.dtype(n).itemsize for n in names) for names in _shards(folders[0])]
    assert all(size <= shard_bytes or len(names) == 1 for size, names in zip(sizes, _shards(folders[0]), strict=True))


def _shards(folder):
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [list(TENSORS)]
    content = json.loads(index.read_text())
    assert content["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in TENSORS.values())
    table = content["weight_map"]
    return [[n for n, f in table.items() if f == file] for file in sorted(set(table.values()))]


def test_a_cast_on_the_way(tmp_path):
    with ModelWriter(tmp_path, {"w": ((2,), torch.bfloat16)}) as writer:
        writer.write("w", torch.tensor([1.0, 2.0]))
        writer.finish()
    assert open_checkpoint(tmp_path).read("w").dtype == torch.bfloat16


def test_refusals(tmp_path):
    with ModelWriter(tmp_path, LAYOUT) as writer:
        with pytest.raises(LoraforgeError, match="another shape"):
            writer.write("flag", torch.zeros(2))
        with pytest.raises(LoraforgeError, match="Not every tensor"):
            writer.finish()
    with pytest.raises(LoraforgeError, match="shard size"):
        ModelWriter(tmp_path, LAYOUT, 0)
    with pytest.raises(LoraforgeError, match="dtype"):
        ModelWriter(tmp_path, {"z": ((1,), torch.complex64)})


def test_configuration_is_copied_and_changed(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    save_file({"w": torch.zeros(1)}, base / "model.safetensors")
    (base / "config.json").write_text('{"torch_dtype": "float32", "hidden": 3}')
    (base / "merges.txt").write_text("a b")
    out = tmp_path / "out"
    out.mkdir()
    opened = open_checkpoint(base)
    copy_config(opened, out, dtype_change(opened, torch.bfloat16) | {"tie": False})
    assert json.loads((out / "config.json").read_text()) == {"torch_dtype": "bfloat16", "hidden": 3, "tie": False}
    assert (out / "merges.txt").read_text() == "a b"
    assert not (out / "model.safetensors").exists()
    copy_config(opened, out, dtype_change(opened, None))
    assert (out / "config.json").read_text() == (base / "config.json").read_text()


def test_no_file_is_left_open_or_made_for_a_dtype_it_cannot_hold(tmp_path):
    layout = {"a": ((2,), torch.float32), "b": ((2,), torch.complex64)}
    with pytest.raises(LoraforgeError, match="cannot hold this dtype"):
        ModelWriter(tmp_path / "out", layout, 1)
    assert not (tmp_path / "out").exists()
