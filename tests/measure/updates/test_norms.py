"""Slices of heads, their norms, and names under another prefix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraforge.checkpoints import open_checkpoint
from loraforge.errors import LoraforgeError
from loraforge.measure.heads.families import layout_from_shapes
from loraforge.measure.heads.find import layout_of_checkpoint
from loraforge.measure.heads.layout import Projection
from loraforge.measure.updates.matching import match_names, match_projections
from loraforge.measure.updates.norms import BaseWeights, base_norms
from loraforge.measure.updates.slices import (
    change_norm,
    column_squares,
    difference,
    head_slice,
    head_sums,
    row_squares,
    slice_norms,
    tensor_norm,
)  # fmt: skip
from loraforge.types import LowRank
from tests.measure.update_cases import CASES, norms_by_hand, weights_of, write_base


def pair(m: int, r: int, n: int, seed: int = 0, scaling: float = 1.0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator), scaling)


@pytest.mark.parametrize(("m", "r", "n"), [(7, 3, 9), (9, 3, 7), (3, 8, 5), (1, 1, 1), (6, 1, 4)],
                         ids=["wide", "tall", "rank-above", "one", "line"])  # fmt: skip
def test_row_and_column_squares(m: int, r: int, n: int) -> None:
    lr = pair(m, r, n, scaling=-0.7)
    whole = lr.delta(torch.float64).numpy()
    for change in (lr, lr.delta(torch.float64)):
        assert row_squares(change).tolist() == pytest.approx((whole**2).sum(1).tolist(), rel=1e-12)
        assert column_squares(change).tolist() == pytest.approx((whole**2).sum(0).tolist(), rel=1e-12)
        assert change_norm(change) == pytest.approx(float((whole**2).sum() ** 0.5), rel=1e-12)


def test_norms_of_half_precision_are_of_its_values() -> None:
    tensor = torch.randn(2**11, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert tensor_norm(tensor) == pytest.approx(float(tensor.double().norm()), rel=1e-14)
    assert tensor_norm(tensor, tensor * 2) == pytest.approx(float(tensor.double().norm()), rel=1e-14)


@pytest.mark.parametrize("stride", [0, 6], ids=["stacked", "alternating"])
def test_sums_of_heads_follow_offset_and_stride(stride: int) -> None:
    values = torch.arange(20, dtype=torch.float64)
    projection = Projection("x", 3, 2, offset=1, stride=stride)
    expected = [float(values[projection.span(h)].sum()) for h in range(3)]
    assert head_sums(values, projection).tolist() == expected


def test_a_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(LoraforgeError, match="do not fit") as caught:
        slice_norms(torch.zeros(8, 8), Projection("layers.0.q", 3, 3), "q")
    assert "layers.0.q" in str(caught.value) and "9" in str(caught.value)
    with pytest.raises(LoraforgeError, match="do not fit"):
        slice_norms(torch.zeros(8, 8), Projection("layers.0.o", 2, 3), "o")


@pytest.mark.parametrize("part", ["q", "o"])
def test_slices_of_factors_are_slices_of_the_matrix(part: str) -> None:
    lr, projection = pair(6, 2, 6), Projection("x", 3, 2)
    one, two = (head_slice(change, projection, part, 1) for change in (lr, lr.delta()))
    assert torch.allclose(one.delta(), two, atol=1e-6)


@pytest.mark.parametrize("kinds", ["factors", "dense", "mixed", "new", "old"])
def test_differences_of_updates(kinds: str) -> None:
    a, b = pair(5, 2, 6, 1, 0.5), pair(5, 3, 6, 2, 2.0)
    new, old = {
        "factors": (a, b), "dense": (a.delta(torch.float64), b.delta(torch.float64)),
        "mixed": (a, b.delta(torch.float64)), "new": (a, None), "old": (None, b),
    }[kinds]  # fmt: skip
    zero = torch.zeros(5, 6, dtype=torch.float64)
    expected = (zero if new is None else a.delta(torch.float64)) - (zero if old is None else b.delta(torch.float64))
    found = difference(new, old)
    if kinds in ("factors", "new", "old"):
        assert isinstance(found, LowRank) and found.rank <= 5
        found = found.delta(torch.float64)
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)
    assert difference(None, None) is None


def test_names_under_another_prefix() -> None:
    bare = [f"encoder.layer.{i}.attention.self.{p}" for i in (0, 1) for p in ("query", "key")]
    full = [f"bert.{name}" for name in bare]
    assert match_names(bare, bare) == dict(zip(bare, bare, strict=True))
    assert match_names(bare, full) == dict(zip(bare, full, strict=True))
    assert match_names(full, bare[:2]) == dict(zip(full[:2], bare[:2], strict=True))
    flattened = ["lora_te1_" + name.replace(".", "_") for name in bare]
    assert match_names(bare, flattened) == dict(zip(bare, flattened, strict=True))
    assert match_names(bare, ["layers.0.q_proj"]) == {}
    # Two towers: names that are equal as they stand win over those of the other tower.
    towers = ["text.layers.0.q", "vision.layers.0.q"]
    assert match_names(towers, towers) == dict(zip(towers, towers, strict=True))


def test_names_of_another_generation() -> None:
    """A file's older names are matched by place, but not where only some places agree."""
    parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    new = [f"layers.{i}.attention.{p}" for i in (0, 1) for p in (*parts.values(), "o_proj")]
    old = [
        *(f"encoder.layer.{i}.attention.attention.{p}" for i in (0, 1) for p in parts),
        *(f"encoder.layer.{i}.attention.output.dense" for i in (0, 1)),
    ]
    layout = layout_from_shapes(dict.fromkeys(new, (8, 8)), {"model_type": "vit", "num_attention_heads": 2})
    found = match_projections(layout, old)
    assert len(found) == 8 and found["layers.1.attention.k_proj"] == "encoder.layer.1.attention.attention.key"
    assert found["layers.0.attention.o_proj"] == "encoder.layer.0.attention.output.dense"
    assert len(match_projections(layout, old[:3])) == 3  # an adapter has some of them
    fused = ["encoder.layer.0.attention.qkv", "encoder.layer.0.attention.output.dense"]
    assert match_projections(layout, fused) == {}


@pytest.mark.parametrize("name", CASES)
def test_base_norms(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = open_checkpoint(write_base(tmp_path / "base", case, dtype=torch.bfloat16))
    weights = weights_of(tmp_path / "base", case)
    for layer, norms in enumerate(base_norms(base, layout_of_checkpoint(base))):
        for part, values in norms.items():
            heads = range(0, case.n_q, case.n_q // len(values))
            expected = [norms_by_hand(case, weights, layer, head, share=False)[part] for head in heads]
            assert values.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_cache_holds_several_bases(tmp_path: Path) -> None:
    case, cache = CASES["mha"], tmp_path / "base_norms.json"
    bases = [open_checkpoint(write_base(tmp_path / f"base{i}", case, seed=i)) for i in (0, 1)]
    layout = layout_of_checkpoint(bases[0])
    first = [base_norms(base, layout, cache=cache) for base in bases]
    for base in bases:
        (tmp_path / base.name / "model.safetensors").unlink()
    # Their matrices are gone: only the file can say.
    again = [base_norms(b, layout, cache=cache, sha256=b.__dict__["sha256s"]["model.safetensors"]) for b in bases]
    for one, two in zip(first, again, strict=True):
        assert [{k: v.tolist() for k, v in entry.items()} for entry in one] == [
            {k: v.tolist() for k, v in entry.items()} for entry in two
        ]


def test_a_base_that_lacks_a_projection(tmp_path: Path) -> None:
    case = CASES["mha"]
    layout = layout_of_checkpoint(open_checkpoint(write_base(tmp_path / "a", case)))
    other = open_checkpoint(write_base(tmp_path / "b", CASES["gpt2"]))
    with pytest.raises(LoraforgeError, match="not in the base") as caught:
        BaseWeights(other, layout)
    assert "q_proj" in str(caught.value)


def test_a_quantised_base_is_refused_with_the_way_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = write_base(tmp_path / "a", CASES["mha"])
    layout = layout_of_checkpoint(open_checkpoint(base))
    tensors = load_file(base / "model.safetensors")
    save_file({k: v.to(torch.uint8) for k, v in tensors.items()}, base / "model.safetensors")
    with pytest.raises(LoraforgeError, match="quantised") as caught:
        BaseWeights(open_checkpoint(base), layout)
    assert "--config" in str(caught.value)
