"""The group `train` on sizes that end at once, and what it would say of results that are wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loraforge.bench import training, training_steps
from loraforge.bench.cases import Draws, error_of
from loraforge.bench.run import run_bench
from loraforge.bench.tables import pages
from loraforge.bench.timing import Clock
from loraforge.report.bench_charts import bench_chart
from tests.oracles import ilora

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return run_bench(["train"], size="tiny", runs=1)


def test_every_part_is_measured_and_right(result: dict[str, Any]) -> None:
    assert result["failures"] == [] and result["groups"] == ["train"]
    found = {(row["op"], row["form"]) for row in result["rows"]}
    assert found == {
        ("ema", "reference"), ("ema", "torch"), ("ema", "loraforge"), ("buffer", "torch"), ("buffer", "loraforge"),
        ("step", "replay"), ("step", "ilora"), ("switch", "peft"), ("switch", "loraforge"),
    }  # fmt: skip
    assert all(row["seconds"] > 0.0 and row["error"] <= row["allowed"] for row in result["rows"])


def test_rows_compare_with_their_peers(result: dict[str, Any]) -> None:
    rows = {(row["op"], row["form"]): row for row in result["rows"]}
    peers = {key: row["peer"] for key, row in rows.items() if row["peer"]}
    assert peers[("ema", "loraforge")] == "torch" and peers[("step", "ilora")] == "replay"
    assert peers[("buffer", "loraforge")] == "torch" and peers[("switch", "loraforge")] == "peft"
    ilora_row, replay = rows["step", "ilora"], rows["step", "replay"]
    assert ilora_row["speedup"] == pytest.approx(replay["seconds"] / ilora_row["seconds"])


def test_the_buffer_holds_a_third_of_the_bytes(result: dict[str, Any]) -> None:
    """Tokens as 32-bit numbers and no mask: 2 x 4 bytes a token where three 64-bit tensors take 24."""
    held = {row["form"]: row["peak_bytes"] for row in result["rows"] if row["op"] == "buffer"}
    rows, tokens, _ = training._BUFFERS["tiny"]
    assert held["torch"] == 24 * rows * tokens
    assert held["loraforge"] == 8 * rows * tokens


def test_full_size_buffer_stays_below_its_bound() -> None:
    """500 x 1024 tokens in less than 6 MB."""
    buffer = training.ReplayBuffer(500)
    buffer.offer(training._texts(500, 1024), 0)
    assert len(buffer) == 500 and buffer.nbytes < 6e6


def test_tables(result: dict[str, Any]) -> None:
    parts, step = pages(result)
    assert [row[0].split()[0] for row in parts.rows] == ["ema", "draw", "switch"]
    assert dict(zip(step.headers, step.rows[0], strict=True))["ilora / replay"] == pytest.approx(
        step.rows[0][1] / step.rows[0][0]
    )
    without = {**result, "rows": [row for row in result["rows"] if row["op"] in ("ema", "step")]}
    assert pages(without)[1].rows[0][-1] is None  # no switch measured, no share of a step


def test_picture(result: dict[str, Any]) -> None:
    """Bars for what has a peer of another program: both loops over the average, the list of rows, PEFT's switch."""
    with bench_chart(result) as drawn:
        (axes,) = drawn.axes
        assert axes.get_title(loc="left").startswith("Continual training")
        assert len(axes.texts) == 4


def test_the_average_is_that_of_the_oracle() -> None:
    work = training.average_case(3, 2, 5).build(CPU)
    work.before("loraforge")
    got = work.forms["loraforge"]()
    draws = Draws(CPU)
    start, new = ([draws.normal(2, 5).numpy() for _ in range(3)] for _ in range(2))
    right = [ilora.ema_closed_form(e, [p], training.WEIGHT) for e, p in zip(start, new, strict=True)]
    assert error_of(got, [torch.from_numpy(value) for value in right]) < 1e-6


def test_lost_or_changed_rows_are_seen() -> None:
    offered = training._texts(4, 6)
    assert training.round_trip_error(offered, list(reversed(offered))) == 0.0
    assert training.round_trip_error(offered, offered[:3]) == float("inf")
    assert training.round_trip_error(offered, [*offered[:3], offered[0]]) == float("inf")
    changed = [{**row, "labels": row["labels"] + 1} for row in offered]
    assert training.round_trip_error(offered, changed) == float("inf")


def test_a_step_is_timed_from_its_begin_to_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 1.5, 4.0])
    monkeypatch.setattr(training_steps.time, "process_time", lambda: next(times))
    watch = training_steps.StepWatch(Clock(CPU, 1))
    watch.on_step_begin(None, None, None)
    watch.on_step_begin(None, None, None)
    watch.on_train_end(None, None, None)
    assert watch.seconds() == [0.5, 2.5]
