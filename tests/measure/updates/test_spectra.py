"""Singular values of updates and the numbers read from them, against numpy and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.measure.updates import spectra
from loraforge.measure.updates.spectra import measure_spectrum, spectrum, spectrum_numbers
from loraforge.types import LowRank
from tests.measure.update_cases import CASES, dense_updates, slice_of, weights_of, write_adapter, write_base


def numbers(*values: float, **more: float | int) -> dict[str, object]:
    return spectrum_numbers(torch.tensor(values, dtype=torch.float64), **more)


def test_by_hand() -> None:
    flat, one, empty = numbers(2, 2, 2, 2, rank=4), numbers(5, 0, 0, rank=3), numbers(0, 0, rank=2)
    assert flat["stable_rank"] == 4 and flat["eff_rank"] == pytest.approx(4) and flat["rank_use"] == pytest.approx(1)
    assert (flat["rank90"], flat["rank99"]) == (4, 4)
    assert (one["stable_rank"], one["eff_rank"], one["rank90"], one["rank99"]) == (1, 1, 1, 1)
    assert one["rank_use"] == pytest.approx(1 / 3)
    assert (empty["stable_rank"], empty["eff_rank"], empty["rank90"], empty["rank99"], empty["rank_use"]) == (0,) * 5
    # 3, 1: shares 0.9 and 0.1 of the energy exactly; p = 3/4, 1/4.
    two = numbers(3, 1)
    assert (two["rank90"], two["rank99"], two["rank_use"]) == (1, 2, None)
    assert two["eff_rank"] == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def test_leading_values_say_only_what_they_settle() -> None:
    found = numbers(3, 1, size=4.0)
    assert found["stable_rank"] == pytest.approx(16 / 9) and found["eff_rank"] is None
    assert found["rank90"] is found["rank99"] is None
    assert numbers(4, 1, size=math.sqrt(17.1))["rank90"] == 1


def test_scale_and_split_of_factors_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(9, 3, generator=generator).double(), torch.randn(3, 7, generator=generator).double()
    one, two, ten = spectrum(LowRank(B, A, 2.0)), spectrum(LowRank(B * 8, A / 4)), spectrum(LowRank(B, A, 20.0))
    assert one["sv"] == pytest.approx(two["sv"], rel=1e-12)
    assert ten["sv"] == pytest.approx([10 * value for value in one["sv"]], rel=1e-12)
    for key in ("eff_rank", "stable_rank", "rank90", "rank99", "rank_use"):
        assert ten[key] == pytest.approx(one[key])


def test_a_large_matrix_is_looked_at_through_its_leading_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "_LARGE", 100)
    monkeypatch.setattr(spectra, "_LEADING", 12)
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((300, 8)) * 2.0 ** -np.arange(8) @ rng.standard_normal((8, 290))
    whole += 1e-4 * rng.standard_normal(whole.shape)
    found, sv = spectrum(torch.from_numpy(whole)), np.linalg.svd(whole, compute_uv=False)
    assert found["sv"] == pytest.approx(sv[:12].tolist(), rel=1e-9)
    assert found["stable_rank"] == pytest.approx((sv**2).sum() / sv[0] ** 2, rel=1e-9)
    assert found["rank90"] == int((np.cumsum(sv**2) >= 0.9 * (sv**2).sum()).argmax()) + 1
    assert found["eff_rank"] is None


@pytest.mark.parametrize("name", ["gqa", "gpt2", "gpt_neox"])
def test_lines_of_modules_and_heads(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, adapter = write_base(tmp_path / "base", case), write_adapter(tmp_path / "a", case)
    updates = dense_updates(adapter, case)
    found = measure_spectrum(base, adapter=adapter, out=tmp_path / "spectrum.jsonl")
    assert len(found["lines"]) == len(updates)
    for line in found["lines"]:
        sv = np.linalg.svd(updates[line["module"].removeprefix(case.prefix)], compute_uv=False)
        assert line["sv"] == pytest.approx(sv[:3].tolist(), rel=1e-10) and line["rank"] == 3
        assert set(line["n_intruder"]) == {"k1", "k10", "k20"} and line["alignment_random"] > 0
    for line in found["heads"]:
        query = line["head"] * case.n_q // (case.n_kv if line["part"] in "kv" else case.n_q)
        piece = slice_of(case, updates, line["layer"], line["part"], query)
        assert line["sv"] == pytest.approx(np.linalg.svd(piece, compute_uv=False)[:3].tolist(), rel=1e-9)
    files = {Path(file).name for file in found["files"]}
    assert files == {"spectrum.jsonl", "spectrum.meta.json", "spectrum_heads.jsonl"}
    written = [json.loads(text) for text in (tmp_path / "spectrum.jsonl").read_text().splitlines()]
    assert written == found["lines"]
    with pytest.raises(LoraforgeError, match="exists"):
        measure_spectrum(base, adapter=adapter, out=tmp_path)


def test_two_models_and_an_adapter_alone(tmp_path: Path) -> None:
    case = CASES["mha"]
    base, final = write_base(tmp_path / "base", case), write_base(tmp_path / "final", case, seed=5)
    old, new = weights_of(base, case), weights_of(final, case)
    line = measure_spectrum(base, final=final)["lines"][0]
    name = line["module"].removeprefix(case.prefix)
    assert line["sv"] == pytest.approx(np.linalg.svd(new[name] - old[name], compute_uv=False).tolist(), rel=1e-10)
    assert line["rank"] is None and line["rank_use"] is None
    alone = measure_spectrum(adapter=write_adapter(tmp_path / "a", case), heads=4)
    assert "cos_top" not in alone["lines"][0] and not alone["meta"]["intruders"]
