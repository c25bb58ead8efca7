"""What an adapter leaves alone: layers without factors have lines all the same, with the base or without it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loraforge.measure.updates.update import measure_update, update_from_factors
from tests.adapters.folders import config, factors, write_folder
from tests.measure.update_cases import CASES, write_adapter, write_base


def keep(adapter: Path, *parts: str) -> None:
    """Leaves an adapter the factors of modules whose names have all of these parts."""
    file = adapter / "adapter_model.safetensors"
    tensors = {key: x for key, x in load_file(file).items() if all(part in key for part in parts)}
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("name", ["mha", "gqa", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("layer", [0, 1])
def test_layers_that_an_adapter_leaves_alone(name: str, layer: int, tmp_path: Path) -> None:
    """What is known without the base is what it is with the base."""
    case = CASES[name]
    base = write_base(tmp_path / "base", case)
    adapter = write_adapter(tmp_path / "a", case)
    keep(adapter, f".{layer}.")
    known = update_from_factors(adapter, base=base).lines
    alone = update_from_factors(adapter, config=base)
    columns = ("layer", "head", "stack", "kind", "kv_head", "U", "Uq", "Uk", "Uv", "Uo")
    assert [[line[c] for c in columns] for line in alone.lines] == [[line[c] for c in columns] for line in known]
    assert {line["U"] for line in alone.lines if line["layer"] != layer} == {0.0}
    assert not alone.layout.skipped
    found = measure_update(adapter=adapter, config=base, spectrum=True, out=tmp_path / "out")
    assert len(found["lines"]) == len(known) and {line["layer"] for line in found["spectrum"]["lines"]} == {layer}


def test_one_stack_of_two(tmp_path: Path) -> None:
    """An adapter of a decoder's cross-attention alone: the encoder's heads are there, unchanged."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bart", "is_encoder_decoder": True, "encoder_layers": 3, "decoder_layers": 2,
                    "encoder_attention_heads": 4, "decoder_attention_heads": 2})
    )  # fmt: skip
    tensors = factors({"model.decoder.layers.1.encoder_attn.v_proj": (16, 2, 16)})
    adapter = write_folder(tmp_path / "a", tensors, config(r=2))
    lines = update_from_factors(adapter, config=tmp_path).lines
    found = [(line["stack"], line["kind"], line["layer"], line["head"]) for line in lines if line["head"] < 2]
    encoder = [("enc", "self", layer, head) for layer in range(3) for head in range(2)]
    pairs = [(layer, kind) for layer in range(2) for kind in ("self", "cross")]
    assert found == encoder + [("dec", kind, layer, head) for layer, kind in pairs for head in range(2)]
    assert len(lines) == 3 * 4 + 4 * 2
    assert {(x["kind"], x["layer"]) for x in lines if x["U"]} == {("cross", 1)}


@pytest.mark.parametrize("extra", [{"layer_types": ["full_attention", "linear_attention"]}, {"attn_layer_period": 2}])
def test_layers_that_may_have_no_heads(extra: dict[str, object], tmp_path: Path) -> None:
    """No line for a layer that mixes tokens without softmax heads, or of which nobody knows."""
    case = CASES["mha"]
    adapter = write_adapter(tmp_path / "a", case)
    keep(adapter, ".0.")
    lines = update_from_factors(adapter, config={**case.config, "num_hidden_layers": 2, **extra}).lines
    assert [line["layer"] for line in lines] == [0] * 4


@pytest.mark.parametrize("wrapped", ["", ".base_layer"])
def test_trained_biases(wrapped: str, tmp_path: Path) -> None:
    """PEFT keeps the biases of adapted modules below `base_layer`: they are the base's biases all the same."""
    case = CASES["gqa"]
    names = ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"]
    base = write_base(tmp_path / "base", case, extra={f"{name}.bias": torch.full((16,), 3.0) for name in names})
    trained = {f"{name}{wrapped}.bias": 3.0 + torch.arange(16.0) for name in names}
    adapter = write_adapter(tmp_path / "a", case, bias="lora_only", extra=trained)
    result = update_from_factors(adapter, base=base, bias=True)
    rows = {row["name"]: (row["U"], row["Urel"]) for row in result.other_updates}
    size = float(np.linalg.norm(np.arange(16)))
    assert rows == {f"{name}.bias": (pytest.approx(size), pytest.approx(size / 12)) for name in names}
    for line in result.lines:
        moved = np.linalg.norm(np.arange(4) + 4 * line["head"]) if line["layer"] == 1 else 0.0
        assert line["Ubq"] == pytest.approx(moved)
    assert not result.totals["unknown"]
