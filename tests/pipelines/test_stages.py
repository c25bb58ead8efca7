"""The stage engine: what runs, what is skipped, what a kill leaves behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from loraforge.errors import InputProblems, LoraforgeError, UsageError
from loraforge.pipelines.stages import Stage, choose, run_folder, run_stages, survey


class Shop:
    """Stages train:a, train:b -> merge -> evaluate that count how often they run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, bool]] = []
        self.inputs: dict[str, Any] = {"train:a": 1, "train:b": 1, "merge": 1, "evaluate": 1}
        self.fails: dict[str, BaseException] = {}

    def stages(self) -> list[Stage]:
        after = {"merge": ("train:a", "train:b"), "evaluate": ("merge",)}
        return [self.stage(name, after.get(name, ())) for name in self.inputs]

    def stage(self, name: str, after: tuple[str, ...]) -> Stage:
        output = self.folder / name.replace(":", "-")

        def action(resume: bool, progress: Any) -> Mapping[str, Any]:
            self.calls.append((name, resume))
            if name in self.fails:
                raise self.fails.pop(name)
            output.write_text(f"{name} {self.inputs[name]}")
            return {"told": name}

        return Stage(name, output, {"value": self.inputs[name], "nested": {"seed": 0}}, after, action)

    def run(self, **options: Any) -> list[str]:
        self.calls.clear()
        run_stages(choose(survey(self.stages(), self.folder), **options), self.folder)
        return [name for name, _ in self.calls]

    def states(self) -> dict[str, str]:
        return {status.stage.name: status.state for status in survey(self.stages(), self.folder)}


ALL = ["train:a", "train:b", "merge", "evaluate"]


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_every_stage_runs_once_in_order_and_is_recorded(shop: Shop) -> None:
    assert shop.run() == ALL
    assert shop.run() == [] and set(shop.states().values()) == {"done"}
    record = json.loads((shop.folder / "stages" / "train-a.json").read_text())
    assert record["state"] == "done" and record["result"] == {"told": "train:a"} and record["seconds"] < 60
    assert record["inputs"] == {"value": 1, "nested": {"seed": 0}}


def test_an_output_that_is_gone_is_made_again(shop: Shop) -> None:
    shop.run()
    (shop.folder / "merge").unlink()
    assert shop.run() == ["merge"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LoraforgeError("the disk is full")])
def test_a_broken_stage_is_resumed_and_what_was_done_is_kept(shop: Shop, error: BaseException) -> None:
    shop.fails["train:b"] = error
    with pytest.raises(type(error)):
        shop.run()
    assert shop.states() == {"train:a": "done", "train:b": "started", "merge": "new", "evaluate": "new"}
    assert shop.run() == ALL[1:]
    assert dict(shop.calls) == {"train:b": True, "merge": False, "evaluate": False}


def test_a_broken_stage_with_other_inputs_is_not_resumed(shop: Shop) -> None:
    shop.fails["train:b"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        shop.run()
    shop.inputs["train:b"] = 2
    shop.run()
    assert ("train:b", False) in shop.calls


def test_results_of_other_inputs_are_refused_with_what_differs(shop: Shop) -> None:
    shop.run()
    shop.inputs["train:b"] = 2
    assert shop.states() == {"train:a": "done", "train:b": "changed", "merge": "changed", "evaluate": "changed"}
    with pytest.raises(LoraforgeError, match=r"(?s)done with other inputs: train:b\n.*value was 1, now 2") as caught:
        shop.run()
    # What only follows from it is not a problem of its own.
    assert not isinstance(caught.value, InputProblems) and shop.calls == []
    shop.inputs["train:a"] = 2
    with pytest.raises(LoraforgeError, match="done with other inputs: train:a, train:b\n"):
        shop.run()
    shop.inputs["train:a"] = 1
    assert shop.run(overwrite=True) == ["train:b", "merge", "evaluate"]
    assert (shop.folder / "train-b").read_text() == "train:b 2"
    assert shop.run() == []


@pytest.mark.parametrize(("start", "ran"), [("merge", ALL[2:]), ("train", ALL), ("train:b", ALL[1:])])
def test_from_does_a_stage_and_all_behind_it_anew(shop: Shop, start: str, ran: list[str]) -> None:
    shop.run()
    assert shop.run(start=start) == ran
    assert [resume for _, resume in shop.calls] == [False] * len(ran)


def test_from_does_what_is_missing_before_it(shop: Shop) -> None:
    assert shop.run(start="evaluate") == ALL


def test_only_runs_one_stage_and_needs_what_it_reads(shop: Shop) -> None:
    assert shop.run(only="train:b") == ["train:b"]
    with pytest.raises(LoraforgeError, match=r"(?s)reads what is not there.*train:a: new"):
        shop.run(only="merge")
    assert shop.run(only="train") == ["train:a", "train:b"]
    assert shop.run(only="merge") == ["merge"]
    assert shop.run() == ["evaluate"]


def test_stages_are_named_with_did_you_mean(shop: Shop) -> None:
    with pytest.raises(UsageError, match="did you mean 'merge'"):
        shop.run(start="mrge")
    with pytest.raises(UsageError, match="exclude each other"):
        shop.run(start="merge", only="merge")


def test_a_torn_record_counts_as_none(shop: Shop) -> None:
    shop.run()
    (shop.folder / "stages" / "merge.json").write_text('{"state": "do')
    assert shop.states()["merge"] == "new"
    assert shop.run() == ["merge"]


def test_the_folder_of_a_run(tmp_path: Path) -> None:
    with run_folder(tmp_path / "a" / "b") as folder:
        assert folder.is_dir()
        with pytest.raises(LoraforgeError, match="another run is at work"), run_folder(folder):
            pass
    assert not folder.exists()  # nothing came into it
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoraforgeError, match=r"(?s)holds something else.*file"), run_folder(tmp_path):
        pass
    with pytest.raises(LoraforgeError, match="a file, not a folder"), run_folder(tmp_path / "file"):
        pass


KILLED = """
import os, signal, sys
from pathlib import Path
from loraforge.pipelines.stages import Stage, choose, run_stages, survey
from loraforge.storage.atomic import new_folder

def action(name, dies):
    def act(resume, progress):
        with new_folder(out / name, True) as folder:
            (folder / "part").write_text(name)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
        return {}
    return act

out, dies = Path(sys.argv[1]), sys.argv[2] == "dies"
stages = [Stage(n, out / n, {}, (), action(n, dies and n == "b")) for n in "abc"]
todo = choose(survey(stages, out))
print([(s.stage.name, s.state) for s in todo])
run_stages(todo, out)
"""


def test_a_killed_run_leaves_whole_outputs_and_goes_on(tmp_path: Path) -> None:
    def run(*how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, str(tmp_path), *how]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("dies").returncode == -signal.SIGKILL
    assert (tmp_path / "a/part").read_text() == "a" and not (tmp_path / "b").exists()
    done = run("lives")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[('b', 'started'), ('c', 'new')]"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "stages"]


def test_fingerprints_follow_what_is_before(shop: Shop) -> None:
    def prints() -> dict[str, str]:
        return {status.stage.name: status.fingerprint for status in survey(shop.stages(), shop.folder)}

    before = prints()
    shop.inputs["train:a"] = 5
    after = prints()
    assert before["train:b"] == after["train:b"]
    assert all(before[name] != after[name] for name in ("train:a", "merge", "evaluate"))
