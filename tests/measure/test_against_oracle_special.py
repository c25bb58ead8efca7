"""Updates that are no plain pair of factors on a plain base: DoRA, near cancellation, half precision, two stacks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from loraforge.measure.updates.update import update_from_dense, update_from_factors
from tests.measure.oracle_bases import FUSED, NAMES, PREFIX, Case, build
from tests.oracles import heads as oracle
from tests.oracles.heads import Shape
from tests.tasks.tiny import tiny_base

MHA, GQA = Shape(4, 4, 6, 6), Shape(6, 2, 4, 4)


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def check(lines: list[dict[str, Any]], expected: Mapping[Any, Mapping[str, Any]], rel: float = 1e-10) -> None:
    assert [(line["layer"], line["head"]) for line in lines] == list(expected)
    for line in lines:
        for name, value in expected[line["layer"], line["head"]].items():
            assert line[name] == pytest.approx(value, rel=rel, abs=1e-13), (line["layer"], line["head"], name)


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox", "llama"])
def test_magnitudes_of_their_own(tmp_path: Path, family: str) -> None:
    """DoRA (Liu et al., 2024): W = m (W0 + s B A) / |W0 + s B A| row by row."""
    case = Case(family, GQA if family == "llama" else MHA)
    built = build(tmp_path, case)
    file = built.adapter / "adapter_model.safetensors"
    tensors, rng = load_file(file), np.random.default_rng(2)
    for layer, (W, dW) in enumerate(zip(built.weights, built.change, strict=True)):
        m, ratio = {}, {}
        for part, weight in W.items():
            size = np.linalg.norm(weight + dW[part], axis=1)
            m[part] = (size * rng.uniform(0.9, 1.1, len(size))).astype(np.float32)
            ratio[part] = m[part].astype(np.float64) / size
            dW[part] = ratio[part][:, None] * (weight + dW[part]) - weight
        if family in FUSED:
            rows = oracle.fuse({part: m[part][:, None] for part in "qkv"}, case.shape, FUSED[family])
            m["qkv"] = rows[:, 0]
        for part, name in NAMES[family].items():
            tensors[f"{PREFIX}{name.format(i=layer)}.lora_magnitude_vector"] = m[part]
    save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, file)
    edit(built.adapter / "adapter_config.json", use_dora=True)
    check(update_from_factors(built.adapter, base=built.base).lines, built.expected(case.shape))


@pytest.mark.parametrize("name", ["base_layer.bias", "bias"])
def test_biases_that_an_adapter_brings(tmp_path: Path, name: str) -> None:
    case = Case("bert", MHA, biases=True)
    built = build(tmp_path, case)
    file, final = built.adapter / "adapter_model.safetensors", load_file(built.final / "model.safetensors")
    tensors = load_file(file)
    for key, x in final.items():
        if key.endswith(".bias"):
            tensors[f"{PREFIX}{key.removesuffix('bias')}{name}"] = x
    save_file(tensors, file)
    edit(built.adapter / "adapter_config.json", bias="lora_only")
    biases = [{part: db[part] for part in "qkv"} for db in built.bias_change]
    expected = oracle.update_lines(built.change, built.weights, MHA, biases=biases)
    for line in expected.values():
        del line["U_with_bias"]
    check(update_from_factors(built.adapter, base=built.base, bias=True).lines, expected)


def test_rows_that_nearly_cancel(tmp_path: Path) -> None:
    """dW of a head is a millionth of its factors: the Gram matrix would keep four digits of it, QR keeps ten."""
    case = Case("bert", MHA, rank=2, alpha=2.0)
    built = build(tmp_path, case)
    file = built.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for layer in range(2):
        for part in ("q", "k", "v"):
            key = PREFIX + NAMES["bert"][part].format(i=layer)
            A, B = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
            A[1] = A[0] * np.float32(1 + 2**-20)
            A[1, ::2] = A[0, ::2]  # the difference is exact in float32, and in no multiple of A[0]
            B[6:12, 1] = -B[6:12, 0]
            built.change[layer][part] = oracle.delta(B, A, 1.0)
    save_file(tensors, file)
    expected = built.expected(MHA)
    assert expected[0, 1]["Uq"] < 1e-4 < expected[0, 0]["Uq"]
    for line in update_from_factors(built.adapter, base=built.base).lines:
        for name in ("Uq", "Uk", "Uv"):
            assert line[name] == pytest.approx(expected[line["layer"], line["head"]][name], rel=1e-8)


def test_a_small_update_of_a_bfloat16_base(tmp_path: Path) -> None:
    """From factors the update is exact; what merging into bfloat16 would leave of it is nothing."""
    case = Case("llama", GQA, alpha=3e-6)
    built = build(tmp_path, case)
    for folder in (built.base, built.adapter):
        file = next(folder.glob("*.safetensors"))
        half = {name: torch.from_numpy(x).bfloat16() for name, x in load_file(file).items()}
        save_torch(half, file)
    with (
        safe_open(built.base / "model.safetensors", "pt") as base,
        safe_open(built.adapter / "adapter_model.safetensors", "pt") as factors,
    ):
        for layer in range(2):
            for part, template in NAMES["llama"].items():
                name = template.format(i=layer)
                built.weights[layer][part] = base.get_tensor(f"{name}.weight").double().numpy()
                A, B = (factors.get_tensor(f"{PREFIX}{name}.lora_{x}.weight").double().numpy() for x in "AB")
                built.change[layer][part] = oracle.delta(B, A, 1e-6)
    check(update_from_factors(built.adapter, base=built.base).lines, built.expected(GQA))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_and_decoder(tmp_path: Path, family: str) -> None:
    base = tiny_base(tmp_path / "base", family)
    weights = load_file(base / "model.safetensors")
    shape = Shape(2, 2, 8, 8)
    stacks = {"enc": "encoder", "dec": "decoder"}
    places = [("enc", "self", i) for i in range(2)]
    places += [("dec", kind, i) for i in range(2) for kind in ("self", "cross")]
    rng = np.random.default_rng(3)
    factors, expected, final = {}, {}, dict(weights)
    for stack, kind, i in places:
        at, names = _names(family, stacks[stack], kind, i)
        change, below = {}, {}
        for part, name in names.items():
            A, B = (rng.standard_normal(size).astype(np.float32) for size in ((2, 16), (16, 2)))
            factors |= {f"{PREFIX}{at}{name}.lora_A.weight": A, f"{PREFIX}{at}{name}.lora_B.weight": B}
            below[part], change[part] = weights[f"{at}{name}.weight"].astype(np.float64), oracle.delta(B, A, 2.0)
            final[f"{at}{name}.weight"] = (below[part] + change[part]).astype(np.float32)
        for head in range(2):
            line = oracle.update_line(change, below, head, shape)
            expected[stack, kind, i, head] = line | oracle.circuits(change, below, head, shape)
    (tmp_path / "adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "task_type": None}
    settings |= {"target_modules": ["q"], "base_model_name_or_path": str(base)}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text((base / "config.json").read_text())
    save_file(final, tmp_path / "final" / "model.safetensors")
    results = {
        1e-10: update_from_factors(tmp_path / "adapter", base=base),
        1e-5: update_from_dense(base, tmp_path / "final"),  # the difference of float32 weights
    }
    for rel, result in results.items():
        assert [(x["stack"], x["kind"], x["layer"], x["head"]) for x in result.lines] == list(expected)
        for line, wanted in zip(result.lines, expected.values(), strict=True):
            for name, value in wanted.items():
                assert line[name] == pytest.approx(value, rel=rel), name


def _names(family: str, stack: str, kind: str, i: int) -> tuple[str, dict[str, str]]:
    """Prefix of an attention and module of each part."""
    if family == "t5":
        name = "SelfAttention" if kind == "self" else "EncDecAttention"
        return f"{stack}.block.{i}.layer.{0 if kind == 'self' else 1}.{name}.", {part: part for part in "qkvo"}
    name = "self_attn" if kind == "self" else "encoder_attn"
    return f"model.{stack}.layers.{i}.{name}.", {p: f"{p}_proj" for p in "qkv"} | {"o": "out_proj"}
