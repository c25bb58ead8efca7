"""The group `heads` on sizes that end at once, and what it would say of results that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraforge.bench import heads
from loraforge.bench.run import run_bench
from loraforge.bench.session import Session
from loraforge.bench.tables import pages
from loraforge.report.bench_charts import bench_chart

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return run_bench(["heads"], size="tiny", runs=1, device="cpu")


def test_every_form_is_measured_and_right(result: dict[str, Any]) -> None:
    assert result["failures"] == [] and result["groups"] == ["heads"]
    assert {(row["op"], row["form"], row["peer"]) for row in result["rows"]} == {
        ("exact", "reference", None), ("exact", "loraforge", "reference"), ("exact", "shared", "reference"),
        ("taylor", "exact", None), ("taylor", "taylor", "exact"),
        ("update", "reference", None), ("update", "loraforge", "reference"),
    }  # fmt: skip
    errors = {(row["op"], row["form"]): row["error"] for row in result["rows"]}
    assert errors["exact", "loraforge"] == 0.0  # to the bit
    assert errors["exact", "shared"] < heads._ROUNDING and errors["update", "loraforge"] < 1e-12
    assert all(row["seconds"] > 0.0 for row in result["rows"])


def test_table_and_picture(result: dict[str, Any]) -> None:
    (page,) = pages(result)
    assert [row[1] for row in page.rows] == [
        "reference", "loraforge", "shared", "exact", "taylor", "reference", "loraforge"
    ]  # fmt: skip
    with bench_chart(result) as drawn:
        (axes,) = drawn.axes
        assert axes.get_title(loc="left").startswith("Measuring heads") and len(axes.texts) == 2


def test_a_wrong_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = heads._exact
    monkeypatch.setattr(heads, "_exact", lambda *args: exact(*args) * (1 + 1e-7))
    session = Session(CPU, "tiny", runs=1)
    session.measure("heads", heads.ablation_case(heads._MODELS["tiny"][0]), 0.0)
    assert [failure["form"] for failure in session.failures] == ["loraforge"]


def test_gradients_in_another_order_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = heads._exact
    monkeypatch.setattr(heads, "_exact", lambda *args: -exact(*args))
    session = Session(CPU, "tiny", runs=1)
    heads.measure_gradients(session, heads._MODELS["tiny"][0])
    assert [failure["form"] for failure in session.failures] == ["taylor"]


def test_the_adapter_is_one_that_the_package_reads(tmp_path: Path) -> None:
    from loraforge.adapters import open_adapter

    factors = {part: (torch.randn(8, 2), torch.randn(2, 8)) for part in heads._PARTS}
    heads.write_adapter(tmp_path, factors, 2)
    adapter = open_adapter(tmp_path)
    assert [name.rpartition(".")[2] for name in sorted(adapter.modules)] == sorted(heads._PARTS)
    name = next(name for name in adapter.modules if name.endswith("q_proj"))
    torch.testing.assert_close(adapter.load(name).delta(), factors["q_proj"][0] @ factors["q_proj"][1])
