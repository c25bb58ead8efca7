"""A recipe of one's own through the real functions: interruption, changed settings, given adapters, whole models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraforge.errors import LoraforgeError, UsageError
from loraforge.pipelines import run_pipeline
from tests.tasks.tiny import tiny_base, write_rows

STAGES = ["train:mood", "train:size", "merge:regmean", "merge:svd", "evaluate"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for two tasks of classification with different heads; rows as .csv, which calibration does not read."""
    folder = tmp_path_factory.mktemp("home")
    tiny_base(folder / "base", "bert", layers=1)
    words = {"mood": ("good", "bad"), "size": ("one", "two", "three")}
    for task, classes in words.items():
        rows = [{"text": f"the {classes[i % len(classes)]} cat", "label": classes[i % len(classes)]} for i in range(12)]
        for split in ("train", "test"):
            write_rows(folder / task / f"{split}.csv", rows)
    write_recipe(folder)
    return folder


def write_recipe(folder: Path, **changes: Any) -> Path:
    train = {"max_steps": 4, "learning_rate": 3.0e-2, "per_device_train_batch_size": 6, "save_steps": 2,
             "save_strategy": "steps"}  # fmt: skip
    pipeline: dict[str, Any] = {
        "lora": {"r": 2, "targets": ["query", "value"]},
        "train": train,
        "tasks": [{"id": t, "train": f"{t}/train.csv", "test": f"{t}/test.csv"} for t in ("mood", "size")],
        "merges": [{"method": "svd"}],
    }
    content = {"base": "base", "method": "regmean", "params": {"samples_num": 8}, "seed": 3, "pipeline": pipeline}
    content |= {key: changes.pop(key) for key in ("method", "params") if key in changes}
    pipeline |= changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def whole(home: Path) -> dict[str, Any]:
    """One run without interruption."""
    return run_pipeline(home / "recipe.yaml", out=home / "whole")


def states(found: dict[str, Any]) -> list[str]:
    return [stage["state"] for stage in found["stages"]]


def weights(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}


def copy_of(home: Path, name: str) -> Path:
    out = home / name
    shutil.copytree(home / "whole", out)
    return out


def test_a_recipe_runs_and_says_where_things_are(home: Path, whole: dict[str, Any]) -> None:
    assert [stage["name"] for stage in whole["stages"]] == STAGES and set(states(whole)) == {"done"}
    assert whole["paths"] == {
        "result": str(home / "whole/merged/regmean"), "numbers": str(home / "whole/results.json"),
        "report": str(home / "whole/report.html"),
    }  # fmt: skip
    rows = {row["name"]: row for row in whole["rows"]}
    # Each adapter has a head for its own task alone; a merge keeps both.
    assert rows["mood"]["scores"][1] is None and rows["size"]["scores"][0] is None
    assert all(score is not None for score in rows["svd"]["scores"])
    assert [task["n"] for task in whole["tasks"]] == [12, 12]
    assert whole["command"] == f"loraforge run {home / 'recipe.yaml'}"


@pytest.mark.parametrize("stage", ["train size", "evaluate"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(home: Path, whole: dict[str, Any], stage: str) -> None:
    out = home / f"broken-{stage.partition(' ')[0]}"
    seen: list[str] = []

    def interrupt(name: str, detail: str, done: int, total: int) -> None:
        seen.append(name)
        if name == stage and (stage != "train size" or done >= 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pipeline(home / "recipe.yaml", out=out, progress=interrupt)
    assert seen[-1] == stage and not (out / "results.json").exists()
    found = run_pipeline(home / "recipe.yaml", out=out)
    broken = next(i for i, name in enumerate(STAGES) if name.replace(":", " ").startswith(stage))
    assert states(found) == ["skipped"] * broken + ["done"] * (len(STAGES) - broken)
    assert weights(out) == weights(home / "whole")
    assert [row["scores"] for row in found["rows"]] == [row["scores"] for row in whole["rows"]]
    assert not [path for path in out.rglob("*") if path.name.endswith(".part")]


def test_other_settings_are_refused_and_overwrite_redoes_what_depends_on_them(
    home: Path, whole: dict[str, Any]
) -> None:
    out = copy_of(home, "changed")
    settings = {"tasks.size.max_length": 5}
    with pytest.raises(LoraforgeError, match=r"(?s)other inputs: train:size\n.*max_length was null, now 5"):
        run_pipeline(home / "recipe.yaml", out=out, settings=settings)
    found = run_pipeline(home / "recipe.yaml", out=out, settings=settings, overwrite=True)
    assert states(found) == ["skipped", "done", "done", "done", "done"]


def test_changed_data_is_noticed_by_content(home: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(home, data, ignore=shutil.ignore_patterns("whole", "broken-*", "changed", "given"))
    # The base's files keep their times in the copy; rows are compared by their bytes.
    out = copy_of(home, "moved")
    assert set(states(run_pipeline(home / "recipe.yaml", out=out, data=data))) == {"skipped"}
    path = data / "size/test.csv"
    path.write_text(path.read_text() + "the one dog,one\n")
    with pytest.raises(LoraforgeError, match="other inputs: evaluate\n"):
        run_pipeline(home / "recipe.yaml", out=out, data=data)


def test_only_and_from(home: Path, whole: dict[str, Any]) -> None:
    out = home / "parts"
    found = run_pipeline(home / "recipe.yaml", out=out, only="train:mood")
    assert states(found) == ["done", *["new"] * 4] and "rows" not in found
    with pytest.raises(LoraforgeError, match=r"(?s)reads what is not there.*train:size: new"):
        run_pipeline(home / "recipe.yaml", out=out, only="merge:svd")
    with pytest.raises(UsageError, match="did you mean 'merge:svd'"):
        run_pipeline(home / "recipe.yaml", out=out, only="merge:sdv")
    out = copy_of(home, "again")
    found = run_pipeline(home / "recipe.yaml", out=out, start="merge")
    assert states(found) == ["skipped", "skipped", "done", "done", "done"]
    assert weights(out) == weights(home / "whole")


def test_a_given_adapter_takes_the_place_of_training(home: Path, whole: dict[str, Any]) -> None:
    adapters = {"mood": home / "whole/adapters/mood"}
    found = run_pipeline(home / "recipe.yaml", out=home / "given", adapters=adapters)
    assert [stage["name"] for stage in found["stages"]] == STAGES[1:]
    assert [row["scores"] for row in found["rows"]] == [row["scores"] for row in whole["rows"]]
    with pytest.raises(UsageError, match="did you mean 'mood'"):
        run_pipeline(home / "recipe.yaml", out=home / "given", adapters={"mod": home})
    with pytest.raises(LoraforgeError, match="folder does not exist"):
        run_pipeline(home / "recipe.yaml", out=home / "given", adapters={"mood": home / "nothing"})


def test_a_dry_run_writes_nothing(home: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "none"
    found = run_pipeline(home / "recipe.yaml", out=out, dry_run=True)
    assert [(s["name"], s["state"]) for s in found["stages"]] == [(name, "to do") for name in STAGES]
    assert found["missing"] == [] and not out.exists()
    before = sorted(path for path in (home / "whole").rglob("*"))
    found = run_pipeline(home / "recipe.yaml", out=home / "whole", start="evaluate", dry_run=True)
    assert states(found) == ["done"] * 4 + ["to do"]
    assert sorted(path for path in (home / "whole").rglob("*")) == before
    missing = run_pipeline(home / "recipe.yaml", settings={"tasks.mood.train": "gone.csv"}, dry_run=True)
    assert [need["name"] for need in missing["missing"]] == [str(home / "gone.csv")]
    assert [stage["name"] for stage in missing["stages"]] == ["download", *STAGES]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.max_step": 3}, "unknown training argument 'max_step'"),
        ({"tasks.size.overrides": {"learning_rat": 1}}, "unknown training argument 'learning_rat'"),
        ({"lora.rank": 3}, "rank"),
        ({"tasks.size.test": None}, "(?s)no test rows.*size"),
        ({"tasks.mood.train": None}, "(?s)no train rows.*mood"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_trained(
    home: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(LoraforgeError, match=message):
        run_pipeline(home / "recipe.yaml", out=tmp_path / "run", settings=settings)
    assert not (tmp_path / "run").exists()


def test_a_foreign_folder_is_left_alone(home: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    for dry_run in (False, True):
        with pytest.raises(LoraforgeError, match="(?s)holds something else.*thesis.txt"):
            run_pipeline(home / "recipe.yaml", out=tmp_path, dry_run=dry_run)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_whole_models_are_trained_merged_and_measured(home: Path) -> None:
    """`how: full`, with the method that reads input statistics."""
    folder = home / "full"
    folder.mkdir()
    for name in ("base", "mood", "size"):
        (folder / name).symlink_to(home / name)
    path = write_recipe(folder, how="full", merges=[{"method": "iso-iasad"}, {"method": "iso-c"}], lora={},
                        method="weighted-average", params={})  # fmt: skip
    found = run_pipeline(path, out=folder / "run")
    names = [stage["name"] for stage in found["stages"]]
    merges = ["merge:weighted-average", "merge:iso-iasad", "merge:iso-c"]
    assert names == ["train:mood", "train:size", "stats:mood", "stats:size", *merges, "evaluate"]
    assert found["inputs"] == "models" and (folder / "run/models/mood/config.json").is_file()
    merges = [row for row in found["rows"] if row["kind"] == "merge"]
    assert len(merges) == 3 and all(None not in row["scores"] for row in merges)
    record = json.loads((folder / "run/stages/train-mood.json").read_text())
    assert "lora" not in record["inputs"]
