"""A whole measurement: what its files hold, what it skips, takes up, copies and refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file

from loraforge.errors import LoraforgeError, UsageError
from loraforge.measure.files import read_lines
from loraforge.measure.run import measure_run
from loraforge.tasks import load_model
from tests.measure.trainings import SEED, train_both

QUICK: dict[str, Any] = {"plots": False}
STEPS = ["ckpt_init", "layout", "importance_pre", "gradfisher_pre", "update", "importance_post"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train_both(folder)
    return folder


@pytest.fixture(scope="module")
def measured(home: Path) -> dict[str, dict[str, Any]]:
    """Both methods measured, each by itself."""
    return {name: measure_run(home / name, **QUICK) for name in ("FFT", "LoRA")}


def states(found: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["state"] for step in found["steps"]}


def content(folder: Path) -> dict[str, bytes]:
    """All files of a measurement but those that tell how long it took."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "ckpt_final" not in path.parts and not path.name.endswith(".meta.json")
        and path.name not in ("path.json", "base_norms.json")
    }  # fmt: skip


def loss_of(model: torch.nn.Module, home: Path, rows: list[dict[str, str]]) -> float:
    """Mean cross-entropy, row by row without padding, by nothing of the code under test."""
    tokenizer = tf.AutoTokenizer.from_pretrained(home / "base")
    labels = {name: i for i, name in enumerate(("bad", "fine", "good"))}
    losses = []
    for row in rows:
        inputs = tokenizer(row["text"], return_tensors="pt")
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
        losses.append(float(torch.nn.functional.cross_entropy(logits.double(), torch.tensor([labels[row["label"]]]))))
    return float(np.mean(losses))


def theta0(home: Path) -> torch.nn.Module:
    return load_model(home / "base", "classification", head_labels=("bad", "fine", "good"), seed=SEED)[0]


def test_all_steps_are_done_in_order(measured: dict[str, dict[str, Any]]) -> None:
    assert list(states(measured["FFT"])) == [*STEPS, "aggregate"]
    assert list(states(measured["LoRA"])) == [*STEPS, "spectrum", "path", "aggregate"]
    assert {state for found in measured.values() for state in states(found).values()} == {"done"}
    assert [measured[name]["rank"] for name in ("FFT", "LoRA")] == [None, 2]
    assert measured["LoRA"]["seed"] == SEED and measured["LoRA"]["n_heads"] == 4
    # The head at theta0 is a random one, which the task's loss measures too.
    assert any("random weights" in warning for warning in measured["FFT"]["warnings"])


def test_before_is_the_base_with_the_head_of_the_training(home: Path, measured: dict[str, dict[str, Any]]) -> None:
    rows = [json.loads(line) for line in (home / "test.jsonl").read_text().splitlines()]
    wanted = loss_of(theta0(home), home, rows)
    for name in measured:
        lines = read_lines(home / name / "importance_pre.jsonl")
        # Batches are padded there and not here: float32 sums in another order.
        assert lines[0]["loss_base"] == pytest.approx(wanted, rel=1e-5) and lines[0]["n"] == 10
    assert content(home / "FFT")["importance_pre.jsonl"] == content(home / "LoRA")["importance_pre.jsonl"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_after_is_the_trained_model(home: Path, measured: dict[str, dict[str, Any]]) -> None:
    rows = [json.loads(line) for line in (home / "test.jsonl").read_text().splitlines()]
    models = {
        "FFT": tf.AutoModelForSequenceClassification.from_pretrained(home / "FFT/ckpt_final"),
        "LoRA": PeftModel.from_pretrained(theta0(home), home / "LoRA/ckpt_final").merge_and_unload(),
    }
    for name, model in models.items():
        lines = read_lines(home / name / "importance_post.jsonl")
        assert lines[0]["loss_base"] == pytest.approx(loss_of(model, home, rows), rel=1e-5)


def test_the_update_is_the_difference_of_the_weights(home: Path, measured: dict[str, dict[str, Any]]) -> None:
    start, end = load_file(home / "base/model.safetensors"), load_file(home / "FFT/ckpt_final/model.safetensors")
    lines = {(line["layer"], line["head"]): line for line in read_lines(home / "FFT/update.jsonl")}
    for (layer, head), line in lines.items():
        name = f"encoder.layer.{layer}.attention.self.query.weight"
        rows = slice(8 * head, 8 * head + 8)
        change = end[f"bert.{name}"].double()[rows] - start[name].double()[rows]
        assert line["Uq"] == pytest.approx(float(change.norm()), rel=1e-6)


def test_the_record_names_what_was_measured(home: Path, measured: dict[str, dict[str, Any]]) -> None:
    full, lora = (json.loads((home / name / "run_config.json").read_text()) for name in ("FFT", "LoRA"))
    assert (full["method"], lora["method"], lora["r"]) == ("FFT", "LoRA", 2)
    for key in ("base_sha256", "theta0_sha256", "layout_sha256", "subset", "seed", "task"):
        assert full[key] == lora[key] is not None
    assert full["final_sha256"] != lora["final_sha256"]
    assert full["data"]["split"] == "test" and full["data"]["rows"] == 10
    assert full["metrics"]["test"].keys() == {"accuracy"} and full["train"]["max_steps"] == 4
    assert list(full["steps"]) == [*STEPS, "aggregate"]


def test_the_start_is_kept_as_its_head(home: Path, measured: dict[str, dict[str, Any]]) -> None:
    about = json.loads((home / "LoRA/ckpt_init/init.json").read_text())
    head = load_file(home / "LoRA/ckpt_init/head.safetensors")
    state = theta0(home).state_dict()
    assert {name.partition(".")[0] for name in head} <= {"classifier", "bert"} and "classifier.weight" in head
    assert all(torch.equal(state[name], tensor) for name, tensor in head.items())
    base = load_file(home / "base/model.safetensors")
    assert {*head, *(f"bert.{name}" for name in base)} == set(state)
    assert about["seed"] == SEED and about["labels"] == ["bad", "fine", "good"]


def test_the_same_call_does_nothing_twice(home: Path, measured: dict[str, dict[str, Any]]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (home / "LoRA").rglob("*.jsonl")}
    again = measure_run(home / "LoRA", **QUICK)
    assert set(states(again).values()) == {"skipped"} and again["stats"] == measured["LoRA"]["stats"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_missing_file_alone_is_made_anew(home: Path, measured: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(home / "LoRA", tmp_path / "run")
    before = content(tmp_path / "run")
    (tmp_path / "run/update.jsonl").unlink()
    found = states(measure_run(tmp_path / "run", **QUICK))
    assert [name for name, state in found.items() if state == "done"] == ["update"]
    after = content(tmp_path / "run")
    assert after.pop("run_config.json") and before.pop("run_config.json") and after == before


def test_a_killed_run_ends_as_an_unbroken_one(home: Path, measured: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Killed in the middle of the heads, without any chance to tidy up."""
    out = home / "killed"
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        "from loraforge.measure.run import measure_run\n"
        "def stop(stage, detail, done, total):\n"
        "    if stage == 'importance post' and os.path.exists(sys.argv[3]):\n"
        "        if len(open(sys.argv[3]).read().splitlines()) >= 3:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "measure_run(sys.argv[1], out=sys.argv[2], plots=False, progress=stop)\n"
    )
    part = out / ".importance_post.jsonl.lines"
    command = [sys.executable, str(script), str(home / "LoRA"), str(out), str(part)]
    # Nobody is there to turn warnings into errors; what it says is not looked at.
    done = subprocess.run(command, capture_output=True, check=False, env=os.environ, cwd=Path.cwd())
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    left = part.read_text().splitlines()
    assert len(left) >= 3 and not (out / "importance_post.jsonl").exists()
    found = measure_run(home / "LoRA", out=out, **QUICK)
    assert states(found) == {
        **dict.fromkeys(STEPS[:-1], "skipped"), **dict.fromkeys(("importance_post", "spectrum", "path"), "done"),
        "aggregate": "done",
    }  # fmt: skip
    meta = json.loads((out / "importance_post.meta.json").read_text())
    assert meta["heads_taken_up"] == len(left) - 1
    assert content(out) == content(home / "LoRA")
    assert not [path for path in out.rglob("*") if path.name.endswith((".part", ".lines"))]


def test_other_settings_are_refused_and_overwrite_starts_anew(
    home: Path, measured: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(home / "FFT", tmp_path / "run")
    with pytest.raises(
        LoraforgeError, match='(?s)importance_pre, importance_post.*ablate was "zero", now "mean"'
    ) as caught:
        measure_run(tmp_path / "run", **QUICK, ablate="mean")
    # What follows from it is not told as a change of its own.
    assert "aggregate" not in str(caught.value)
    with pytest.raises(LoraforgeError, match="(?s)topk was 20, now 2.*measure aggregate, then plot, redo these alone"):
        measure_run(tmp_path / "run", **QUICK, topk=2)
    with pytest.raises(UsageError, match="(?s)'lo'.*lo 30, hi 20.*lo below hi"):
        measure_run(tmp_path / "run", **QUICK, hi=20)
    with pytest.raises(LoraforgeError, match=r"(?s)rows of this run were drawn otherwise.*asked 1024"):
        measure_run(tmp_path / "run", **QUICK, subset=5)
    before = content(tmp_path / "run")
    changed = measure_run(tmp_path / "run", **QUICK, topk=2, overwrite="changed")
    assert [name for name, state in states(changed).items() if state == "done"] == ["aggregate"]
    anew = measure_run(tmp_path / "run", **QUICK, subset=5, overwrite=True)
    assert set(states(anew).values()) == {"done"}
    assert len(json.loads((tmp_path / "run/eval_subset.json").read_text())) == 5
    assert content(tmp_path / "run")["update.jsonl"] == before["update.jsonl"]


def test_a_call_that_measured_nothing_leaves_no_rows_behind(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "FFT/ckpt_final", tmp_path / "run/ckpt_final")
    with pytest.raises(LoraforgeError, match="(?s)no such layer"):
        measure_run(tmp_path / "run", **QUICK, method="taylor", layers="9-12", subset=4)
    assert not (tmp_path / "run/eval_subset.json").exists()
    assert measure_run(tmp_path / "run", **QUICK, method="taylor", subset=5)["n_heads"] == 4


def test_a_subset_of_ones_own_is_taken(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "FFT/ckpt_final", tmp_path / "run/ckpt_final")
    (tmp_path / "run/eval_subset.json").write_text("[3, 1]")
    found = measure_run(tmp_path / "run", **QUICK, method="taylor", overwrite=True)
    assert json.loads((tmp_path / "run/eval_subset.json").read_text()) == [3, 1]
    assert read_lines(tmp_path / "run/importance_pre.jsonl")[0]["n"] == 2 and found["stats"]["n_heads"] == 4
    (tmp_path / "run/eval_subset.json").write_text("[3, 10]")
    with pytest.raises(LoraforgeError, match="(?s)rows that the data does not have.*0 to 9"):
        measure_run(tmp_path / "run", **QUICK)


def test_another_run_of_the_same_start_is_measured_once(
    home: Path, measured: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(home / "LoRA/ckpt_final", tmp_path / "run/ckpt_final")
    found = measure_run(tmp_path / "run", **QUICK, others=[tmp_path / "nowhere", home / "FFT"])
    assert [name for name, state in states(found).items() if state == "copied"] == ["importance_pre", "gradfisher_pre"]
    copied, own = content(tmp_path / "run"), content(home / "LoRA")
    assert copied.pop("run_config.json") and own.pop("run_config.json") and copied == own
    # Other settings are no reason to take them.
    other = measure_run(home / "LoRA", out=tmp_path / "kl", **QUICK, objective="kl", others=[home / "FFT"])
    assert states(other)["importance_pre"] == "done" and states(other)["gradfisher_pre"] == "done"


def test_what_a_training_left_is_measured_in_place(home: Path, measured: dict[str, dict[str, Any]]) -> None:
    found = measure_run(home / "FFT/ckpt_final", **QUICK, others=[home / "FFT"])
    assert found["out"] == str(home / "FFT/ckpt_final/measure")
    for name in ("importance_post.jsonl", "heads.csv", "stats.json"):
        assert (home / "FFT/ckpt_final/measure" / name).read_bytes() == (home / "FFT" / name).read_bytes()


def test_the_documents_own_folder_is_measured(home: Path, tmp_path: Path) -> None:
    """`ckpt_init` a whole model, `ckpt_final` an adapter, and no record of ours."""
    run = tmp_path / "seed1_r2"
    theta0(home).save_pretrained(run / "ckpt_init")
    tf.AutoTokenizer.from_pretrained(home / "base").save_pretrained(run / "ckpt_init")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run / "ckpt_final").mkdir(exist_ok=True)
        shutil.copy(home / "LoRA/ckpt_final" / name, run / "ckpt_final" / name)
    (tmp_path / "task.yaml").write_text(json.dumps({"id": "first-word", "test": str(home / "test.jsonl"),
                                                    "train": str(home / "train.jsonl")}))  # fmt: skip
    with pytest.raises(LoraforgeError, match="(?s)does not say its task.*--task"):
        measure_run(run, **QUICK)
    found = measure_run(run, **QUICK, task=tmp_path / "task.yaml", profile="seed")
    assert found["profile"] == "document" and "ckpt_init" not in states(found)
    mine, theirs = read_lines(run / "importance_post.jsonl"), read_lines(home / "LoRA/importance_post.jsonl")
    assert mine[0].keys() == {"layer", "head", "I", "loss_base", "loss_ablate", "n"}
    for one, other in zip(mine, theirs, strict=True):
        # Other batches: float32 sums in another order, on a difference of losses.
        assert one["I"] == pytest.approx(other["I"], abs=2e-6)


def test_a_foreign_start_is_never_removed(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "FFT/ckpt_final", tmp_path / "run/ckpt_final")
    theta0(home).save_pretrained(tmp_path / "run/ckpt_init")
    before = sorted(path.name for path in (tmp_path / "run/ckpt_init").iterdir())
    for overwrite in (False, True):
        with pytest.raises(LoraforgeError, match="(?s)did not make.*ckpt_init.*--base"):
            measure_run(tmp_path / "run", **QUICK, overwrite=overwrite)
    assert sorted(path.name for path in (tmp_path / "run/ckpt_init").iterdir()) == before


def test_changed_inputs_are_named(home: Path, measured: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(home / "FFT/ckpt_final", run / "ckpt_final")
    record = json.loads((run / "ckpt_final/run.json").read_text())

    def with_record(**changes: Any) -> None:
        (run / "ckpt_final/run.json").write_text(json.dumps(record | changes))

    rows = tmp_path / "test.jsonl"
    rows.write_text((home / "test.jsonl").read_text() + '{"text": "bad cat", "label": "bad"}\n')
    moved = {"test": {**record["data"]["test"], "source": str(rows)}}
    with_record(data=moved)
    with pytest.raises(LoraforgeError, match=f"(?s)not those of the training any more.*{rows}"):
        measure_run(run, **QUICK)
    with_record(data={"test": {**record["data"]["test"], "source": str(tmp_path / "gone.jsonl")}})
    with pytest.raises(LoraforgeError, match="(?s)not at their place any more.*gone.jsonl.*--data"):
        measure_run(run, **QUICK)
    with_record(data=moved, base_sha256={"model.safetensors": "0" * 64})
    with pytest.raises(LoraforgeError, match=r"(?s)not the one of the training.*model\.safetensors"):
        measure_run(run, **QUICK, data=str(rows))
    with_record(data=moved)
    found = measure_run(run, **QUICK, data=str(rows), method="taylor")
    assert json.loads((run / "run_config.json").read_text())["data"]["rows"] == 11 and found["n_heads"] == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metod": "exact"}, "did you mean 'method'"),
        ({"method": "exactly"}, "did you mean 'exact'"),
        ({"subset": 0}, "'subset' of a measurement"),
        ({"hi": 101}, "'hi' of a measurement"),
        ({"profile": "document", "max_heads": 3}, "every query head"),
        ({"split": "dev"}, "'split' of a measurement"),
    ],
)
def test_settings_are_checked_before_anything_is_read(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measure_run(tmp_path / "nowhere", **settings)


def test_a_folder_without_a_training_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(LoraforgeError, match=r"(?s)no training to measure.*notes\.txt.*ckpt_final"):
        measure_run(tmp_path)
    with pytest.raises(LoraforgeError, match="(?s)no training to measure.*no folder"):
        measure_run(tmp_path / "nowhere")
