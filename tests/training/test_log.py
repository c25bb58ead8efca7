from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from loraforge.errors import LoraforgeError, UsageError
from loraforge.training import log
from loraforge.training.log import JsonlLog, read_log, truncate_log
from loraforge.training.snapshots import EarlyStop, snapshot_steps


def tell(path: Path, step: int, logs: dict[str, float], extra: dict[str, str] | None = None) -> None:
    args = TrainingArguments(output_dir=str(path.parent), use_cpu=True)
    JsonlLog(path, extra).on_log(args, TrainerState(global_step=step), TrainerControl(), logs=logs)


def test_a_line_an_event_without_clocks(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    tell(path, 1, {"loss": 0.5, "epoch": 1.0, "eval_runtime": 3.0}, {"task": "a"})
    tell(path, 2, {"train_runtime": 1.0, "train_loss": 2.0, "epoch": 1.0, "total_flos": 3.0})
    tell(path, 3, {"loss": float("nan")})
    assert read_log(path) == [{"step": 1, "task": "a", "loss": 0.5, "epoch": 1.0}, {"step": 3, "loss": None}]


def test_truncation_drops_later_steps_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [{"step": 1, "task": "a"}, {"step": 9, "task": "a"}, {"step": 1, "task": "b"}, {"step": 3, "task": "b"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "ta', encoding="utf-8")
    truncate_log(path, 2, {"task": "b"})
    assert read_log(path) == lines[:3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.jsonl"]


def test_tensorboard_is_refused_where_nothing_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoraforgeError, match="TensorBoard is not installed") as raised:
        log.check_tensorboard()
    assert "tensorboardX" in str(raised.value.hint)


def test_steps_of_snapshots() -> None:
    assert snapshot_steps(4, 10) == [2, 3, 6, 10]
    assert snapshot_steps(3, 1000) == [10, 100, 1000]
    assert snapshot_steps(6, 8) == [1, 2, 3, 4, 6, 8]
    assert snapshot_steps(20, 3) == [1, 2, 3]
    assert snapshot_steps([5, 0, 5], 5) == [0, 5]
    with pytest.raises(UsageError, match="does not reach"):
        snapshot_steps([6], 5)
    with pytest.raises(UsageError):
        snapshot_steps(0, 5)


@pytest.mark.parametrize(
    ("values", "greater", "stops"),
    [([0.5, 0.6, 0.6], True, False), ([0.5, 0.6, 0.6, 0.5], True, True), ([0.5, 0.4, 0.3], False, False)],
)
def test_early_stop_counts_evaluations_since_the_best(values: list[float], greater: bool, stops: bool) -> None:
    state = TrainerState(log_history=[{"eval_x": value} for value in values] + [{"loss": 1.0}])
    control = TrainerControl()
    EarlyStop("eval_x", 2, greater).on_evaluate(TrainingArguments(output_dir="x", use_cpu=True), state, control)
    assert control.should_training_stop is stops
