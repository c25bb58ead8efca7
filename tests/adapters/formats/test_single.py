"""Single files: every spelling, alphas, Tucker convolutions, magnitudes, refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loraforge.adapters import check_compatible, open_adapter
from loraforge.errors import InputProblems, LoraforgeError

A, B = torch.randn(3, 5), torch.randn(7, 3)
UNET, KOHYA = "unet.down_blocks.0.attn1.to_q", "lora_unet_down_blocks_0_attn1_to_q"


def save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path, metadata)
    return path


ROLE = "unet.x.attn1.processor.to_q_lora"
OUT, TEXT = "unet.x.processor.to_out_lora", "text_encoder.h.self_attn.to_out_lora"
MODEL = "model.layers.0.q_proj"


@pytest.mark.parametrize(
    ("down", "up", "module", "kind"),
    [
        (f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight", KOHYA, "kohya"),
        (f"{KOHYA}_lora_down.weight", f"{KOHYA}_lora_up.weight", KOHYA, "kohya"),
        (f"{UNET}.lora.down.weight", f"{UNET}.lora.up.weight", UNET, "diffusers"),
        (f"{UNET}_lora.down.weight", f"{UNET}_lora.up.weight", UNET, "diffusers"),
        (f"{UNET}.lora_linear_layer.down.weight", f"{UNET}.lora_linear_layer.up.weight", UNET, "diffusers"),
        (f"{UNET}.lora_A.weight", f"{UNET}.lora_B.weight", UNET, "diffusers"),
        (f"{UNET}.lora_A", f"{UNET}.lora_B", UNET, "diffusers"),
        (f"{UNET}.lora_A.default.weight", f"{UNET}.lora_B.default.weight", UNET, "diffusers"),
        (f"{ROLE}.down.weight", f"{ROLE}.up.weight", "unet.x.attn1.to_q", "diffusers"),
        (f"{OUT}.down.weight", f"{OUT}.up.weight", "unet.x.to_out.0", "diffusers"),
        (f"{TEXT}.down.weight", f"{TEXT}.up.weight", "text_encoder.h.self_attn.out_proj", "diffusers"),
        (f"{MODEL}.lora_A.weight", f"{MODEL}.lora_B.weight", MODEL, "peft"),
        ("base_model.model.q.lora_A.default.weight", "base_model.model.q.lora_B.default.weight", "q", "peft"),
    ],
)
def test_spellings(tmp_path: Path, down: str, up: str, module: str, kind: str) -> None:
    adapter = open_adapter(save(tmp_path / "x.safetensors", {down: A, up: B}, {"ss_network_dim": "3"}))
    assert adapter.modules == (module,) and adapter.format == kind
    loaded = adapter.load(module)
    assert torch.equal(loaded.A, A) and torch.equal(loaded.B, B) and loaded.scaling == 1.0
    assert adapter.metadata == {"ss_network_dim": "3"} and "alpha = r" in adapter.notes[0]
    assert (adapter.config, adapter.base, adapter.task_type, adapter.name) == ({}, None, None, "x")


@pytest.mark.parametrize(
    ("alpha", "scaling"),
    [
        (torch.tensor(6.0), 2.0),
        (torch.tensor([1.5]), 0.5),
        (torch.tensor(6, dtype=torch.int64), 2.0),
        (torch.tensor(6.0, dtype=torch.bfloat16), 2.0),
        (torch.tensor(0.0), 1.0),
    ],
)
def test_alpha(tmp_path: Path, alpha: Tensor, scaling: float) -> None:
    tensors = {f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B, f"{KOHYA}.alpha": alpha}
    adapter = open_adapter(save(tmp_path / "x.safetensors", tensors))
    assert adapter.info(KOHYA).scaling == scaling
    assert bool(adapter.notes) == (float(alpha) == 0) and (not adapter.notes or "1 of 1 modules" in adapter.notes[0])


@pytest.mark.parametrize("alpha", [torch.tensor(float("nan")), torch.ones(2), torch.ones(0)])
def test_bad_alpha(tmp_path: Path, alpha: Tensor) -> None:
    tensors = {f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B, f"{KOHYA}.alpha": alpha}
    with pytest.raises(LoraforgeError, match="alpha of module") as caught:
        open_adapter(save(tmp_path / "x.safetensors", tensors))
    assert f"{KOHYA}.alpha" in str(caught.value)


def test_a_folder_with_one_file_and_a_bin(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    file = save(folder / "2100-lora.safetensors", {f"{UNET}.lora.down.weight": A, f"{UNET}.lora.up.weight": B})
    assert open_adapter(folder).name == "mine" and open_adapter(file).name == "2100-lora"
    file.rename(folder / "pytorch_lora_weights.safetensors")
    assert open_adapter(folder / "pytorch_lora_weights.safetensors").name == "mine"
    torch.save({f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B}, tmp_path / "y.pt")
    loaded = open_adapter(tmp_path / "y.pt")
    assert torch.equal(loaded.load(KOHYA).A, A) and loaded.metadata == {}


def test_convolutions(tmp_path: Path) -> None:
    down, up = torch.randn(4, 3, 3, 3), torch.randn(6, 4, 1, 1)
    adapter = open_adapter(
        save(tmp_path / "x.safetensors", {"lora_unet_c.lora_down.weight": down, "lora_unet_c.lora_up.weight": up})
    )
    info = adapter.info("lora_unet_c")
    assert (info.kind, info.kernel, info.in_channels, info.n, info.rank) == ("conv", (3, 3), 3, 27, 4)
    # Two convolutions one after the other are one with the product of their weights.
    x = torch.randn(1, 3, 5, 5)
    weight = adapter.load("lora_unet_c").delta().reshape(6, 3, 3, 3)
    expected = torch.conv2d(torch.conv2d(x, down), up)
    assert torch.allclose(torch.conv2d(x, weight), expected, atol=1e-4)


def test_tucker_convolutions_are_folded(tmp_path: Path) -> None:
    down, mid, up = torch.randn(4, 3, 1, 1), torch.randn(4, 4, 3, 2), torch.randn(6, 4, 1, 1)
    names = {"lora_down": down, "lora_mid": mid, "lora_up": up}
    tensors = {f"lora_unet_c.{name}.weight": value for name, value in names.items()}
    adapter = open_adapter(save(tmp_path / "x.safetensors", {**tensors, "lora_unet_c.alpha": torch.tensor(8.0)}))
    info = adapter.info("lora_unet_c")
    assert (info.kind, info.kernel, info.in_channels, info.scaling) == ("conv", (3, 2), 3, 2.0)
    x = torch.randn(1, 3, 6, 6)
    weight = adapter.load("lora_unet_c").delta().reshape(6, 3, 3, 2)
    expected = 2 * torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid), up)
    assert torch.allclose(torch.conv2d(x, weight), expected, atol=1e-3)
    tensors["lora_unet_c.lora_mid.weight"] = torch.randn(5, 4, 3, 2)
    with pytest.raises(LoraforgeError, match="factors of a convolution"):
        open_adapter(save(tmp_path / "y.safetensors", tensors))


def test_magnitudes_are_of_the_outputs(tmp_path: Path) -> None:
    tensors = {f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B}
    scale = torch.rand(7, 1)
    adapter = open_adapter(save(tmp_path / "x.safetensors", {**tensors, f"{KOHYA}.dora_scale": scale}))
    assert adapter.has_dora and torch.equal(adapter.magnitude(KOHYA), scale.flatten())
    for wrong in (torch.rand(1, 5), torch.rand(1, 7)):
        with pytest.raises(LoraforgeError, match="DoRA magnitude of a module does not fit"):
            open_adapter(save(tmp_path / "y.safetensors", {**tensors, f"{KOHYA}.dora_scale": wrong}))


def test_the_configuration_in_the_metadata(tmp_path: Path) -> None:
    te = "text_encoder.h.q_proj"
    tensors = {f"{name}.lora_{side}.weight": value for name in (UNET, te) for side, value in (("A", A), ("B", B))}
    stated = {
        "unet.r": 3,
        "unet.lora_alpha": 6,
        "text_encoder.r": 3,
        "text_encoder.lora_alpha": 1,
        "text_encoder.alpha_pattern": {"q_proj": 12},
    }
    path = save(tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": json.dumps(stated)})
    adapter = open_adapter(path)
    assert (adapter.info(UNET).scaling, adapter.info(te).scaling, adapter.notes) == (2.0, 4.0, ())
    dora = {**stated, "unet.use_dora": True}
    with pytest.raises(LoraforgeError, match="no magnitude") as caught:
        open_adapter(save(tmp_path / "z.safetensors", tensors, {"lora_adapter_metadata": json.dumps(dora)}))
    assert UNET in str(caught.value) and te not in str(caught.value)
    for text in ("{", "[1]"):
        with pytest.raises(LoraforgeError, match="configuration in the file's metadata"):
            open_adapter(save(tmp_path / "y.safetensors", tensors, {"lora_adapter_metadata": text}))


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (f"{KOHYA}.diff", "whole weight differences"),
        (f"{KOHYA}.diff_b", "whole weight differences"),
        (f"{KOHYA}.w_norm", "normalisation"),
        (f"{KOHYA}.a1.weight", "GLoRA"),
        (f"{KOHYA}.oft_blocks", "OFT"),
        (f"{KOHYA}.vera_lambda_b", "VeRA"),
        (f"{KOHYA}.reshape_weight", "reshape"),
    ],
)
def test_other_families_are_refused_by_name(tmp_path: Path, key: str, what: str) -> None:
    tensors = {f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B, key: torch.ones(7)}
    path = save(tmp_path / "x.safetensors", tensors)
    for ignore in (False, True):
        with pytest.raises(LoraforgeError, match=what) as caught:
            open_adapter(path, ignore_unknown=ignore)
        assert repr(key) in str(caught.value)


def test_leftovers_are_listed_or_passed_over(tmp_path: Path) -> None:
    tensors = {f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B}
    odd = {"lora_unet_other.alpha": torch.tensor(1.0), "bias_terms.3": torch.ones(2)}
    path = save(tmp_path / "x.safetensors", {**tensors, **odd})
    with pytest.raises(LoraforgeError) as caught:
        open_adapter(path)
    assert all(repr(key) in str(caught.value) for key in odd) and "--ignore-unknown" in str(caught.value)
    adapter = open_adapter(path, ignore_unknown=True)
    assert adapter.modules == (KOHYA,) and "bias_terms.3" in adapter.notes[-1]


def test_everything_wrong_comes_together(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_a.lora_down.weight": A,
        "lora_unet_b.lora_down.weight": A,
        "lora_unet_b.lora_up.weight": torch.randn(7, 4),
        "lora_unet_c.lora_down.weight": A.to(torch.int8),
        "lora_unet_c.lora_up.weight": B,
        "lora_unet_d.lora_down.weight": A,
        "lora_unet_d_lora_down.weight": A,
        "lora_unet_d.lora_up.weight": B,
        "lora_unet_e.lora_up.weight": B,
        "lora_unet_e.lora_down.weight": A,
        "lora_unet_e.lora_embedding_A": A,
        "lora_unet_e.lora_embedding_B": B,
    }
    with pytest.raises(InputProblems) as caught:
        open_adapter(save(tmp_path / "x.safetensors", tensors))
    message = str(caught.value)
    for part in ("'lora_unet_a' has lora_A but no lora_B", "do not fit", "unsupported dtype", "two names", "mixes"):
        assert part in message


def test_base_versions_must_agree(tmp_path: Path) -> None:
    tensors = {f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B}
    one, two = (
        open_adapter(save(tmp_path / f"{v}.safetensors", tensors, {"ss_base_model_version": v})) for v in ("v1", "v2")
    )
    with pytest.raises(LoraforgeError, match="different base versions"):
        check_compatible([one, two])
    assert "v1: v1, v2: v2" in check_compatible([one, two], force=True)[0]


def test_real_files_under_two_naming_schemes(data_dir: Path) -> None:
    one = open_adapter(data_dir / "adapters" / "sd15-2100-diffusers")
    two = open_adapter(data_dir / "adapters" / "sd15-2100-kohya-noalpha")
    assert (one.format, two.format) == ("diffusers", "kohya")
    for adapter in (one, two):
        assert len(adapter.modules) == 128 and "128 of 128" in adapter.notes[0]
        info = adapter.info(adapter.modules[0])
        assert (info.rank, info.scaling, info.kind) == (4, 1.0, "linear")
