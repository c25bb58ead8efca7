"""The plan of a dry run: from headers alone, and no promise that the merge would break.

That its ranks are those of the merge is tested for every method in test_registry.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loraforge as lf
from tests.adapters import folders
from tests.calibrate import models

SHAPES = {"layers.2.q": (6, 4, 5), "layers.10.q": (12, 4, 20)}


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [folders.simple(tmp_path / name, seed, modules=SHAPES) for seed, name in enumerate("ab")]


def plan(adapters: list[Path], method: str, **options: Any) -> dict[str, Any]:
    return lf.merge(adapters, method=method, dry_run=True, **options).report["plan"]


def test_rows_say_what_goes_in_and_what_comes_out(two: list[Path]) -> None:
    rows = plan(two, "task-arithmetic")["modules"]
    assert rows == [
        {"module": n, "shape": [m, d], "ranks": [4, 4], "total_rank": 8, "rank_out": 8, "at_most": False}
        for n, (m, _, d) in SHAPES.items()
    ]


@pytest.mark.parametrize(
    ("method", "rule", "ranks"),
    [
        ("svd", {}, [4, 4]),
        ("svd", {"rank": 3}, [3, 3]),
        ("task-arithmetic", {"rank": 100}, [5, 8]),
        ("task-arithmetic", {"max_rank": 2}, [2, 2]),
        ("svd", {"min_rank": 6}, [5, 6]),
        ("concat", {"uniform_rank": True, "rank": 100}, [8, 8]),
    ],
    ids=str,
)
def test_ranks(method: str, rule: dict[str, Any], ranks: list[int], two: list[Path]) -> None:
    found = plan(two, method, **rule)
    assert [row["rank_out"] for row in found["modules"]] == ranks
    assert not any(row["at_most"] for row in found["modules"])
    numbers = sum(r * (m + n) for r, (m, _, n) in zip(ranks, SHAPES.values(), strict=True))
    assert found["output_bytes"] == 4 * numbers
    assert plan(two, method, dtype="bfloat16", **rule)["output_bytes"] == 2 * numbers


def test_an_energy_rule_can_only_be_bounded(two: list[Path]) -> None:
    bound = plan(two, "svd", energy=0.5, max_rank=3)["modules"]
    assert all(row["at_most"] and row["rank_out"] == 3 for row in bound)
    real = lf.merge(two, method="svd", energy=0.5, max_rank=3).modules
    assert all(pair.rank <= 3 for pair in real.values())


def test_a_copy_costs_no_flops_and_a_cut_does(two: list[Path]) -> None:
    copied, cut = plan(two, "concat"), plan(two, "concat", rank=2)
    assert copied["flops"] == 0 and cut["flops"] > 0 and cut["peak_bytes"] > copied["peak_bytes"]
    assert "QR, core SVD, rank rule" in cut["steps"] and "QR, core SVD, rank rule" not in copied["steps"]


def test_no_factor_is_read(two: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from loraforge.adapters import Adapter

    def forbidden(*_: Any) -> None:
        raise AssertionError("a plan reads headers only")

    monkeypatch.setattr(Adapter, "load", forbidden)
    assert plan(two, "svd")["modules"]
    with pytest.raises(AssertionError, match="headers only"):
        lf.merge(two, method="svd")


# ---------------------------------------------------------------- calibrated methods


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[models.Case, list[Path], list[dict[str, torch.Tensor]]]:
    """Two adapters of rank 6 on a model whose keys and values have 8 rows: R = 12 is more than they can hold."""
    folder, case, g = tmp_path_factory.mktemp("plan"), models.make("llama"), torch.Generator().manual_seed(3)
    shapes = {n: (m.weight.shape[0], 6, m.weight.shape[1]) for n, m in case.modules().items()}
    paths = [folders.simple(folder / name, i, modules=shapes, r=6) for i, name in enumerate("ab")]
    return case, paths, [models.inputs_of("llama", g, 5, 8) for _ in range(2)]


@pytest.mark.parametrize("full", [0, 1])
@pytest.mark.parametrize("rule", [{}, {"rank": 10}], ids=str)
def test_ranks_where_a_module_is_narrower_than_r(llama: Any, full: int, rule: dict[str, int]) -> None:
    case, paths, inputs = llama
    params = {"with_pretrain_matrix": full, "alpha_1": 1e-3, "alpha_2": 1e-3, "reg_ceof": 0.0, "verify": False}
    options = {"base": case.model, "calibration": inputs, "params": {**params, "base_dtype": "float64"}, **rule}
    found = plan(paths, "iteris-plus", **options)
    real = lf.merge(paths, method="iteris-plus", **options)
    ranks = {row["module"]: row["rank_out"] for row in found["modules"]}
    assert ranks == {name: pair.rank for name, pair in real.modules.items()}
    assert min(ranks.values()) == 8 and max(ranks.values()) == rule.get("rank", 12)
    assert found["output_bytes"] == 4 * real.report["parameters"]


def test_tokens_are_counted_without_padding(llama: Any) -> None:
    case, paths, inputs = llama
    dry = lf.merge(paths, method="regmean", base=case.model, calibration=inputs, dry_run=True, samples=4)
    assert [c["samples"] for c in dry.report["calibration"]] == [4, 4]
    assert [c["available"] for c in dry.report["calibration"]] == [5, 5]
    found = plan(paths, "regmean", base=case.model, calibration=inputs, batch_tokens=10)
    assert found["tokens"] == sum(int(i["attention_mask"].sum()) for i in inputs)
    assert found["batches"] > 2 and found["peak_bytes"] > 0 and found["flops"] > 0
    more = plan(paths, "iteris", base=case.model, calibration=inputs, params={"max_iter": 5})
    assert more["flops"] > found["flops"] and "5 solves" in more["steps"]
