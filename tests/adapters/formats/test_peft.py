"""Every kind of PEFT module against PEFT's own update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from loraforge.adapters import check_compatible, check_dora, open_adapter
from loraforge.errors import InputProblems, LoraforgeError

from ..folders import simple
from .tiny import adapted, deltas

ALL = ["emb", "linear", "conv1", "conv2", "point", "conv3"]
# One float32 product of rank 4: both sides round once or twice.
TOLERANCE = 1e-6


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"rank_pattern": {"conv2": 3}, "alpha_pattern": {"emb": 5}}]
)
def test_every_kind_of_module(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = adapted(tmp_path / "a", LoraConfig(r=4, lora_alpha=6, target_modules=ALL, **fields))
    adapter = open_adapter(tmp_path / "a")
    kinds = {"emb": "embedding", "linear": "linear"}
    seen = []
    for name, expected in deltas(model):
        info, delta = adapter.info(name), adapter.load(name).delta()
        wanted = expected.T if info.kind == "embedding" else expected.flatten(1)
        assert (delta - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), name
        assert delta.shape == (info.m, info.n) and info.kind == kinds.get(name, "conv")
        if info.kind == "conv":
            assert info.kernel == tuple(expected.shape[2:]) and info.in_channels == expected.shape[1]
        seen.append(name)
    assert sorted(seen) == sorted(ALL) == sorted(adapter.modules) and adapter.format == "peft"


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="groups"):
        adapted(tmp_path / "a", LoraConfig(r=4, target_modules=["grouped"]))
    with pytest.raises(LoraforgeError, match="grouped convolution") as caught:
        open_adapter(tmp_path / "a")
    assert "grouped.lora_A.weight" in str(caught.value) and "2 groups" in str(caught.value)


# PEFT takes its own bias for an empty factor.
@pytest.mark.filterwarnings("ignore:.*have invalid shape")
def test_lora_bias(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["linear", "conv2"], lora_bias=True)
    model = adapted(tmp_path / "a", config)
    adapter = open_adapter(tmp_path / "a")
    layer = model.base_model.model.linear
    assert adapter.info("linear").has_bias and not adapter.extras
    bias = adapter.bias("linear")
    assert bias is not None and torch.equal(bias, layer.lora_B["default"].bias)
    base = layer.base_layer.bias.detach().clone()
    layer.merge()
    # PEFT adds scaling * bias to the base layer's.
    assert torch.allclose(layer.base_layer.bias, base + adapter.info("linear").scaling * bias, atol=1e-6)
    assert open_adapter(simple(tmp_path / "plain")).bias("layers.2.q") is None


def test_dora_magnitudes(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["linear", "conv2", "emb"], use_dora=True)
    model = adapted(tmp_path / "a", config)
    adapter = open_adapter(tmp_path / "a")
    assert adapter.has_dora and adapter.info("conv2").has_magnitude
    for name in ("linear", "conv2"):
        layer = model.base_model.model.get_submodule(name)
        weight = layer.base_layer.weight.detach().clone().flatten(1)
        magnitude, delta = adapter.magnitude(name), adapter.load(name).delta()
        assert magnitude is not None and magnitude.shape == (weight.shape[0],)
        layer.merge()
        total = weight + delta
        merged = magnitude[:, None] / total.norm(dim=1, keepdim=True) * total
        assert torch.allclose(layer.base_layer.weight.flatten(1), merged, atol=1e-6), name
    assert adapter.magnitude("emb").shape == (6,)


def test_dora_needs_the_base(tmp_path: Path) -> None:
    magnitudes = {f"layers.{i}.q.lora_magnitude_vector": torch.ones(6) for i in (2, 10)}
    dora = open_adapter(simple(tmp_path / "dora", extra=magnitudes, use_dora=True))
    plain = open_adapter(simple(tmp_path / "plain"))
    assert dora.has_dora and not plain.has_dora and plain.magnitude("layers.2.q") is None
    check_dora([plain], None)
    check_dora([plain, dora], "base")
    with pytest.raises(LoraforgeError, match="Adapter dora is a DoRA") as caught:
        check_dora([plain, dora], None)
    message = str(caught.value)
    assert "layers.2.q.lora_magnitude_vector" in message and "--base" in message and "2 of 2" in message


def test_dora_without_all_magnitudes(tmp_path: Path) -> None:
    extra = {"layers.2.q.lora_magnitude_vector": torch.ones(6)}
    with pytest.raises(LoraforgeError, match="no magnitude") as caught:
        open_adapter(simple(tmp_path / "a", extra=extra, use_dora=True))
    assert "layers.10.q" in str(caught.value)
    short = {f"layers.{i}.q.lora_magnitude_vector": torch.ones(5) for i in (2, 10)}
    with pytest.raises(LoraforgeError, match="DoRA magnitude of a module does not fit"):
        open_adapter(simple(tmp_path / "b", extra=short, use_dora=True))


def test_nan_in_bias_and_magnitude(tmp_path: Path) -> None:
    extra = {"layers.2.q.lora_B.bias": torch.full((6,), torch.nan)}
    adapter = open_adapter(simple(tmp_path / "a", extra=extra, lora_bias=True))
    with pytest.raises(LoraforgeError, match="NaN or Inf"):
        adapter.bias("layers.2.q")
    adapter.load("layers.2.q")


def test_bits_without_factors(tmp_path: Path) -> None:
    with pytest.raises(InputProblems) as caught:
        open_adapter(
            simple(
                tmp_path / "a",
                extra={
                    "x.lora_B.bias": torch.ones(6),
                    "y.lora_embedding_A": torch.ones(4, 9),
                    "z.hada_w1_a": torch.ones(4, 9),
                },
            )
        )
    message = str(caught.value)
    assert "'x' has no LoRA factors" in message and "lora_embedding_A but no lora_embedding_B" in message


def test_kinds_and_kernels_must_agree(tmp_path: Path) -> None:
    def conv(name: str, kernel: tuple[int, ...]) -> Any:
        factors = {"c.lora_A.weight": torch.ones(4, 3, *kernel), "c.lora_B.weight": torch.ones(6, 4, 1, 1)}
        return open_adapter(simple(tmp_path / name, extra=factors))

    linear = {"c.lora_A.weight": torch.ones(4, 12), "c.lora_B.weight": torch.ones(6, 4)}
    a, b, c = conv("a", (2, 2)), conv("b", (4, 1)), open_adapter(simple(tmp_path / "c", extra=linear))
    check_compatible([a, a])
    with pytest.raises(LoraforgeError, match="'c' has different kernels"):
        check_compatible([a, b], force=True)
    with pytest.raises(LoraforgeError, match="'c' has different kinds"):
        check_compatible([a, c], force=True)
