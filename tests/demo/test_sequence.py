"""The demo of training on two tasks: stopped once, continued, and everything it promises is there and agrees."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from transformers import ViTForImageClassification

from loraforge.demo import sequence
from loraforge.demo.digits import SIZE, Split, as_pixels, domain, load_splits
from loraforge.demo.evaluation import accuracy, adapter_accuracies
from loraforge.demo.sequence import METHODS, SequenceRecipe, run_sequence_demo, sequence_yaml, write_images
from loraforge.errors import LoraforgeError
from loraforge.report.demo_sequence import courses_chart, results_table, sequence_demo_html, summary
from loraforge.storage.yaml_file import read_yaml
from loraforge.training.sequence.spec import parse_sequence

TASKS = ["rotated", "inverted"]
RUNS = {"seq": "run-seq", "er": "run-er", "ilora": "run"}


class _NoNetwork(socket.socket):
    def connect(self, *args: object) -> None:
        raise AssertionError(f"the demo opened a connection: {args}")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[Path, int], list[str]]:
    """A demo that was stopped before its second method and continued; the times of the files it had by then."""
    out, told = tmp_path_factory.mktemp("demo") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", _NoNetwork)
        # A run's own report is another's concern, and drawing three takes longer than training.
        patch.setattr("loraforge.training.sequence.evaluate.write_reports", lambda run: None)
        patch.setattr(sequence, "train_ilora", _stopped(sequence.train_ilora))
        with pytest.raises(KeyboardInterrupt):
            run_sequence_demo(out, quick=True)
        before = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
        found = run_sequence_demo(out, quick=True, progress=lambda stage, *_: told.append(stage))
    return out, found, before, told


def _stopped(train: Any) -> Any:
    """Training that is interrupted once, when replay begins."""
    stops = [KeyboardInterrupt()]

    def run(*args: Any, method: str, **kwargs: Any) -> Any:
        if method == "er" and stops:
            raise stops.pop()
        return train(*args, method=method, **kwargs)

    return run


def test_folder_holds_all_that_was_promised(demo: Any) -> None:
    out, found, _, _ = demo
    assert all(Path(path).exists() for path in found["paths"].values())
    assert found["runs"] == RUNS
    for folder in RUNS.values():
        assert (out / folder / "cl_matrix.json").is_file()
        assert (out / folder / f"ilora_task{TASKS[1]}" / "default" / "adapter_model.safetensors").is_file()
    assert [path.name for path in out.parent.iterdir()] == ["out"], "no draft is left"
    assert json.loads((out / "results.json").read_text()) == {k: v for k, v in found.items() if k != "paths"}
    recipe = SequenceRecipe().quick()
    for task in TASKS:
        for part, count in (("train", recipe.train), ("test", recipe.test)):
            assert sorted(path.name for path in (out / "tasks" / task / part).iterdir()) == [str(i) for i in range(10)]
            assert len(list((out / "tasks" / task / part).rglob("*.png"))) == count


def test_a_stopped_demo_keeps_what_it_had(demo: Any) -> None:
    out, _, before, told = demo
    assert {path.relative_to(out).parts[0] for path in before} == {"base", "run-seq"}
    assert {file: file.stat().st_mtime_ns for file in before} == before
    trained = {stage for stage in told if "train" in stage}
    assert trained >= {f"{method}: train {task}" for method in ("er", "ilora") for task in TASKS}
    assert not any(stage in trained for stage in ("train base", *(f"seq: train {task}" for task in TASKS)))


def test_numbers_are_those_of_the_runs(demo: Any) -> None:
    out, found, _, _ = demo
    assert [row["name"] for row in found["rows"]] == ["base", "seq", "er", "ilora (default)", "ilora (ema)"]
    steps = set()
    for row in found["rows"][1:]:
        folder = out / RUNS[row["method"]]
        matrix = json.loads((folder / "cl_matrix.json").read_text())
        first, last = ([100 * value for value in values] for values in matrix[row["adapter"]])
        assert row["accuracies"] == pytest.approx(last)
        assert row["acc"] == pytest.approx((last[0] + last[1]) / 2)
        # With two tasks only the first can be lost, and its best is when it was learnt.
        assert row["bwt"] == pytest.approx(last[0] - first[0]) and row["forgetting"] == pytest.approx(-row["bwt"])
        units = json.loads((folder / "sequence.json").read_text())["tasks"]
        assert row["seconds"] == pytest.approx(sum(unit["seconds"] for unit in units))
        steps |= {unit["steps"] for unit in units}
        assert found["rows"][0]["accuracies"] == pytest.approx([100 * value for value in matrix["base"]])
    recipe = SequenceRecipe().quick()
    assert steps == {recipe.epochs * recipe.train // recipe.batch}, "equally many steps by every method"


def test_numbers_come_from_the_saved_adapters(demo: Any) -> None:
    out, found, _, _ = demo
    base = ViTForImageClassification.from_pretrained(str(out / "base"), local_files_only=True)
    splits = {task: _read_images(out / "tasks" / task / "test") for task in TASKS}
    for row in found["rows"][1:]:
        folder = out / RUNS[row["method"]] / f"ilora_task{TASKS[1]}" / row["adapter"]
        assert list(adapter_accuracies(base, folder, splits).values()) == pytest.approx(row["accuracies"])
    assert [accuracy(base, split) for split in splits.values()] == pytest.approx(found["rows"][0]["accuracies"])


def _read_images(folder: Path) -> Split:
    files = sorted(folder.rglob("*.png"))
    images = torch.stack([torch.from_numpy(numpy.array(Image.open(file))) for file in files]).float()
    return Split((images / 127.5 - 1).unsqueeze(1), torch.tensor([int(file.parent.name) for file in files]))


def test_the_tasks_are_learnt_and_the_first_is_lost(demo: Any) -> None:
    courses = {course["name"]: course["rows"] for course in demo[1]["courses"]}
    base, first, last = courses["seq"]
    assert first[0] > base[0] + 15 and last[1] > base[1] + 15, "each task is learnt"
    assert last[0] < first[0] - 10, "and plain training forgets"
    assert demo[1]["plain_accuracy"] > 50


def test_report_is_one_offline_page_that_names_all(demo: Any) -> None:
    out, found, _, _ = demo
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in (*TASKS, *METHODS, *found["summary"], *RUNS.values()))
    assert "http" not in page and "too few steps to say anything" in page


def test_a_whole_demo_is_not_replaced_unasked(demo: Any) -> None:
    out, found, _, _ = demo
    with pytest.raises(LoraforgeError, match="--overwrite"):
        run_sequence_demo(out, quick=True)
    assert json.loads((out / "results.json").read_text())["seconds"] == found["seconds"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(LoraforgeError, match="no demo of a training sequence"):
            run_sequence_demo(tmp_path, quick=True, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def test_an_unfinished_demo_goes_on_with_its_own_settings_alone(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(json.dumps({"demo": "sequence", "seed": 3, "quick": True, "recipe": {}}))
    with pytest.raises(LoraforgeError, match="unfinished demo") as told:
        run_sequence_demo(tmp_path, seed=4, quick=True)
    assert "seed 3" in str(told.value) and "seed 4" in str(told.value)


def test_overwriting_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo.json").write_text("{}")
    (tmp_path / "old").mkdir()
    begun = []
    monkeypatch.setattr(sequence, "_train_base", lambda work, seed, quick: work.mkdir() or 1.0)

    def train(file: Path, **given: Any) -> Any:
        begun.append((file, given["method"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(sequence, "train_ilora", train)
    with pytest.raises(KeyboardInterrupt):
        run_sequence_demo(tmp_path, quick=True, overwrite=True)
    assert begun == [(tmp_path / "sequence.yaml", "seq")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "sequence.yaml", "tasks"]


def test_images_keep_their_pixels(tmp_path: Path) -> None:
    _, plain = load_splits(0)
    split = as_pixels(plain.head(40), domain("noisy"), part="test")
    write_images(tmp_path / "images", split)
    for i in range(40):
        file = tmp_path / "images" / str(int(split.labels[i])) / f"{i:04d}.png"
        grey = numpy.array(Image.open(file)).astype(float)
        assert grey.shape == (SIZE, SIZE)
        # 256 levels over [-1, 1]: half a level at most is lost.
        assert abs(grey / 127.5 - 1 - split.images[i, 0].numpy()).max() <= 1 / 255 + 1e-6


def test_the_sequence_file_says_what_is_trained(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "sequence.yaml").write_text(sequence_yaml(SequenceRecipe(), seed=7), encoding="utf-8")
    spec = parse_sequence(read_yaml(tmp_path / "sequence.yaml"), folder=tmp_path)
    assert spec.base_model == str(tmp_path / "base") and spec.output_dir == tmp_path / "run"
    assert (spec.method, spec.label_space, spec.seed) == ("ilora", "shared", 7)
    assert spec.task_ids == ("rotated", "mirrored", "inverted")
    assert [task.test for task in spec.tasks] == [str(tmp_path / "tasks" / name / "test") for name in spec.task_ids]
    config = spec.ilora_config()
    assert (config.ema_alpha, config.consistency_weight, config.ilora_buffer_size) == (0.25, 1.0, 100)


def _made_up(seq: float, er: float, default: float, ema: float) -> dict[str, Any]:
    """Results of which the accuracies after two tasks are given for the first; 80 % on the second throughout."""
    named = {"seq": ("seq", "default", seq), "er": ("er", "default", er)}
    named |= {"ilora (default)": ("ilora", "default", default), "ilora (ema)": ("ilora", "ema", ema)}
    rows: list[dict[str, Any]] = [
        {"name": "base", "method": "base", "adapter": None, "accuracies": [95.0, 1.0], "acc": 48.0}
        | {"bwt": None, "forgetting": None, "seconds": None}
    ]
    for name, (method, adapter, end) in named.items():
        rows.append(
            {"name": name, "method": method, "adapter": adapter, "accuracies": [end, 80.0], "acc": (end + 80) / 2}
            | {"bwt": end - 90.0, "forgetting": 90.0 - end, "seconds": 1.25}
        )
    courses = [{"name": n, "rows": [[95.0, 1.0], [90.0, 2.0], [end, 80.0]]} for n, (_, _, end) in named.items()]
    return {
        "tasks": ["a<b", "c"], "notes": {"a<b": "first", "c": "second"}, "rows": rows, "courses": courses,
        "sizes": {"train": 10, "test": 100, "buffer": 5}, "runs": RUNS, "phases": {}, "versions": {"loraforge": "1"},
        "seed": 0, "quick": False, "command": "loraforge demo --sequence",
    }  # fmt: skip


def test_the_summary_names_whoever_is_ahead() -> None:
    told = summary(_made_up(seq=20.0, er=70.0, default=60.0, ema=50.0))
    assert told[0] == "Trained on one task after another (seq), earlier tasks end 70.0 points below their best."
    assert told[1] == "Highest mean accuracy at the end: er with 75.0 %."
    assert told[2] == "Least forgetting: er with 20.0 points."
    # Half of 100 images: a standard error of 5 points, the largest there is.
    assert "100 images (standard error up to 5.0 points)" in told[3]
    tied = summary(_made_up(seq=90.0, er=70.0, default=90.01, ema=89.99))
    assert tied[0] == "Trained on one task after another (seq), earlier tasks lose nothing."
    assert tied[1] == "Highest mean accuracy at the end: seq, ilora (default), ilora (ema) with 85.0 %."


def test_table_and_page_show_the_numbers_and_mark_the_highest() -> None:
    results = _made_up(seq=20.0, er=70.0, default=60.0, ema=50.0)
    data = results_table(results)
    assert data.headers == ("method", "adapter", "a<b", "c", "ACC", "BWT", "forgetting", "seconds")
    assert data.rows[2] == ("er", "default", 70.0, 80.0, 75.0, -20.0, 20.0, 1.2)
    assert data.rows[0] == ("base", None, 95.0, 1.0, 48.0, None, None, None)
    assert data.best == {(0, 2), (1, 3), (2, 3), (3, 3), (4, 3), (2, 4)}
    page = sequence_demo_html(results | {"summary": summary(results)})
    assert "a&lt;b" in page and "a<b" not in page and "too few steps" not in page


def test_the_picture_begins_a_line_where_its_task_was_learnt() -> None:
    results = _made_up(seq=20.0, er=70.0, default=60.0, ema=50.0)
    with courses_chart(results) as drawn:
        panel = drawn.axes[0]
        assert [axes.get_title("left") for axes in drawn.axes] == [course["name"] for course in results["courses"]]
        lines = {line.get_label(): line for line in panel.lines if not line.get_label().startswith("_")}
        assert lines["a<b"].get_xydata().tolist() == [[1.0, 90.0], [2.0, 20.0]]
        assert lines["c"].get_xydata().tolist() == [[2.0, 80.0]]
        dotted = [line.get_xydata().tolist() for line in panel.lines if line.get_linestyle() == ":"]
        assert dotted == [[[0.0, 95.0], [1.0, 90.0]], [[0.0, 1.0], [1.0, 2.0], [2.0, 80.0]]]
