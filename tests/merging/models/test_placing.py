"""Modules of an adapter in a base's tensors: prefixes, flattened names, orientation; doubt is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from loraforge.adapters.formats.parts import ModuleInfo
from loraforge.checkpoints import open_checkpoint
from loraforge.errors import LoraforgeError
from loraforge.merging.models.placing import find_places, match_names
from loraforge.merging.models.skeleton import Skeleton


def info(m, n, **more):
    return ModuleInfo(2, 1.0, m, n, torch.float32, **more)


def base(path, **shapes):
    save_file({name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}, path / "b.safetensors")
    return open_checkpoint(path / "b.safetensors")


def test_match_names():
    known = ["encoder.0.q.weight", "decoder.0.q.weight", "head.weight", "wte.weight"]
    found = match_names(["bert.encoder.0.q.weight", "0.q.weight", "head.weight", "other.weight"], known)
    assert found == {
        "bert.encoder.0.q.weight": ["encoder.0.q.weight"],
        "0.q.weight": ["decoder.0.q.weight", "encoder.0.q.weight"],
        "head.weight": ["head.weight"],
        "other.weight": [],
    }


def test_the_prefix_that_fits_all_decides():
    known = ["a.x.q.weight", "b.x.q.weight", "a.x.v.weight"]
    assert match_names(["x.q.weight", "x.v.weight"], known)["x.q.weight"] == ["a.x.q.weight"]


def test_flat_names(tmp_path):
    model = base(tmp_path, down_blocks__0__attn__to_q__weight=(4, 3), mid_block__conv__weight=(4, 2, 3, 3))
    modules = {"lora_unet_down_blocks_0_attn_to_q": info(4, 3), "lora_unet_mid_block_conv": info(4, 18, kind="conv")}
    places = find_places(modules, model, None)
    assert places["lora_unet_down_blocks_0_attn_to_q"].tensor == "down_blocks.0.attn.to_q.weight"
    assert places["lora_unet_mid_block_conv"].view(torch.zeros(4, 2, 3, 3), 4, 18).shape == (4, 18)


def test_orientation(tmp_path):
    model = base(tmp_path, wide__weight=(3, 4), square__weight=(4, 4), table__weight=(9, 4), experts=(2, 4, 3))
    modules = {
        "wide": info(4, 3, fan_in_fan_out=True),
        "square": info(4, 4, fan_in_fan_out=True),
        "table": info(4, 9, kind="embedding"),
        "experts.1": info(3, 4, kind="expert", parameter="experts", index=1),
    }
    places = find_places(modules, model, None)
    assert all(place.transposed for place in places.values())
    assert places["experts.1"].index == 1
    # The model's own class knows better than the adapter's configuration.
    plain = Skeleton(frozenset(), frozenset(), {}, {}, True)
    assert not find_places(modules, model, plain)["square"].transposed
    weight = torch.zeros(3, 4)
    places["wide"].view(weight, 4, 3)[3, 1] = 1.0
    assert weight[1, 3] == 1.0


def test_refusals(tmp_path):
    model = base(tmp_path, a__q__weight=(4, 3), b__q__weight=(4, 3), head__weight=(2, 2))
    with pytest.raises(LoraforgeError, match=r"a\.q\.weight, b\.q\.weight"):
        find_places({"q": info(4, 3)}, model, None)
    with pytest.raises(LoraforgeError, match="close names: head"):
        find_places({"heads": info(4, 3)}, model, None)
    with pytest.raises(LoraforgeError, match="different shapes"):
        find_places({"head": info(4, 3)}, model, None)
    with pytest.raises(LoraforgeError, match="one tensor"):
        find_places({"a.q": info(4, 3), "x.a.q": info(4, 3)}, model, None)
