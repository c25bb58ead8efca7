"""Full models on disk: folders, shards, single files; what is wrong with them is said before any tensor is read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from loraforge.checkpoints import looks_like_checkpoint, open_checkpoint
from loraforge.errors import InputProblems, LoraforgeError

TENSORS = {
    "layers.10.weight": torch.arange(6.0).reshape(2, 3),
    "layers.2.weight": torch.ones(2, 2, dtype=torch.bfloat16),
    "steps": torch.tensor(7),
}


def shards(folder, table=None, **files):
    folder.mkdir()
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    weight_map = table or {key: f"{name}.safetensors" for name, tensors in files.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def same(checkpoint):
    assert checkpoint.names == ("layers.2.weight", "layers.10.weight", "steps")
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
    assert checkpoint.is_float("layers.2.weight")
    assert not checkpoint.is_float("steps")


def test_a_whole_folder(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "optimizer.pt").write_bytes(b"")
    found = open_checkpoint(tmp_path)
    same(found)
    assert found.config == {"model_type": "x"}
    assert [file.name for file in found.config_files] == ["config.json", "tokenizer.json"]
    assert found.sha256 == found.sha256s["model.safetensors"]


def test_shards(tmp_path):
    one, two = {"layers.10.weight": TENSORS["layers.10.weight"]}, dict(TENSORS)
    del two["layers.10.weight"]
    found = open_checkpoint(shards(tmp_path / "m", one=one, two=two))
    same(found)
    assert set(found.sha256s) == {"one.safetensors", "two.safetensors"}
    assert found.sha256 not in found.sha256s.values()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".pth"])
def test_single_files(tmp_path, suffix):
    path = tmp_path / f"vit{suffix}"
    if suffix == ".safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path)
    found = open_checkpoint(path)
    same(found)
    assert found.folder is None
    assert found.name == "vit"
    assert found.config_files == []


@pytest.mark.parametrize("old", [False, True])
def test_nested_and_wrapped_state_dicts(tmp_path, old):
    content = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in TENSORS.items()}}
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=not old)
    same(open_checkpoint(tmp_path / "m.pt"))


def test_folder_with_bin(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    same(open_checkpoint(tmp_path))


def test_missing_shard_and_absent_tensors_are_shown_together(tmp_path):
    table = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    folder = shards(tmp_path / "m", table, one={"a": torch.ones(1)})
    with pytest.raises(InputProblems) as caught:
        open_checkpoint(folder)
    text = str(caught.value)
    assert "two.safetensors" in text
    assert "b (one.safetensors)" in text


def test_index_with_a_path(tmp_path):
    folder = shards(tmp_path / "m", {"a": "../one.safetensors"}, one={"a": torch.ones(1)})
    with pytest.raises(LoraforgeError, match="outside its folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", ["no json", "[]", '{"weight_map": 3}'])
def test_broken_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(LoraforgeError, match="index"):
        open_checkpoint(tmp_path)


def test_broken_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x20" + b"\0" * 30)
    with pytest.raises(LoraforgeError, match="damaged"):
        open_checkpoint(tmp_path)
    (tmp_path / "m.pt").write_bytes(b"garbage")
    with pytest.raises(LoraforgeError, match="damaged|code"):
        open_checkpoint(tmp_path / "m.pt")


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_no_code_runs(tmp_path, capsys):
    torch.save({"a": Evil()}, tmp_path / "m.pt")
    with pytest.raises(LoraforgeError, match="code"):
        open_checkpoint(tmp_path / "m.pt")
    assert "ran" not in capsys.readouterr().out


def test_not_tensors(tmp_path):
    torch.save({"a": torch.ones(1), "lr": 0.1}, tmp_path / "m.pt")
    with pytest.raises(LoraforgeError, match="lr"):
        open_checkpoint(tmp_path / "m.pt")


def test_nothing_there(tmp_path):
    with pytest.raises(LoraforgeError, match="no such model"):
        open_checkpoint(tmp_path / "absent" / "model")
    with pytest.raises(LoraforgeError, match="no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LoraforgeError, match="adapter, not a full model"):
        open_checkpoint(tmp_path)


def test_nan_is_named(tmp_path):
    save_file({"w": torch.tensor([1.0, float("nan")])}, tmp_path / "model.safetensors")
    with pytest.raises(LoraforgeError, match=r"model\.safetensors: w"):
        open_checkpoint(tmp_path).read_finite("w")


def test_looks_like_checkpoint(tmp_path):
    model, adapter, other = tmp_path / "model", tmp_path / "adapter", tmp_path / "other"
    for folder in (model, adapter, other):
        folder.mkdir()
    save_file(TENSORS, model / "model.safetensors")
    save_file({"base_model.model.q.lora_A.weight": torch.ones(1, 2)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text("{}")
    assert looks_like_checkpoint(model)
    assert looks_like_checkpoint(model / "model.safetensors")
    assert not looks_like_checkpoint(adapter)
    assert not looks_like_checkpoint(adapter / "adapter_model.safetensors")
    assert not looks_like_checkpoint(other)
    assert not looks_like_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize(
    "key", ["unet.to_q.lora.{}.weight", "unet.to_q_lora.{}.weight", "lora_unet_to_q.lora_{}.weight"]
)
def test_a_file_of_factors_is_no_model(tmp_path, key):
    file = tmp_path / "adapter.safetensors"
    save_file({key.format("down"): torch.ones(2, 4), key.format("up"): torch.ones(4, 2)}, file)
    assert not looks_like_checkpoint(file)


def test_a_file_without_tensors(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(LoraforgeError, match="no tensors"):
        open_checkpoint(tmp_path / "empty.safetensors")


def test_indices_are_not_copied(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    for name in ("pytorch_model.bin.index.json", "model.fp16.safetensors.index.json", "merges.txt"):
        (tmp_path / name).write_text("{}")
    assert [file.name for file in open_checkpoint(tmp_path).config_files] == ["merges.txt"]


def test_a_pickle_is_mapped_anew_only_after_many_bytes(tmp_path, monkeypatch):
    """Every mapping reads all names: one for each tensor would take time with the square of their number."""
    torch.save({f"{i}.weight": torch.full((4,), float(i)) for i in range(8)}, tmp_path / "m.bin")
    loads = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: loads.append(1) or load(*args, **kwargs))
    monkeypatch.setattr("loraforge.checkpoints.shards.REMAP_BYTES", 64)
    found = open_checkpoint(tmp_path / "m.bin")
    assert [float(found.read(name)[0]) for name in found.names] == list(range(8))
    assert len(loads) == 3


@pytest.mark.parametrize(
    "tensor", [torch.eye(3).to_sparse(), torch.ones(1).expand(1000, 1000), torch.empty(3, device="meta")]
)
def test_pickled_tensors_without_plain_numbers(tmp_path, tensor):
    torch.save({"w": tensor}, tmp_path / "m.bin")
    with pytest.raises(LoraforgeError, match="damaged"):
        open_checkpoint(tmp_path / "m.bin")
