"""Full fine-tuning against LoRA through the real functions: two tasks, two seeds, both methods; what a recipe says."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraforge.errors import LoraforgeError, UsageError
from loraforge.pipelines import open_pipeline, run_pipeline
from tests.pipelines.stand_ins import stand_in

PRESET = "FFT_VS_LORA"
TASKS, SEEDS = ("rte", "mnli"), (1, 2)
RUNS = [f"{task}-seed{seed}-{method}" for task in TASKS for seed in SEEDS for method in ("FFT", "LoRA")]
STAGES = [*(f"train:{run}" for run in RUNS), *(f"measure:{run}" for run in RUNS),
          *(f"compare:{task}-seed{seed}" for task in TASKS for seed in SEEDS), "summary"]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("heads")
    _, settings = stand_in(PRESET, folder, hidden=16, layers=2)
    return folder, settings | {"measure.plots": False}


@pytest.fixture(scope="module")
def found(home: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """Interrupted in the middle of a measurement, and then gone on with."""
    folder, settings = home
    seen: list[str] = []

    def interrupt(stage: str, detail: str, done: int, total: int) -> None:
        seen.append(f"{stage} {detail}")
        if stage == "measure rte-seed1-LoRA" and detail.startswith("importance post"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pipeline(PRESET, out=folder / "out", data=folder / "data", settings=settings, progress=interrupt)
    assert not (folder / "out/results.json").exists() and len(seen) > 8
    return run_pipeline(PRESET, out=folder / "out", data=folder / "data", settings=settings)


def states(found: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in found["stages"]}


def test_an_interrupted_run_goes_on(home: tuple[Path, dict[str, Any]], found: dict[str, Any]) -> None:
    out = home[0] / "out"
    assert list(states(found)) == STAGES
    skipped = [name for name, state in states(found).items() if state == "skipped"]
    assert skipped == [*STAGES[:8], "measure:rte-seed1-FFT"]
    record = json.loads((out / "stages/measure-rte-seed1-LoRA.json").read_text())
    steps = {step["name"]: step["state"] for step in record["result"]["steps"]}
    assert steps["update"] == "skipped" and steps["importance_post"] == "done"
    assert not [path for path in out.rglob("*") if path.name.endswith((".part", ".copy"))]


def test_both_methods_start_at_one_point(home: tuple[Path, dict[str, Any]], found: dict[str, Any]) -> None:
    """The measurement of theta0 is made once and serves both; seeds and tasks have others."""
    out, starts = home[0] / "out", {}
    for task in TASKS:
        for seed in SEEDS:
            runs = [out / "FFT" / task / f"seed{seed}", out / "LoRA" / task / f"seed{seed}_r2"]
            configs = [json.loads((run / "run_config.json").read_text()) for run in runs]
            assert configs[0]["theta0_sha256"] == configs[1]["theta0_sha256"]
            assert [config["method"] for config in configs] == ["FFT", "LoRA"]
            assert [(config["task"], config["seed"]) for config in configs] == [(task, seed)] * 2
            pre = [(run / "importance_pre.jsonl").read_bytes() for run in runs]
            post = [(run / "importance_post.jsonl").read_bytes() for run in runs]
            assert pre[0] == pre[1] and post[0] != post[1]
            starts[task, seed] = configs[0]["theta0_sha256"]
    assert len(set(starts.values())) == 4
    states = {step["name"]: step["state"] for step in json.loads(
        (out / "stages/measure-mnli-seed2-LoRA.json").read_text())["result"]["steps"]}  # fmt: skip
    assert states["importance_pre"] == "copied" and states["importance_post"] == "done"


def test_the_trainings_are_what_the_recipe_says(home: tuple[Path, dict[str, Any]], found: dict[str, Any]) -> None:
    out = home[0] / "out"
    full = json.loads((out / "FFT/mnli/seed2/ckpt_final/run.json").read_text())
    lora = json.loads((out / "LoRA/mnli/seed2_r2/ckpt_final/run.json").read_text())
    assert (full["method"], lora["method"]) == ("full", "lora") and full["seed"] == lora["seed"] == 2
    assert (full["train"]["learning_rate"], lora["train"]["learning_rate"]) == (1e-2, 3e-2)
    assert full["labels"] == lora["labels"] == ["entailment", "neutral", "contradiction"]
    assert full["train"]["max_steps"] == lora["train"]["max_steps"] == 2 and full["best"]["metric"] == "accuracy"
    # The output projection of attention alone, of the three modules whose name ends in `dense`.
    assert lora["modules"] == 2 * 4 and lora["lora"]["alpha"] == 16


def test_the_table_is_the_mean_over_the_seeds(home: tuple[Path, dict[str, Any]], found: dict[str, Any]) -> None:
    out = home[0] / "out"
    rows = {(row["task"], row["method"]): row for row in found["comparison"]}
    assert list(rows) == [(task, method) for task in TASKS for method in ("FFT", "LoRA-r2")]
    assert found["seeds"] == list(SEEDS) and any("random weights" in warning for warning in found["warnings"])
    runs = [out / f"LoRA/rte/seed{seed}_r2" for seed in SEEDS]
    row = rows["rte", "LoRA-r2"]
    for key, shown in row["statistics"].items():
        values = [json.loads((run / "stats.json").read_text())[key] for run in runs]
        assert shown["mean"] == pytest.approx(statistics.fmean(values)) and shown["n"] == 2
    scores = [json.loads((run / "ckpt_final/run.json").read_text())["metrics"]["eval"]["metrics"] for run in runs]
    assert row["metric"] == "accuracy"
    assert row["score"] == pytest.approx(statistics.fmean(score["accuracy"] for score in scores))
    assert json.loads((out / "results.json").read_text())["comparison"] == found["comparison"]
    assert all(Path(path).exists() for path in found["paths"].values())
    summary = json.loads((out / "summary/seeds.json").read_text())
    assert len(summary["runs"]) == 8 and summary["cross_task"]
    assert (out / "COMPARE/mnli/seed2_r2/compare_metrics.json").is_file()


def test_a_second_call_does_nothing_and_a_change_redoes_what_depends_on_it(
    home: tuple[Path, dict[str, Any]], found: dict[str, Any]
) -> None:
    folder, settings = home
    out, data = folder / "changed", folder / "data"
    shutil.copytree(folder / "out", out)
    again = run_pipeline(PRESET, out=folder / "out", data=data, settings=settings)
    assert set(states(again).values()) == {"skipped"} and again["comparison"] == found["comparison"]
    changed = settings | {"measure.topk": 3}
    with pytest.raises(LoraforgeError, match=r"(?s)other inputs: measure:rte-seed1-FFT.*topk was 2, now 3"):
        run_pipeline(PRESET, out=out, data=data, settings=changed)
    redone = states(run_pipeline(PRESET, out=out, data=data, settings=changed, only="measure:rte-seed1-FFT"))
    assert redone["measure:rte-seed1-FFT"] == "done" and redone["summary"] == "changed"
    record = json.loads((out / "stages/measure-rte-seed1-FFT.json").read_text())
    # Nothing is measured again for another K.
    done = [step["name"] for step in record["result"]["steps"] if step["state"] != "skipped"]
    assert done == ["aggregate"] and json.loads((out / "FFT/rte/seed1/stats.json").read_text())["topk"] == 3


def test_a_dry_run_names_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    found = run_pipeline(PRESET, data=tmp_path, settings={"seeds": [1, 2]}, dry_run=True)
    assert [stage["name"] for stage in found["stages"]] == ["download", *STAGES]
    assert "microsoft/deberta-v3-base" in [need["name"] for need in found["missing"]]


def test_the_preset_is_the_documents_setting() -> None:
    pipeline = open_pipeline(PRESET)
    comparison = pipeline.comparison
    assert comparison is not None and comparison.seeds == (1, 42, 2026)
    assert (comparison.full["learning_rate"], comparison.lora_train["learning_rate"]) == (1e-5, 2e-4)
    assert pipeline.train["num_train_epochs"] == 20 and pipeline.train["per_device_train_batch_size"] == 128
    assert {task.id: task.max_length for task in pipeline.tasks} == {"rte": 256, "mnli": 256}
    assert {key: pipeline.lora[key] for key in ("r", "alpha", "dropout")} == {"r": 8, "alpha": 16, "dropout": 0.1}
    # One seed asked for is one seed done.
    one = open_pipeline(PRESET, settings={"seed": 3}).comparison
    assert one is not None and one.seeds == (3,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "'seeds' of a pipeline"),
        ({"seeds": "all"}, "'seeds' of a pipeline"),
        ({"measure": {"metod": "exact"}}, "did you mean 'method'"),
        ({"measure": {"subset": -3}}, "'subset' of a measurement"),
        ({"full": [1]}, "'full' of a pipeline is a mapping"),
        ({"merges": [{"method": "svd"}]}, "neither merges nor evaluates"),
        ({"how": "lora", "seeds": [1]}, "needs 'how: compare'"),
    ],
)
def test_bad_comparisons_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    pipeline = {"how": "compare", "tasks": [{"id": "a", "train": "a.csv", "test": "a.csv"}]} | changes
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"base": "base", "pipeline": pipeline}))
    with pytest.raises(LoraforgeError, match=message):
        open_pipeline(path)


@pytest.mark.parametrize(
    ("settings", "adapters", "message"),
    [
        ({"lora_train.learning_rat": 1}, {}, "(?s)unknown training argument 'learning_rat'"),
        ({"lora.rank": 3}, {}, "rank"),
        ({"tasks.rte.train": None}, {}, "(?s)no train rows.*rte"),
        ({"tasks.rte.eval": None}, {}, "(?s)no eval or test rows.*rte"),
        ({}, {"rte": "loras/rte"}, "trains its own adapters"),
    ],
)
def test_what_a_training_would_refuse_is_refused_first(
    home: tuple[Path, dict[str, Any]], tmp_path: Path, settings: dict[str, Any], adapters: dict[str, Any], message: str
) -> None:
    folder, small = home
    with pytest.raises(LoraforgeError, match=message):
        run_pipeline(PRESET, out=tmp_path / "run", data=folder / "data", settings=small | settings, adapters=adapters)
    assert not (tmp_path / "run").exists()


def test_adapters_are_a_usage_error(home: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, settings = home
    with pytest.raises(UsageError):
        run_pipeline(PRESET, out=tmp_path / "run", data=folder / "data", settings=settings, adapters={"rte": "x"})
