"""The groups on sizes that end at once: every form agrees with float64, every job gives what its row needs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from loraforge.bench import iteris, run, scale
from loraforge.bench.children import Children, Here
from loraforge.bench.groups import GROUPS, check_groups
from loraforge.bench.machine import describe
from loraforge.bench.operators import kernel_cases
from loraforge.bench.run import run_bench
from loraforge.bench.session import Session
from loraforge.errors import UsageError
from loraforge.provenance import commit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return run_bench(["merge", "kernels"], size="tiny", runs=1)


def test_every_form_of_every_operator_and_merge_is_right(result: dict[str, Any]) -> None:
    assert result["failures"] == [] and result["groups"] == ["kernels", "merge"]
    cases = {row["case"] for row in result["rows"] if row["group"] == "kernels"}
    assert cases == {case.name for case in kernel_cases("tiny")}
    assert all(row["error"] <= row["allowed"] for row in result["rows"])
    assert {row["form"] for row in result["rows"] if row["group"] == "merge"} == {
        "loraforge",
        "peft",
        "torch",
        "document",
    }


def test_a_result_is_json_with_the_documented_keys(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False))["schema"] == 1
    assert set(result) == {
        "schema", "groups", "size", "machine", "device", "clock", "ceilings", "rows", "fits", "skipped", "failures",
        "seconds",
    }  # fmt: skip
    keys = {
        "group", "case", "form", "device", "op", "size", "seconds", "iqr", "runs", "bytes", "flops", "gb_per_s",
        "gflop_per_s", "roofline", "error", "allowed", "ok", "peer", "speedup", "peak_bytes", "objective",
    }  # fmt: skip
    assert all(set(row) == keys for row in result["rows"])
    kernels = [row for row in result["rows"] if row["group"] == "kernels"]
    assert all(row["bytes"] > 0 and row["roofline"] > 0.0 and math.isfinite(row["roofline"]) for row in kernels)
    assert result["machine"]["threads"] == 1 and result["clock"] == "processor" and result["device"] == "cpu"
    assert set(result["machine"]["kernels"]) == {"mode", "native", "why", "build_info", "capabilities"}


def test_the_number_of_threads_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(run, "measurer", lambda name: lambda session: seen.append((name, torch.get_num_threads())))
    found = run_bench(["kernels"], threads=before + 1)
    assert seen == [("kernels", before + 1)] and torch.get_num_threads() == before
    assert found["clock"] == "wall" and found["ceilings"] is None and found["machine"]["threads"] == before + 1


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"groups": ["kernel"]}, "did you mean 'kernels'"),
        ({"groups": ["training"]}, "did you mean 'train'"),
        ({"size": "huge"}, "unknown size"),
        ({"threads": 0}, "threads"),
        ({"runs": 0}, "runs"),
        ({"device": "tpu"}, "unknown device"),
    ],
)
def test_wrong_options(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        run_bench(**options)


def test_groups_keep_the_order_of_the_table() -> None:
    assert check_groups([]) == list(GROUPS) and check_groups(["scale", "kernels"]) == ["kernels", "scale"]


def test_the_machine_is_described() -> None:
    found = describe()
    assert found["threads"] == torch.get_num_threads() and "cores" in str(found["machine"])
    head = (commit() or "none").removesuffix("+changes")
    assert head == "none" or (len(head) == 12 and int(head, 16) >= 0)


def scale_session(monkeypatch: pytest.MonkeyPatch) -> Session:
    session = Session(CPU, "tiny", runs=2)
    monkeypatch.setitem(vars(session), "jobs", Here())  # in this process: a new one takes seconds to load
    return session


def test_scale_measures_every_point_and_fits_every_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    session = scale_session(monkeypatch)
    monkeypatch.setitem(scale._SAMPLES, "tiny", ())  # the sweep is a test of its own
    scale.measure(session)
    assert {(row["case"], row["form"]) for row in session.rows} == {
        ("adapters 2", "loraforge"), ("adapters 3", "loraforge"), ("width 32", "loraforge"), ("width 32", "torch"),
        ("width 64", "loraforge"),
    }  # fmt: skip
    assert session.failures == [] and all(row["runs"] == 2 and row["peak_bytes"] >= 0 for row in session.rows)
    assert all(row["error"] <= row["allowed"] for row in session.rows)
    assert {fit["axis"] for fit in session.fits if fit["quantity"] == "seconds"} == {"adapters", "width"}
    compared = next(row for row in session.rows if row["case"] == "width 32" and row["form"] == "loraforge")
    assert compared["peer"] == "torch" and compared["speedup"] > 0.0


def test_a_merge_that_misses_the_best_approximation_is_seen() -> None:
    adapters = scale.make_adapters(32, 1, 4, 2, CPU)
    pairs, weights = scale.pairs_of(adapters)["module0"], [0.5, 0.5]
    (best,) = scale._merge("loraforge", adapters, weights, 4)()
    assert scale._excess(best, pairs, weights) < 1e-6
    assert scale._excess(pairs[0], pairs, weights) > 0.1  # one adapter in place of the merge


def test_the_sides_of_the_calibrated_merge_end_at_one_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    session = scale_session(monkeypatch)
    session.runs = 1
    iteris.measure(session)
    assert session.failures == [] and [row["form"] for row in session.rows] == list(iteris.SIDES)
    rows = {row["form"]: row for row in session.rows}
    assert rows["sweep"]["objective"] == pytest.approx(rows["document"]["objective"], rel=1e-3)
    assert rows["iterate"]["error"] <= rows["iterate"]["allowed"] == 2.0 * rows["document"]["error"]
    assert rows["iteris-plus"]["error"] is None and 0.0 < rows["iteris-plus"]["objective"] < 1.0
    assert rows["sweep"]["peer"] == "document" and rows["document"]["peer"] is None
    assert all(row["peak_bytes"] >= 0 and row["seconds"] > 0.0 for row in session.rows)


@pytest.mark.parametrize(
    ("side", "error", "objective", "ok"),
    [
        ("document", 0.2, 0.4, True),
        ("document", 0.3, 0.4, False),  # no solution at all
        ("sweep", 0.39, 0.4, True),
        ("sweep", 0.41, 0.4, False),  # more than twice the loop's error
        ("sweep", 0.1, 0.41, False),  # the objective is not that of the solution
        ("iteris-plus", None, 0.7, True),
        ("iteris-plus", None, 1.2, False),  # worse than no merge
    ],
)
def test_how_a_side_is_judged(side: str, error: float | None, objective: float, ok: bool) -> None:
    assert iteris._judge(side, {"error": error, "objective": objective}, {"error": 0.2}, 0.4)[2] is ok


def test_jobs_run_in_processes_of_their_own() -> None:
    with Children(1, ["tests.bench.jobs"]) as children:
        one, two = children.run("tests.bench.jobs:pid"), children.run("tests.bench.jobs:pid")
        assert one["pid"] != two["pid"] and one["threads"] == 1
        assert children.run("tests.bench.jobs:grow", mebi=64)["peak"] >= 60 * 2**20
        assert children.run("tests.bench.jobs:grow", mebi=1)["peak"] < 30 * 2**20  # the other's memory is not its
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            children.run("tests.bench.jobs:fail")
        with pytest.raises(RuntimeError, match="status"):
            children.run("tests.bench.jobs:die")
        assert children.run("tests.bench.jobs:speak") == {"said": True}  # prints do not disturb the answers
    with pytest.raises(RuntimeError, match="ended"):
        children.run("tests.bench.jobs:pid")
