from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraforge.errors import InputProblems, LoraforgeError, UsageError
from loraforge.training.sequence.settings import resolved, select_units, with_settings
from loraforge.training.sequence.spec import load_sequence, parse_sequence

PLAIN = """
base_model: base
output_dir: runs/one
lora: {r: 4, alpha: 8, targets: [q_proj]}
ilora: {ema_alpha: 0.1}
train: {learning_rate: 1e-4, num_train_epochs: 2, eval_strategy: no, seed: 3}
tasks:
  - {id: 1, train: a.jsonl, eval: a.dev.jsonl, test: a.test.jsonl, overrides: {learning_rate: 2e-4}}
  - {id: b, train: b.jsonl, eval: b.dev.jsonl}
  - {id: c, train: c.jsonl, test: c.jsonl}
"""


def write(folder: Path, text: str = PLAIN) -> Path:
    path = folder / "sequence.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def content(**changes: Any) -> dict[str, Any]:
    task = {"id": "a", "train": "a.jsonl", "test": "a.jsonl"}
    return {"base_model": "base", "output_dir": "out", "tasks": [task, {**task, "id": "b"}]} | changes


def test_paths_count_from_the_file_and_values_are_what_people_mean(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    spec = load_sequence(write(tmp_path))
    assert spec.base_model == str(tmp_path / "base") and spec.output_dir == tmp_path / "runs" / "one"
    assert spec.tasks[0].train == str(tmp_path / "a.jsonl") and spec.task_ids == ("1", "b", "c")
    # PyYAML alone would read the text '1e-4' and the truth value False.
    assert spec.train["learning_rate"] == 1e-4 and spec.train["eval_strategy"] == "no"
    assert spec.seed == 3 and spec.method == "ilora" and spec.label_space == "per-task"
    assert [spec.eval_split(task) for task in spec.tasks] == ["test", "eval", "test"]
    config = spec.ilora_config()
    assert (config.use_ilora, config.ema_alpha, config.consistency_weight, config.handover) == (
        True, 0.1, 1.0, "ema_to_both",
    )  # fmt: skip


def test_a_base_that_is_no_folder_stays_an_id(tmp_path: Path) -> None:
    assert load_sequence(write(tmp_path)).base_model == "base"


@pytest.mark.parametrize(
    ("method", "buffer", "stable"), [("ilora", 500, True), ("er", 500, False), ("seq", 0, False), ("single", 0, False)]
)
def test_baselines_are_ilora_with_parts_switched_off(method: str, buffer: int, stable: bool) -> None:
    spec = parse_sequence(content(method=method, ilora={"replay_batch_size": 4}))
    config = spec.ilora_config()
    assert (config.ilora_buffer_size, config.keeps_stable) == (buffer, stable)
    assert config.replays == (buffer > 0) and config.pulls == (method == "ilora")
    assert config.replay_batch_size == 4
    assert spec.adapters == (("default", "ema") if method == "ilora" else ("default",))


def test_every_problem_of_the_file_is_told_at_once(tmp_path: Path) -> None:
    text = """
base_modle: base
method: ilroa
ilora: {ema_alhpa: 0.5, consistency_weight: -1}
lora: {rnk: 4}
eval: {adapters: [defualt]}
tasks:
  - {id: a b, train: a.jsonl}
  - {id: c, trian: c.jsonl}
"""
    with pytest.raises(InputProblems) as caught:
        load_sequence(write(tmp_path, text))
    told = str(caught.value)
    for wanted in (
        "unknown key 'base_modle'", "did you mean 'base_model'?", "no 'base_model'", "no 'output_dir'",
        "unknown method 'ilroa'", "did you mean 'ilora'?", "unknown I-LORA setting 'ema_alhpa'",
        "did you mean 'ema_alpha'?", "consistency_weight", "unknown LoRA option 'rnk'", "defualt",
        "the task has no usable id", "unknown key 'trian' of a task", "did you mean 'train'?",
    ):  # fmt: skip
        assert wanted in told, wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": [{"id": "a", "train": "x", "test": "y"}] * 2}, "two tasks have the same id"),
        ({"tasks": [{"id": "a", "test": "y"}]}, "no training rows"),
        ({"tasks": [{"id": "a", "train": "x"}]}, "nothing to be scored on"),
        ({"tasks": [{"id": "a", "train": "x", "test": "y", "metric": "perplexity"}]}, "must rise"),
        ({"tasks": [{"id": "a", "train": "x", "test": "y", "overrides": {"seed": 2}}]}, "one seed"),
        ({"tasks": ["a"]}, "a task is a mapping"),
        ({"tasks": "a"}, "'tasks' is a list"),
        ({"train": {"seed": 1.5}}, "seed cannot be used"),
        ({"train": [1]}, "'train' is a mapping"),
        ({"ilora": {"save_ema_adapter": False}}, "ema adapter, which is not saved"),
        ({"ilora": {"current_task_id": "z"}}, "no task has this id"),
        ({"ilora": {"hidden_state_layers": "last"}}, "hidden_state_layers"),
        ({"eval": {"batch_tokens": 0}}, "'batch_tokens' cannot be used"),
    ],
)
def test_contradictions_are_refused_before_anything_is_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraforgeError, match=message):
        parse_sequence(content(**changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: [", "not valid YAML"),
        ("- a", "is no mapping"),
        ("base_model: a\nbase_model: b", "stands twice"),
        ("", "is no mapping"),
    ],
)
def test_files_that_are_no_sequence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LoraforgeError) as caught:
        load_sequence(write(tmp_path, text))
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoraforgeError, match="cannot be read"):
        load_sequence(tmp_path / "none.yaml")


def test_settings_find_their_section() -> None:
    spec = with_settings(
        parse_sequence(content()),
        ["ema_alpha=0.02", "r=2", "train.learning_rate=1e-3", "max_steps=7", "label_space=shared", "limit=5"],
    )
    assert spec.ilora["ema_alpha"] == 0.02 and spec.lora["r"] == 2 and spec.label_space == "shared"
    assert spec.train == {"learning_rate": 1e-3, "max_steps": 7} and spec.eval == {"limit": 5}


def test_settings_that_mean_nothing() -> None:
    spec = parse_sequence(content())
    for setting, message in (
        ("ema_alpha", "takes a key and a value"),
        ("ilora.ema_alhpa=1", "did you mean 'ema_alpha'"),
        ("loar.r=1", "did you mean 'lora'"),
        ("tasks=1", "tasks are set in the file"),
        ("ema_alpha=2", "a number from 0 to 1"),
        ("method=era", "did you mean 'er'"),
    ):
        with pytest.raises(LoraforgeError, match=message):
            with_settings(spec, [setting])
    with pytest.raises(UsageError, match="given twice"):
        with_settings(spec, ["r=1", "r=2"])


def test_which_tasks_are_trained(tmp_path: Path) -> None:
    spec = load_sequence(write(tmp_path))
    assert select_units(spec, None) == (0, 1, 2) and select_units(spec, "2-3") == (1, 2)
    assert select_units(spec, "c,1") == (0, 2) and select_units(spec, ["b"]) == (1,)
    assert select_units(with_settings(spec, ["current_task_id=b"]), None) == (1,)
    for wrong in ("0", "3-2", "1-9", "d", ""):
        with pytest.raises(UsageError, match="no such task"):
            select_units(spec, wrong)


def test_a_recorded_sequence_is_read_again(tmp_path: Path) -> None:
    spec = load_sequence(write(tmp_path))
    again = parse_sequence(resolved(spec))
    assert resolved(again) == resolved(spec) and again.tasks[0] == spec.tasks[0]
