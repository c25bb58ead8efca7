"""What a recipe may say about its pipeline, and `--set` on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from loraforge.errors import InputProblems, LoraforgeError, UsageError
from loraforge.pipelines import open_pipeline, pipeline_presets

RECIPE: dict[str, Any] = {
    "base": "models/base",
    "method": "ties",
    "seed": 7,
    "params": {"density": 0.3},
    "pipeline": {
        "lora": {"r": 4},
        "train": {"num_train_epochs": 2},
        "eval": {"limit": 100},
        "tasks": [
            {"id": "a", "train": "a.train.jsonl", "test": "a.test.jsonl", "label": "emotion", "text": "body"},
            {"id": "b.2", "train": "/elsewhere/b.csv", "test": "hf://owner/name:test", "overrides": {"seed": 3}},
        ],
        "merges": [{"name": "loose", "params": {"density": 0.9}}, {"method": "svd", "rank": 2}],
    },
}


def write(folder: Path, **changes: Any) -> Path:
    content = RECIPE | {key: value for key, value in changes.items() if key != "pipeline"}
    content["pipeline"] = RECIPE["pipeline"] | changes.get("pipeline", {})
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_recipe_of_ones_own_counts_paths_from_its_folder(tmp_path: Path) -> None:
    pipeline = open_pipeline(write(tmp_path))
    assert (pipeline.name, pipeline.base, pipeline.seed, pipeline.how) == ("mine", "models/base", 7, "lora")
    first, second = pipeline.tasks
    assert first.train == str(tmp_path / "a.train.jsonl") and second.train == "/elsewhere/b.csv"
    assert second.test == "hf://owner/name:test" and pipeline.data == tmp_path
    assert open_pipeline(write(tmp_path), data="data").tasks[0].train == "data/a.train.jsonl"
    # Without calibration of its own, the task's fields say how its rows are read.
    assert pipeline.calibration == {"a": {"template": "{body}", "label_field": "emotion"}, "b.2": {}}


def test_merges_without_a_method_change_the_recipes_own(tmp_path: Path) -> None:
    own, loose, svd = open_pipeline(write(tmp_path)).merges
    assert (own.name, own.row.name, own.arguments) == ("ties", "ties", {"seed": 7, "params": {"density": 0.3}})
    assert (loose.name, loose.row.name, loose.arguments["params"]) == ("loose", "ties", {"density": 0.9})
    assert (svd.name, svd.arguments) == ("svd", {"seed": 7, "rank": 2})


def test_presets_count_paths_from_the_data_folder() -> None:
    pipeline = open_pipeline("EMOTION_t5_large", data="there")
    assert pipeline.tasks[0].train == "there/data/Emotion_v2.5/emoint/train.json"
    assert open_pipeline("EMOTION_t5_large").tasks[0].test == "data/Emotion_v2.5/emoint/test.json"
    assert "document" not in pipeline_presets() and len(pipeline_presets()) == 7


def test_settings_reach_every_part(tmp_path: Path) -> None:
    settings = {
        "base": "other", "seed": 1, "device": "cpu", "rows": 5, "how": "full", "train.max_steps": 3, "lora.r": 2,
        "eval.limit": 9, "params.max_iter": "4", "tasks.b.2.train": "c.tsv", "tasks.a.max_length": 8,
    }  # fmt: skip
    path = write(tmp_path, method="iteris-plus", params={"max_iter": 2}, pipeline={"merges": []})
    pipeline = open_pipeline(path, settings=settings)
    assert (pipeline.base, pipeline.seed, pipeline.device, pipeline.how) == ("other", 1, "cpu", "full")
    assert pipeline.train == {"num_train_epochs": 2, "max_steps": 3} and pipeline.lora == {"r": 2}
    assert pipeline.evaluate == {"limit": 9} and [task.rows for task in pipeline.tasks] == [5, 5]
    assert pipeline.tasks[1].train == str(tmp_path / "c.tsv") and pipeline.tasks[0].max_length == 8
    assert pipeline.merges[0].arguments["params"] == {"max_iter": 4} and pipeline.merges[0].arguments["seed"] == 1


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("sed", "did you mean 'seed'"),
        ("tasks.c.train", "no task 'c'.*a, b.2"),
        ("tasks.a.tran", "did you mean 'train'"),
        ("train", "unknown key 'train'"),
        ("pipeline", "unknown key 'pipeline'"),
    ],
)
def test_unknown_settings_are_refused(tmp_path: Path, key: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){message}"):
        open_pipeline(write(tmp_path), settings={key: 1})


def test_settings_of_a_wrong_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraforgeError, match="did you mean 'density'"):
        open_pipeline(write(tmp_path), settings={"params.densty": 0.5})
    with pytest.raises(LoraforgeError, match="'seed' has a wrong value"):
        open_pipeline(write(tmp_path), settings={"seed": "many"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": {"task": []}}, "unknown key 'task'.*did you mean 'tasks'"),
        ({"pipeline": {"tasks": []}}, "the pipeline has no tasks"),
        ({"pipeline": {"tasks": [{"id": "a", "trian": "x"}]}}, "did you mean 'train'"),
        ({"pipeline": {"tasks": [{"id": "a"}, {"id": "a"}]}}, "two tasks have one id"),
        ({"pipeline": {"how": "half"}}, "unknown kind of training.*half"),
        ({"pipeline": {"train": [1]}}, "'train' of a pipeline is a mapping"),
        ({"pipeline": {"eval": {"limt": 3}}}, "did you mean 'limit'"),
        ({"pipeline": {"merges": [{"method": "tise"}]}}, "did you mean 'ties'"),
        ({"pipeline": {"merges": [{"method": "ties"}]}}, "two merges have one name"),
        ({"pipeline": {"merges": [{"method": "svd", "name": "a"}]}}, "a task and a merge have one name"),
        ({"pipeline": {"merges": [{"metod": "svd"}]}}, "did you mean 'method'"),
        ({"pipeline": {"merges": "ties"}}, "'merges' of a pipeline is a list"),
        ({"params": {"density": 3}}, "density"),
        ({"weights": [1, 2, 3]}, "wrong number of weights"),
        ({"samples": 8}, "'ties' uses no calibration data.*samples"),
        ({"pipeline": {"tasks": [{"id": n} for n in "abc"], "merges": [{"method": "slerp"}]}}, "'slerp' takes another"),
        ({"base": None}, "base"),
        ({"tasks": ["a", "c"]}, "tasks of a recipe do not agree"),
    ],
)
def test_bad_pipelines_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraforgeError, match=f"(?s){message}"):
        open_pipeline(write(tmp_path, **changes))


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, pipeline={"how": "half", "task": [], "merges": [{"method": "tise"}]})
    with pytest.raises(InputProblems) as caught:
        open_pipeline(path)
    assert len(caught.value.problems) == 3


def test_a_recipe_that_only_merges_says_so(tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text("method: ties\nadapters: [a, b]\n")
    for source in (path, "document"):
        with pytest.raises(LoraforgeError, match="(?s)how to merge, but not how to train.*GLUE_t5"):
            open_pipeline(source)
    path.write_text("pipeline: 3\n")
    with pytest.raises(LoraforgeError, match="'pipeline' has a wrong value"):
        open_pipeline(path)
