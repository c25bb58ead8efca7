from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from loraforge.errors import InputProblems, LoraforgeError
from loraforge.tasks import read_task_card
from loraforge.training.sequence.evaluate import cl_eval
from loraforge.training.sequence.report import cl_report
from loraforge.training.sequence.run import train_ilora

from .conftest import KEYS, VALUES, recall, short

ROOT = Path(__file__).resolve().parents[3]
undrawn = pytest.mark.usefixtures("undrawn")
# Files that say when or where a run was, beside those that say what came out.
TOLD = ("sequence.json", "run.json")


def results(run: Path) -> dict[str, str]:
    """Digest of everything that the tasks left, checkpoints and clocks aside."""
    paths = [p for p in run.rglob("*") if p.is_file() and not any("checkpoint-" in part for part in p.parts)]
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes().replace(str(run).encode(), b"RUN")).hexdigest()
        for path in paths
        if path.name not in TOLD
    }


class Stop(BaseException):
    """The end of a process, as far as it can be had within one."""


def stop_at(stage: str, step: int) -> Any:
    def progress(now: str, detail: str, done: int, total: int) -> None:
        if now == stage and done == step:
            raise Stop

    return progress


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that was never interrupted, without pictures."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraforge.training.sequence.evaluate.write_reports", lambda run: None)
        return out, train_ilora(short(llama, out), device="cpu")


def test_the_layout_and_what_is_in_it(whole: tuple[Path, dict[str, Any]], llama: Path) -> None:
    run, found = whole
    for task in "ab":
        folder = run / f"ilora_task{task}"
        for adapter in ("default", "ema"):
            assert (folder / adapter / "adapter_config.json").is_file()
            card = read_task_card(folder / adapter)
            assert card is not None and (card["id"], card["kind"], card["base"]) == (task, "causal", str(llama))
            assert json.loads((folder / adapter / "ilora_state.json").read_text())["role"] == adapter
        # Defects 1 and 2: the average moved, and neither adapter lies in the other's place.
        default, ema = (load_file(folder / name / "adapter_model.safetensors") for name in ("default", "ema"))
        assert default.keys() == ema.keys() and any(not default[key].equal(ema[key]) for key in default)
        state = json.loads((folder / "ilora_state.json").read_text())
        for adapter in ("default", "ema"):
            weights = (folder / adapter / "adapter_model.safetensors").read_bytes()
            assert state["adapters"][adapter] == hashlib.sha256(weights).hexdigest()
        assert state["step"] == 6 and state["buffer"]["histogram"]
    # Both hold rows of the training data: the one as tokens, the other because they were given in memory.
    for private in ("ilora_taskb/buffer.safetensors", "sequence.json"):
        assert os.stat(run / private).st_mode & 0o777 == 0o600
    assert found["adapters"]["b"]["ema"] == str(run / "ilora_taskb" / "ema")
    assert json.loads((run / "run.json").read_text())["metrics"] == found["metrics"]


def test_the_matrix_and_the_metrics_agree(whole: tuple[Path, dict[str, Any]]) -> None:
    run, found = whole
    matrix = json.loads((run / "cl_matrix.json").read_text())
    assert list(matrix) == ["base", "default", "ema"] and matrix == found["matrix"]
    for adapter in ("default", "ema"):
        rows = matrix[adapter]
        metrics = json.loads((run / "cl_metrics.json").read_text())[adapter]
        assert metrics["acc"] == pytest.approx(sum(rows[1]) / 2)
        assert metrics["bwt"] == pytest.approx(rows[1][0] - rows[0][0])
        assert metrics["fwt"] == pytest.approx(rows[0][1] - matrix["base"][1])
    with (run / "cl_matrix.csv").open() as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["adapter", "after", "a", "b"] and [line[:2] for line in lines[1:]] == [
        ["base", ""], ["default", "a"], ["default", "b"], ["ema", "a"], ["ema", "b"],
    ]  # fmt: skip


def test_the_log_is_one_file_with_the_parts_of_the_loss(whole: tuple[Path, dict[str, Any]]) -> None:
    lines = [json.loads(line) for line in (whole[0] / "train_log.jsonl").read_text().splitlines()]
    steps = [(line["task"], line["step"]) for line in lines]
    assert steps == [(task, step) for task in "ab" for step in range(1, 7)]
    assert all("ce_replay" not in line and line["l_cons"] == 0 for line in lines[:6])
    for line in lines[6:]:
        assert line["loss"] == pytest.approx((line["ce_current"] + line["ce_replay"]) / 2 + line["l_cons"], rel=1e-4)
        # As many rows as the batch has: ten rows make batches of four, four and two.
        assert line["replay_task_hist"] in ({"0": 4}, {"0": 2}) and 0 < line["kept_fraction"] < 1


def test_the_report_stands_alone(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, _ = whole
    out = tmp_path / "report"
    found = cl_report(run, against=[run], out=out)
    assert [(row["name"], row["method"], row["adapter"]) for row in found["runs"]] == [("run", "ilora", "ema")] * 2
    page = (out / "report.html").read_text()
    assert "http" not in page and "<script" not in page and "src=" not in page
    for wanted in ("score matrix", "forgetting", "consistency loss", "share kept plastic", "replay buffer", "Beside"):
        assert wanted in page, wanted
    pictures = sorted(path.name for path in (out / "plots").iterdir())
    assert pictures == [f"{name}.png" for name in ("buffer", "course", "loss", "matrix", "methods", "stability")]
    assert all((out / "plots" / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)


@undrawn
@pytest.mark.parametrize(("stage", "step"), [("train a", 1), ("score a", 2), ("train b", 4)])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    whole: tuple[Path, dict[str, Any]], llama: Path, tmp_path: Path, stage: str, step: int
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stop):
        train_ilora(short(llama, out), device="cpu", progress=stop_at(stage, step))
    found = train_ilora(short(llama, out), device="cpu")
    assert found["finished"] == ["a", "b"]
    assert results(out) == results(whole[0])
    if (stage, step) == ("train b", 4):
        # It went on, it did not start anew.
        assert [unit["resumed_from"] for unit in found["units"]] == [None, "checkpoint-2"]


def test_a_killed_process_goes_on_to_the_same_bytes(
    whole: tuple[Path, dict[str, Any]], llama: Path, tmp_path: Path, undrawn: None
) -> None:
    out = tmp_path / "run"
    (tmp_path / "sequence.json").write_text(json.dumps(short(llama, out)))
    program = (
        "import json, os, signal, sys\n"
        "from loraforge.training.sequence.run import train_ilora\n"
        "def kill(stage, detail, done, total):\n"
        "    if (stage, done) == ('train b', 5):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "train_ilora(json.load(open(sys.argv[1])), device='cpu', progress=kill)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "sequence.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert not (out / "ilora_taskb" / "ilora_state.json").exists()
    found = train_ilora(short(llama, out), device="cpu")
    assert found["units"][1]["resumed_from"] == "checkpoint-4"
    assert results(out) == results(whole[0])


@undrawn
def test_a_full_disk_while_checkpointing_is_said_and_the_run_goes_on(
    whole: tuple[Path, dict[str, Any]], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    out, written = tmp_path / "run", torch.save

    def full(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if "ilora_taskb/checkpoint-4" in str(file):
            raise OSError(28, "No space left on device", str(file))
        written(value, file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(LoraforgeError, match="could not be written") as caught:
            train_ilora(short(llama, out), device="cpu")
    assert "No space left" in str(caught.value)
    found = train_ilora(short(llama, out), device="cpu")
    assert found["units"][1]["resumed_from"] == "checkpoint-2"
    assert (
        results(out)["ilora_taskb/ema/adapter_model.safetensors"]
        == (results(whole[0])["ilora_taskb/ema/adapter_model.safetensors"])
    )


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@undrawn
@pytest.mark.parametrize(
    ("handover", "default_from", "ema_from"),
    [
        ("ema_to_both", "ema", "ema"),
        ("default_to_both", "default", "default"),
        ("restore_both", "default", "ema"),
        ("keep", "default", "ema"),
    ],
)
def test_the_next_task_starts_with_the_bytes_of_the_one_before(
    whole: tuple[Path, dict[str, Any]],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    handover: str,
    default_from: str,
    ema_from: str,
) -> None:
    from loraforge.training.ilora.adapters import save_pair
    from loraforge.training.sequence import unit

    def spy(work: Any, index: int, model: Any, folder: Path, buffer: Any) -> None:
        save_pair(model, tmp_path / "start")
        raise Stop

    monkeypatch.setattr(unit, "_trainer", spy)
    names = {"current_task_id": "b", "previous_task_model": str(whole[0]), "handover": handover}
    with pytest.raises(Stop):
        train_ilora(short(llama, tmp_path / "run", ilora=names), device="cpu")
    before = whole[0] / "ilora_taska"
    assert weights(before / "default") != weights(before / "ema")
    assert weights(tmp_path / "start" / "default") == weights(before / default_from)
    assert weights(tmp_path / "start" / "ema") == weights(before / ema_from)


@undrawn
def test_one_task_alone_takes_over_from_another_run(
    whole: tuple[Path, dict[str, Any]], llama: Path, tmp_path: Path
) -> None:
    """`current_task_id`, `prev_task_id` and `previous_task_model` give the second task of the run, byte for byte."""
    names = {"current_task_id": "b", "prev_task_id": "a", "previous_task_model": str(whole[0])}
    out = tmp_path / "alone"
    found = train_ilora(short(llama, out, ilora=names), device="cpu")
    assert found["finished"] == ["b"]
    for name in ("default", "ema"):
        assert weights(out / "ilora_taskb" / name) == weights(whole[0] / "ilora_taskb" / name)
    assert found["metrics"] == {"default": None, "ema": None}


@undrawn
def test_a_sequence_of_one_task_replays_the_rows_of_a_task_that_it_does_not_list(
    whole: tuple[Path, dict[str, Any]], llama: Path, tmp_path: Path
) -> None:
    names = {"prev_task_id": "a", "previous_task_model": str(whole[0])}
    content = short(llama, tmp_path / "run", ilora=names) | {"tasks": recall(0, tasks=2)[1:]}
    found = train_ilora(content, device="cpu")
    assert found["units"][0]["buffer"].keys() == {"a", "b"} and sum(found["units"][0]["buffer"].values()) == 12
    lines = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    assert all(line["replay_task_hist"] in ({"-1": 4}, {"-1": 2}) for line in lines)


@undrawn
def test_a_checkpoint_can_be_named(whole: tuple[Path, dict[str, Any]], llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = {"save_total_limit": 3}
    with pytest.raises(Stop):
        train_ilora(short(llama, out, train=train), device="cpu", progress=stop_at("train a", 5))
    folder = out / "ilora_taska"
    found = train_ilora(short(llama, out, train=train), device="cpu", resume=folder / "checkpoint-2", tasks="a")
    assert found["units"][0]["resumed_from"] == "checkpoint-2"
    assert weights(folder / "ema") == weights(whole[0] / "ilora_taska" / "ema")
    with pytest.raises(LoraforgeError, match="task of this checkpoint is finished"):
        train_ilora(short(llama, out, train=train), device="cpu", resume=folder / "checkpoint-2")


@undrawn
def test_tasks_one_at_a_time_are_the_whole_run(whole: tuple[Path, dict[str, Any]], llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(LoraforgeError, match="nowhere") as caught:
        train_ilora(short(llama, out), device="cpu", tasks="b")
    assert str(out / "ilora_taska" / "ema") in str(caught.value)
    first = train_ilora(short(llama, out), device="cpu", tasks="1")
    assert first["finished"] == ["a"] and first["metrics"]["ema"] is None
    assert train_ilora(short(llama, out), device="cpu", tasks="2")["metrics"] == whole[1]["metrics"]
    assert weights(out / "ilora_taskb" / "ema") == weights(whole[0] / "ilora_taskb" / "ema")


@undrawn
def test_baselines_share_rows_seeds_and_scores(whole: tuple[Path, dict[str, Any]], llama: Path, tmp_path: Path) -> None:
    train = {"max_steps": 2, "save_strategy": "no"}
    found = {
        method: train_ilora(short(llama, tmp_path / "run", train=train), method=method, device="cpu")
        for method in ("seq", "er", "joint", "single")
    }
    for method, result in found.items():
        assert Path(result["out"]) == tmp_path / f"run-{method}"
        assert list(result["matrix"]) == ["base", "default"] and result["matrix"]["base"] == whole[1]["matrix"]["base"]
        assert not (tmp_path / f"run-{method}" / f"ilora_task{result['finished'][0]}" / "ema").exists()
    # The first task knows no past: all methods that go in order train it alike.
    folders = [tmp_path / f"run-{method}" / "ilora_taska" / "default" for method in ("seq", "er", "single")]
    assert len({weights(folder) for folder in folders}) == 1
    joint, single = found["joint"], found["single"]
    assert len(joint["matrix"]["default"]) == 1 and joint["units"][0]["steps"] == 4
    assert joint["metrics"]["default"]["acc"] == pytest.approx(sum(joint["matrix"]["default"][0]) / 2)
    diagonal = [single["matrix"]["default"][i][i] for i in range(2)]
    assert single["metrics"]["default"]["learning_acc"] == pytest.approx(sum(diagonal) / 2)
    assert single["metrics"]["default"]["forgetting"] is joint["metrics"]["default"]["bwt"] is None
    # Own scores give the intransigence of another run.
    learnt = cl_eval(tmp_path / "run-seq", single=tmp_path / "run-single", device="cpu")
    matrix = learnt["matrix"]["default"]
    wanted = sum(diagonal[i] - matrix[i][i] for i in range(2)) / 2
    assert learnt["metrics"]["default"]["intransigence"] == pytest.approx(wanted)


@undrawn
def test_scores_taken_again_are_the_same(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, found = tmp_path / "moved", whole[1]
    shutil.copytree(whole[0], out)
    before = results(out)
    (out / "ilora_taska" / "scores.json").unlink()
    assert cl_eval(out, device="cpu")["matrix"] == found["matrix"]
    assert results(out) == before
    assert cl_eval(out, again=True, device="cpu")["matrix"] == found["matrix"] and results(out) == before


@undrawn
@pytest.mark.parametrize("label_space", ["per-task", "shared"])
def test_classes_of_all_tasks_share_a_head(bert: Path, tmp_path: Path, label_space: str) -> None:
    tasks = [
        {
            "id": name,
            "train": [{"text": key, "label": ("yes", "no", "up")[i % count]} for i, key in enumerate(KEYS[:8])],
            "test": [{"text": key, "label": ("yes", "no")[i % 2]} for i, key in enumerate(KEYS[:8])],
        }
        for name, count in (("a", 2), ("b", 3))
    ]
    out = tmp_path / "run"
    content = short(bert, out, lora={"targets": ["query", "value"]}, label_space=label_space, tasks=tasks)
    found = train_ilora(content, device="cpu")
    card = read_task_card(out / "ilora_taskb" / "ema")
    assert card is not None
    wanted = {"shared": ["no", "yes", "up"], "per-task": ["a:no", "a:yes", "b:no", "b:up", "b:yes"]}[label_space]
    assert card["labels"] == wanted and card["label_space"] == label_space
    assert all(0 <= value <= 1 for row in found["matrix"]["ema"] for value in row)
    ema = load_file(out / "ilora_taskb" / "ema" / "adapter_model.safetensors")
    (head,) = (value for key, value in ema.items() if key.endswith("classifier.weight"))
    assert len(head) == len(wanted)
    if label_space == "per-task":
        # A head of as many rows, which mean something else.
        other = [{**task, "id": name} for task, name in zip(tasks, "cd", strict=True)]
        names = {"prev_task_id": "b", "previous_task_model": str(out)}
        more = content | {"tasks": other, "ilora": {**content["ilora"], **names}, "output_dir": str(tmp_path / "more")}
        with pytest.raises(LoraforgeError, match="head of the task before has other classes"):
            train_ilora(more, device="cpu")


def test_a_plan_writes_nothing(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = train_ilora(short(llama, out, train={"max_steps": -1, "num_train_epochs": 2}), dry_run=True, device="cpu")
    assert not out.exists()
    # 2 factors of 5 targets in 2 layers; 10 rows in batches of 4 make 3 steps, twice.
    assert found["pairs"] == 20 and [unit["steps"] for unit in found["units"]] == [6, 6] and found["steps"] == 12
    assert [unit["cost"] for unit in found["units"]] == [1.0, pytest.approx(1 + 4 / 3, abs=0.01)]
    assert "not there yet" in found["units"][1]["starts_from"]
    assert found["memory"]["optimiser_bytes"] == 12 * found["trainable_parameters"]
    # 12 rows of 4 tokens (start, key, "is", value) and an end, ids and labels of 4 bytes each.
    assert found["memory"]["buffer_bytes"] == 12 * 5 * 2 * 4


@undrawn
def test_contradictions_with_what_was_begun(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = {"max_steps": 1, "save_strategy": "no"}
    train_ilora(short(llama, out, train=train), device="cpu", tasks="1")
    with pytest.raises(LoraforgeError, match="other settings or data") as caught:
        train_ilora(short(llama, out, train=train), device="cpu", set=["ema_alpha=0.5"])
    assert "ilora.ema_alpha was 0.1, now 0.5" in str(caught.value)
    with pytest.raises(LoraforgeError, match="holds a run already"):
        train_ilora(short(llama, out, train=train), device="cpu", resume="never")
    replaced = train_ilora(
        short(llama, out, train=train), device="cpu", set=["ema_alpha=0.5"], overwrite=True, tasks="a"
    )
    assert replaced["finished"] == ["a"]
    with pytest.raises(LoraforgeError, match="nothing to go on from"):
        train_ilora(short(llama, out, train=train), device="cpu", resume=str(tmp_path))


def test_training_arguments_that_a_sequence_cannot_follow(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraforgeError, match="no rows to evaluate on"):
        train_ilora(short(llama, tmp_path / "run", train={"eval_strategy": "epoch"}), device="cpu")
    best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    content = short(llama, tmp_path / "other", train=best)
    content["tasks"] = [task | {"eval": task["test"]} for task in content["tasks"]]
    with pytest.raises(LoraforgeError, match="ends each task with its last step"):
        train_ilora(content, device="cpu")


@undrawn
def test_a_base_that_changed_between_the_tasks(llama: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(llama, base)
    train = {"max_steps": 1, "save_strategy": "no"}
    train_ilora(short(base, out, train=train), device="cpu", tasks="1")
    from safetensors.torch import save_file

    state = load_file(base / "model.safetensors")
    name = next(iter(state))
    save_file(state | {name: state[name] + 1}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoraforgeError, match="the base changed since this run began"):
        train_ilora(short(base, out, train=train), device="cpu")
    # From another run's folder as well, where no sequence.json is compared.
    names = {"current_task_id": "b", "prev_task_id": "a", "previous_task_model": str(out)}
    with pytest.raises(LoraforgeError, match="the base changed between the tasks"):
        train_ilora(short(base, tmp_path / "other", train=train, ilora=names), device="cpu")


@undrawn
def test_an_earlier_adapter_of_another_form(whole: tuple[Path, dict[str, Any]], llama: Path, tmp_path: Path) -> None:
    names = {"current_task_id": "b", "prev_task_id": "a", "previous_task_model": str(whole[0])}
    with pytest.raises(InputProblems) as caught:
        lora = {"r": 4, "targets": ["q_proj"]}
        train_ilora(short(llama, tmp_path / "run", lora=lora, ilora=names), device="cpu")
    told = str(caught.value)
    assert "another rank" in told and "another alpha" in told and "another targets" in told


@undrawn
def test_a_layer_that_is_not_there(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraforgeError, match="layer"):
        train_ilora(short(llama, tmp_path / "run", ilora={"hidden_state_layers": [-1, -9]}), device="cpu")


def test_rows_that_cannot_be_used_are_named_for_all_tasks(bert: Path, tmp_path: Path) -> None:
    good = [{"text": key, "label": "yes" if i % 2 else "no"} for i, key in enumerate(KEYS[:4])]
    tasks = [
        {"id": "a", "train": good, "test": [{"text": KEYS[0], "label": "maybe"}]},
        {"id": "b", "train": good, "test": [{"txt": KEYS[0], "label": "no"}]},
        {"id": "c", "train": good, "test": []},
    ]
    with pytest.raises(LoraforgeError) as caught:
        train_ilora(short(bert, tmp_path / "run", lora={"targets": ["query"]}, tasks=tasks), device="cpu")
    told = str(caught.value)
    assert "unknown label" in told and "maybe" in told and "text" in told and not (tmp_path / "run").exists()
    for task in "abc":
        assert f"{task}" in told


def test_tasks_that_need_different_models(llama: Path, tmp_path: Path) -> None:
    other = {"id": "z", "train": [{"text": key, "label": value} for key, value in zip(KEYS, VALUES, strict=False)]}
    tasks = [*recall(0, tasks=1), other | {"test": other["train"]}]
    with pytest.raises(LoraforgeError, match="need one model") as caught:
        train_ilora(short(llama, tmp_path / "run", tasks=tasks), device="cpu")
    assert "a: causal" in str(caught.value) and "z: classification" in str(caught.value)


@undrawn
def test_what_is_forgotten_is_told_while_the_run_goes_on(whole: tuple[Path, dict[str, Any]]) -> None:
    from loraforge.training.sequence.matrix import early_report

    matrix = {"base": [0.0, 0.0], "default": [[0.9, 0.1], [0.4, 0.8]]}
    lines = early_report(matrix, ["a", "b"], 1, Path("runs/x"))
    assert lines[0] == "after b, default: a 0.400 (-0.500), b 0.800; mean change of earlier tasks -0.500"
    assert "a lost 0.500" in lines[1] and "runs/x/ilora_taska" in lines[1]
    told: list[str] = []
    train_ilora(json.loads((whole[0] / "sequence.json").read_text())["sequence"], notify=told.append, device="cpu")
    assert told == []  # nothing new was trained


@undrawn
def test_without_a_buffer_file_later_tasks_replay_nothing(llama: Path, tmp_path: Path) -> None:
    told: list[str] = []
    train = {"max_steps": 1, "save_strategy": "no"}
    content = short(llama, tmp_path / "run", ilora={"persist_buffer": False}, train=train)
    train_ilora(content, device="cpu", notify=told.append)
    assert not list((tmp_path / "run").rglob("buffer.safetensors"))
    assert any("persist_buffer" in line for line in told) and any("left no buffer" in line for line in told)
