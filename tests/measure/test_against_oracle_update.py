"""Update norms per head, from factors and from dense weights, against the dense oracle in float64."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loraforge.measure.files import read_lines
from loraforge.measure.updates.update import update_from_dense, update_from_factors
from tests.measure.oracle_bases import NAMES, Built, Case, build
from tests.oracles import heads as oracle
from tests.oracles.heads import Shape

# Both sides take float32 numbers and calculate in float64.
CLOSE = 1e-10
MHA, GQA, WIDE = Shape(4, 4, 6, 6), Shape(6, 2, 4, 4), Shape(6, 2, 8, 8)

CASES = {
    "bert": Case("bert", MHA),
    "deberta": Case("deberta-v2", MHA, targets=("q", "v")),
    "grouped": Case("llama", GQA),
    "one-kv-head": Case("llama", Shape(4, 1, 6, 6)),
    "heads-wider-than-hidden": Case("qwen3", WIDE),
    "rslora": Case("llama", GQA, rslora=True, rank=5),
    "patterns": Case(
        "llama", GQA, ranks={"model.layers.1.self_attn.q_proj": 5, "o_proj": 2},
        alphas={"model.layers.0.self_attn.v_proj": 30.0, "o_proj": 1.0},
    ),
    "rslora-patterns": Case("bert", MHA, rslora=True, ranks={"value": 7}, alphas={"key": 3.0}),
    "conv1d-stacked": Case("gpt2", MHA),
    "interleaved": Case("gpt_neox", MHA),
    "stacked-grouped": Case("phi3", GQA),
    "output-alone": Case("bert", MHA, targets=("o",)),
    "rank-above-head": Case("bert", MHA, rank=9),
}  # fmt: skip


def by_head(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[int, int], Mapping[str, Any]]:
    return {(line["layer"], line["head"]): line for line in lines}


def compare(lines: Iterable[Mapping[str, Any]], expected: Mapping[Any, Mapping[str, Any]], rel: float = CLOSE) -> None:
    found = by_head(lines)
    assert list(found) == list(expected)
    for key, wanted in expected.items():
        for name, value in wanted.items():
            if value is None:
                assert found[key][name] is None, (key, name)
            else:
                assert found[key][name] == pytest.approx(value, rel=rel, abs=1e-12), (key, name)


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Built]:
    case = CASES[request.param]
    return case, build(tmp_path_factory.mktemp("case"), case)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "counted-by-each"])
def test_factors(case: tuple[Case, Built], share: bool) -> None:
    settings, built = case
    result = update_from_factors(built.adapter, base=built.base, kv_share=share)
    compare(result.lines, built.expected(settings.shape, kv_share=share))


def test_factors_without_the_base(case: tuple[Case, Built]) -> None:
    settings, built = case
    result = update_from_factors(built.adapter, config=settings.config)
    expected = built.expected(settings.shape, known=False)
    compare(result.lines, expected)


def test_dense(case: tuple[Case, Built]) -> None:
    settings, built = case
    # The two float32 checkpoints are what is measured: their difference has lost the last bits of the update.
    compare(update_from_dense(built.base, built.final).lines, built.expected(settings.shape), rel=1e-5)


def test_layer_sums(case: tuple[Case, Built]) -> None:
    settings, built = case
    lines = update_from_factors(built.adapter, base=built.base).lines
    for layer, parts in enumerate(built.change):
        whole = sum(float(np.linalg.norm(w)) ** 2 for w in parts.values())
        assert sum(line["U"] ** 2 for line in lines if line["layer"] == layer) == pytest.approx(whole, rel=CLOSE)


def test_values_of_another_size_than_keys(tmp_path: Path) -> None:
    shape = Shape(4, 2, 6, 3)
    built = build(tmp_path, Case("llama", shape))
    result = update_from_factors(built.adapter, heads=4, kv_heads=2)
    compare(result.lines, built.expected(shape, known=False))


def test_names_of_the_base_without_the_models_prefix(tmp_path: Path) -> None:
    case = CASES["bert"]
    built = build(tmp_path, case)
    file = built.base / "model.safetensors"
    save_file({name.removeprefix("bert."): x for name, x in load_file(file).items()}, file)
    compare(update_from_factors(built.adapter, base=built.base).lines, built.expected(case.shape))


def test_a_part_of_the_base_that_is_zero_has_no_relative_change(tmp_path: Path) -> None:
    case = CASES["bert"]
    built = build(tmp_path, case)
    file, name = built.base / "model.safetensors", NAMES["bert"]["k"].format(i=1) + ".weight"
    tensors = load_file(file)
    tensors[name][6:12] = 0
    save_file(tensors, file)
    built.weights[1]["k"][6:12] = 0
    expected = built.expected(case.shape)
    assert expected[1, 1]["Urel"] is None and expected[1, 0]["Urel"] is not None
    lines = update_from_factors(built.adapter, base=built.base).lines
    compare(lines, expected)


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox"])
def test_biases(tmp_path: Path, family: str) -> None:
    case = Case(family, MHA, biases=True)
    built = build(tmp_path, case)
    biases = []
    for parts in built.bias_change:
        if "qkv" in parts:
            fused = parts["qkv"][:, None]
            cut = oracle.unfuse(fused, case.shape, "interleaved" if family == "gpt_neox" else "stacked")
            parts = {part: x[:, 0] for part, x in cut.items()}
        biases.append({part: parts[part] for part in "qkv"})
    lines = update_from_dense(built.base, built.final, bias=True).lines
    expected = oracle.update_lines(built.change, built.weights, case.shape, biases=biases)
    assert all(line.pop("U_with_bias") > line["U"] for line in expected.values())
    compare(lines, expected, rel=1e-5)
    assert not {"Ubq", "Ubk", "Ubv"} & set(update_from_dense(built.base, built.final).lines[0])


def test_a_uniform_change_of_a_tenth(tmp_path: Path) -> None:
    built = build(tmp_path, Case("bert", MHA))
    tensors = {
        name: (x * np.float64(1.1)).astype(np.float32)
        for name, x in load_file(built.base / "model.safetensors").items()
    }
    save_file(tensors, built.final / "model.safetensors")
    for line in update_from_dense(built.base, built.final).lines:
        # Norms of random blocks are nearly equal, not equal: 0.05 holds for equal ones.
        assert line["Urel"] == pytest.approx(0.05, rel=0.01)
        assert line["Urel_l2"] == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("profile", ["document", "default"])
def test_the_file(tmp_path: Path, profile: str) -> None:
    from loraforge.measure.updates.update import measure_update

    case = CASES["grouped"]
    built = build(tmp_path, case)
    out = tmp_path / "run" / "update.jsonl"
    out.parent.mkdir()
    measure_update(built.base, adapter=built.adapter, out=out, profile=profile)
    lines = read_lines(out)
    compare_keys = ["layer", "head", "U", "Urel", "Uq", "Uk", "Uv", "Uo"]
    if profile == "document":
        assert all(list(line) == compare_keys for line in lines)
    assert all(list(line)[:8] == compare_keys for line in lines)
    wanted = built.expected(case.shape)
    compare(lines, {key: {name: line[name] for name in compare_keys[2:]} for key, line in wanted.items()})
    for line in (json.loads(text) for text in out.read_text().splitlines()):
        assert profile == "document" or line["kv_head"] == line["head"] // case.shape.group
