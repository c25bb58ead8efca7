"""Stacks of experts (target_parameters) against PEFT's own update."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from loraforge.adapters import check_compatible, open_adapter
from loraforge.errors import LoraforgeError

from ..folders import simple
from .tiny import adapted

BOTH = ["experts.gate_up", "experts.down"]


def moe(path: Path, seed: int = 1, targets: list[str] | None = None, **fields: object):
    config = LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=targets or BOTH, **fields)
    return adapted(path, config, seed)


# PEFT looks for the patterns among modules only, and uses them for parameters all the same.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_each_expert_is_peft_s(tmp_path: Path) -> None:
    model = moe(tmp_path / "a", rank_pattern={"experts.down": 4}, alpha_pattern={"layers.1.experts.gate_up": 3})
    adapter = open_adapter(tmp_path / "a")
    assert len(adapter.modules) == 2 * 2 * 3
    for layer in range(2):
        wrapper = model.base_model.model.get_submodule(f"layers.{layer}.experts")
        # The first registered parameter is the innermost wrapper.
        for module, parameter in ((wrapper.base_layer, "gate_up"), (wrapper, "down")):
            assert module.parameter_name == parameter
            expected = module.get_delta_weight("default").detach()
            for index in range(3):
                name = f"layers.{layer}.experts.{parameter}.{index}"
                info, delta = adapter.info(name), adapter.load(name).delta()
                assert torch.allclose(delta, expected[index], atol=1e-6), name
                assert (info.kind, info.index, info.rank) == ("expert", index, 4 if parameter == "down" else 2)
                assert info.group == f"layers.{layer}.experts" + (".base_layer" if parameter == "gate_up" else "")
                assert info.parameter == f"layers.{layer}.experts.{parameter}"


def test_one_parameter(tmp_path: Path) -> None:
    model = moe(tmp_path / "a", targets=["layers.0.experts.down"])
    adapter = open_adapter(tmp_path / "a")
    assert adapter.modules == tuple(f"layers.0.experts.down.{i}" for i in range(3))
    expected = model.base_model.model.layers[0]["experts"].get_delta_weight("default").detach()
    assert torch.allclose(adapter.load("layers.0.experts.down.2").delta(), expected[2], atol=1e-6)


def test_the_order_must_be_the_same(tmp_path: Path) -> None:
    moe(tmp_path / "a")
    moe(tmp_path / "b", 2)
    moe(tmp_path / "c", 3, targets=BOTH[::-1])
    a, b, c = (open_adapter(tmp_path / name) for name in "abc")
    assert check_compatible([a, b]) == []
    with pytest.raises(LoraforgeError) as caught:
        check_compatible([a, c], force=True)
    assert "different orders" in str(caught.value)


def stack(experts: int, rank: int = 2) -> dict[str, torch.Tensor]:
    return {
        "moe.experts.lora_A.weight": torch.ones(experts * rank, 5),
        "moe.experts.lora_B.weight": torch.ones(6, experts * rank),
    }


def test_stacks_that_do_not_fit(tmp_path: Path) -> None:
    fields = {"r": 2, "target_parameters": ["experts.down"]}
    small = {"layers.2.q": (6, 2, 5)}
    a = open_adapter(simple(tmp_path / "a", extra=stack(3), modules=small, **fields))
    b = open_adapter(simple(tmp_path / "b", extra=stack(4), modules=small, **fields))
    assert [a.info(m).kind for m in a.modules].count("expert") == 3 and "layers.2.q" in a.modules
    with pytest.raises(LoraforgeError, match="different numbers of experts"):
        check_compatible([a, b])
    for name, changes, part in (
        ("odd", {"r": 2, "rank_pattern": {"experts.down": 4}}, "stacked factors"),
        ("two", {"r": 2, "target_parameters": ["experts.down", "experts.up"]}, "do not pair off"),
    ):
        with pytest.raises(LoraforgeError, match=part):
            open_adapter(simple(tmp_path / name, extra=stack(3), modules=small, **{**fields, **changes}))
    nested = {key.replace("experts", "experts.base_layer"): value for key, value in stack(3).items()}
    with pytest.raises(LoraforgeError, match="do not pair off"):
        open_adapter(simple(tmp_path / "nested", extra={**stack(3), **nested}, modules=small, r=2))
    bias = {"moe.experts.lora_B.bias": torch.ones(6)}
    with pytest.raises(LoraforgeError, match="just lora_A and lora_B"):
        open_adapter(simple(tmp_path / "bias", extra={**stack(3), **bias}, modules=small, **fields))
