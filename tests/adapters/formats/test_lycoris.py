"""LoHa and LoKr as factors, against PEFT's own update and against the definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig
from safetensors.torch import save_file

from loraforge.adapters import open_adapter
from loraforge.adapters.formats import lycoris
from loraforge.errors import LoraforgeError

from .tiny import adapted, deltas

MODULES = ["linear", "conv1", "conv2", "point"]


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("r", [2, 3, 12])
@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
def test_deltas_are_peft_s(tmp_path: Path, kind: Any, r: int, tucker: bool) -> None:
    modules, fields = MODULES, {}
    if kind is LoKrConfig:
        modules = [name for name in MODULES if name != "conv1" or r == 2]
        # PEFT's own product of two decomposed factors fails on Tucker cores.
        fields = {"decompose_both": r == 2 and not tucker}
    config = kind(
        r=r, alpha=5, target_modules=modules, use_effective_conv2d=tucker, alpha_pattern={"conv2": 3}, **fields
    )
    model = adapted(tmp_path / "a", config)
    adapter = open_adapter(tmp_path / "a")
    seen = []
    if kind is LoKrConfig and tucker and r == 2:
        assert any("lokr_t2" in key for key in adapter.keys_of("conv2"))
    for name, expected in deltas(model):
        info, update = adapter.info(name), adapter.load(name)
        wanted = expected.flatten(1)
        # Sums of up to 144 float32 products of four numbers.
        assert (update.delta() - wanted).abs().max() <= 2e-6 * wanted.abs().max(), name
        assert update.rank == info.rank <= min(info.m, info.n) and update.shape == (info.m, info.n)
        if info.kind == "conv":
            # PEFT keeps a Conv1d's core with a second kernel axis of 1.
            assert info.kernel in (tuple(expected.shape[2:]), (*expected.shape[2:], 1))
        seen.append(name)
    assert sorted(seen) == sorted(modules)


def test_peft_s_lokr_on_conv1d_with_a_full_factor_is_refused(tmp_path: Path) -> None:
    adapted(tmp_path / "a", LoKrConfig(r=8, target_modules=["conv1", "linear"]))
    with pytest.raises(LoraforgeError, match="LoKr on the Conv1d 'conv1'"):
        open_adapter(tmp_path / "a")


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({f"lora_unet_x.{key}": value.contiguous() for key, value in tensors.items()}, path)
    return path


def loha(m: int, n: int, r: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"hada_w1_a": (m, r), "hada_w1_b": (r, n), "hada_w2_a": (m, r), "hada_w2_b": (r, n)}
    return {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in shapes.items()}


def test_loha_file(tmp_path: Path) -> None:
    given = loha(20, 30, 3)
    adapter = open_adapter(save(tmp_path / "x.safetensors", {**given, "alpha": torch.tensor(6.0)}))
    info = adapter.info("lora_unet_x")
    assert (info.rank, info.scaling, adapter.format) == (9, 2.0, "kohya")
    wanted = 2.0 * (given["hada_w1_a"] @ given["hada_w1_b"]) * (given["hada_w2_a"] @ given["hada_w2_b"])
    assert torch.allclose(adapter.load("lora_unet_x").delta(), wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


def test_lokr_scale_counts_only_where_a_factor_is_low_rank(tmp_path: Path) -> None:
    w1, w2 = torch.randn(2, 3), torch.randn(5, 4)
    full = save(tmp_path / "full.safetensors", {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(7.0)})
    adapter = open_adapter(full)
    assert adapter.info("lora_unet_x").scaling == 1.0 and adapter.info("lora_unet_x").rank == 2 * 4
    assert torch.allclose(adapter.load("lora_unet_x").delta(), torch.kron(w1, w2), atol=1e-6)
    a, b = torch.randn(5, 2), torch.randn(2, 4)
    low = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(7.0)}
    adapter = open_adapter(save(tmp_path / "low.safetensors", low))
    assert torch.allclose(adapter.load("lora_unet_x").delta(), 3.5 * torch.kron(w1, a @ b), atol=1e-5)


def test_half_precision_is_multiplied_in_float32(tmp_path: Path) -> None:
    given = {key: value.to(torch.bfloat16) for key, value in loha(6, 5, 2).items()}
    update = open_adapter(save(tmp_path / "x.safetensors", given)).load("lora_unet_x")
    exact = {key: value.double() for key, value in given.items()}
    wanted = (exact["hada_w1_a"] @ exact["hada_w1_b"]) * (exact["hada_w2_a"] @ exact["hada_w2_b"])
    assert update.B.dtype == torch.float32 and torch.allclose(update.delta().double(), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"hada_w1_a": None},
        {"hada_w2_b": torch.ones(3, 31)},
        {"hada_w1_b": torch.ones(2, 30)},
        {"hada_t1": torch.ones(3, 3, 2, 2)},
    ],
)
def test_factors_that_do_not_fit(tmp_path: Path, change: dict[str, Any]) -> None:
    given = {key: value for key, value in {**loha(20, 30, 3), **change}.items() if value is not None}
    with pytest.raises(LoraforgeError, match="LoHa factors of module 'lora_unet_x'"):
        open_adapter(save(tmp_path / "x.safetensors", given))


def test_the_rank_has_a_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "x.safetensors", loha(20, 30, 4))
    assert open_adapter(path).info("lora_unet_x").rank == 16
    monkeypatch.setattr(lycoris, "IMPLIED_RANK_CAP", 15)
    with pytest.raises(LoraforgeError, match="too high rank") as caught:
        open_adapter(path)
    assert "implied rank 16" in str(caught.value) and "at most 15" in str(caught.value)
