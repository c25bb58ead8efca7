"""The way of heads through snapshots: lengths, ratios and times by hand and against dense matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from loraforge.errors import LoraforgeError
from loraforge.measure.files import read_lines
from loraforge.measure.updates.paths import half_step, measure_path
from tests.measure.update_cases import CASES, dense_updates, norms_by_hand, weights_of, write_adapter, write_base

STEPS = (1, 4, 10)


def way_by_hand(case, points):
    """{(layer, head): (U at each point, path)} from dense updates at each point, the first at zero."""
    found = {}
    for layer in range(2):
        for head in range(case.n_q):
            U = [math.hypot(*norms_by_hand(case, p, layer, head).values()) for p in points]
            stretches = [{n: b[n] - a.get(n, 0) for n in b} for a, b in zip(points, points[1:], strict=False)]
            path = sum(math.hypot(*norms_by_hand(case, s, layer, head).values()) for s in stretches)
            found[layer, head] = U, path
    return found


def check(result, case, points):
    for line in result["heads"]:
        U, path = way_by_hand(case, points)[line["layer"], line["head"]]
        assert line["U"] == pytest.approx(U, rel=1e-12) and line["path"] == pytest.approx(path, rel=1e-12)
        assert line["net"] == pytest.approx(U[-1]) and line["net_over_path"] == pytest.approx(U[-1] / path)
        assert 0.0 < line["net_over_path"] <= 1.0
    whole = [math.sqrt(sum(float((u**2).sum()) for u in point.values())) for point in points]
    assert result["total"]["U"] == pytest.approx(whole, rel=1e-12)
    lengths = [
        math.sqrt(sum(float(((b[n] - a.get(n, 0)) ** 2).sum()) for n in b))
        for a, b in zip(points, points[1:], strict=False)
    ]
    assert result["total"]["length"] == pytest.approx(lengths, rel=1e-12)
    assert result["total"]["path"] == pytest.approx(sum(lengths), rel=1e-12)


@pytest.mark.parametrize("name", ["gqa", "gpt2"])
def test_adapters(name: str, tmp_path: Path) -> None:
    """Ranks differ between snapshots; without step-0 the way starts at the update 0."""
    case = CASES[name]
    folders = [
        write_adapter(tmp_path / "snapshots" / f"step-{step}", case, seed=step, rank=2 + i, lora_alpha=4 + 2 * i)
        for i, step in enumerate(STEPS)
    ]
    points = [{}, *(dense_updates(folder, case) for folder in folders)]
    config = write_base(tmp_path / "base", case)
    result = measure_path(tmp_path / "snapshots", config=config, out=tmp_path / "path.json")
    assert result["steps"] == [0, *STEPS]
    check(result, case, points)
    last = [line["U"][-1] for line in result["heads"]]
    for at, rho in enumerate(result["rank_correlation"][1:], 1):
        assert rho == pytest.approx(spearmanr([line["U"][at] for line in result["heads"]], last).statistic)
    assert result["rank_correlation"][0] is None and result["rank_correlation"][-1] == pytest.approx(1.0)
    written = json.loads((tmp_path / "path.json").read_text())
    assert written["total"] == result["total"] and written["heads"] == "path.jsonl"
    assert read_lines(tmp_path / "path.jsonl") == result["heads"]
    with pytest.raises(LoraforgeError, match="exists"):
        measure_path(tmp_path / "snapshots", config=config, out=tmp_path)
    with_base = measure_path(tmp_path / "snapshots", base=config)
    assert with_base["total"]["path"] == pytest.approx(result["total"]["path"], rel=1e-12)


def test_a_step_that_is_undone(tmp_path: Path) -> None:
    """There, back and there again: three times the way, a third of it net; half of it lies within the first step."""
    case = CASES["mha"]
    for step, alpha in ((10, 6), (20, 0.0), (30, 6)):
        write_adapter(tmp_path / f"step-{step}", case, lora_alpha=alpha)
    result = measure_path(tmp_path, heads=4)
    assert {round(line["net_over_path"], 12) for line in result["heads"]} == {round(1 / 3, 12)}
    assert {round(line["half_step"], 9) for line in result["heads"]} == {5.0}
    assert result["total"]["half_step"] == pytest.approx(5.0)


def test_no_update_at_all(tmp_path: Path) -> None:
    write_adapter(tmp_path / "step-5", CASES["mha"], lora_alpha=0.0)
    result = measure_path(tmp_path, heads=4)
    assert {(line["path"], line["net_over_path"], line["half_step"]) for line in result["heads"]} == {(0.0, None, None)}


@pytest.mark.parametrize("start", ["base", "step-0"])
def test_full_models(start: str, tmp_path: Path) -> None:
    case = CASES["gqa"]
    folder = tmp_path / "snapshots"
    places = [write_base(folder / f"step-{step}", case, seed=step) for step in (3, 7)]
    first = write_base(folder / "step-0" if start == "step-0" else tmp_path / "base", case, seed=99)
    origin, *others = (weights_of(place, case) for place in (first, *places))
    points = [{n: w[n] - origin[n] for n in w} for w in (origin, *others)]
    result = measure_path(folder, base=first if start == "base" else None)
    assert result["steps"] == [0, 3, 7] and result["source"] == "dense"
    check(result, case, points)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(LoraforgeError, match="no snapshots"):
        measure_path(tmp_path)
    write_base(tmp_path / "step-3", CASES["mha"])
    with pytest.raises(LoraforgeError, match="needs its start") as caught:
        measure_path(tmp_path)
    assert "--base" in str(caught.value)


def test_half_step_by_hand() -> None:
    assert half_step([0, 10, 20], [0.0, 1.0, 4.0]) == pytest.approx(10 + 10 / 3)
    assert half_step([0, 10], [0.0, 0.0]) is None
    assert half_step([5, 10], [3.0, 4.0]) == 5.0
    assert torch.tensor(half_step([0, 8, 16], [0.0, 2.0, 2.0])) == 4.0
    assert np.isclose(half_step([0, 1, 2, 3], [0.0, 5.0, 0.0, 6.0]), 0.6)
