from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraforge.errors import LoraforgeError
from loraforge.storage.leftovers import hold
from loraforge.training.sequence.depends import check_same, differences
from loraforge.training.sequence.layout import STATE, read_json, task_folder
from loraforge.training.sequence.state import DONE, begin, open_run, read_state

DEPENDS: dict[str, Any] = {
    "method": "ilora",
    "base": {"files": {"config.json": "aa", "model.safetensors": "bb"}},
    "train": {"learning_rate": 1e-3},
    "head_labels": [],
    "tasks": [{"id": "a", "train_sha256": "1"}, {"id": "b", "train_sha256": "2"}],
}
ABOUT: dict[str, Any] = {"sequence": {}, "versions": {"torch": "1"}, "processes": 1}


def changed(**values: Any) -> dict[str, Any]:
    return {**DEPENDS, **values}


def test_what_changed_is_named() -> None:
    now = changed(train={"learning_rate": 2e-3, "warmup_steps": 5}, tasks=[DEPENDS["tasks"][0]])
    assert list(differences(DEPENDS, now)) == [
        'tasks[b] was {"id": "b", "train_sha256": "2"}, now not there',
        "train.learning_rate was 0.001, now 0.002",
        "train.warmup_steps was not there, now 5",
    ]


def test_a_changed_base_has_words_of_its_own(tmp_path: Path) -> None:
    base = {"files": {"config.json": "aa", "model.safetensors": "cc"}}
    with pytest.raises(LoraforgeError, match="the base changed since this run began") as caught:
        check_same(DEPENDS, changed(base=base, method="er"), tmp_path)
    assert "base.files.model.safetensors" in str(caught.value) and "method" not in str(caught.value.got)


def test_other_settings_are_refused_and_new_tasks_are_not(tmp_path: Path) -> None:
    with pytest.raises(LoraforgeError, match="other settings or data") as caught:
        check_same(DEPENDS, changed(method="er"), tmp_path)
    assert 'method was "ilora", now "er"' in str(caught.value) and "--out" in str(caught.value)
    check_same(DEPENDS, changed(tasks=[*DEPENDS["tasks"], {"id": "c", "train_sha256": "3"}]), tmp_path)


def test_states_survive_and_finished_tasks_must_be_there(tmp_path: Path) -> None:
    state = begin(tmp_path, depends=DEPENDS, units=("a", "b"), about=ABOUT)
    folder = task_folder(tmp_path, "a")
    folder.mkdir()
    (folder / STATE).write_text("{}")
    state.update("a", state=DONE, steps=3)
    again = begin(tmp_path, depends=DEPENDS, units=("a", "b"), about=ABOUT | {"versions": {"torch": "2"}})
    assert [entry["state"] for entry in again.entries] == [DONE, "pending"] and again.entry("a")["steps"] == 3
    assert read_state(tmp_path).content["versions"] == {"torch": "1"}
    (folder / STATE).unlink()
    with pytest.raises(LoraforgeError, match="a finished task's files are gone"):
        begin(tmp_path, depends=DEPENDS, units=("a", "b"), about=ABOUT)


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(LoraforgeError, match="no training sequence"):
        read_state(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(LoraforgeError, match="holds something else"), open_run(tmp_path, resume=True, overwrite=True):
        pass
    with (
        pytest.raises(LoraforgeError, match="is a file"),
        open_run(tmp_path / "notes.txt", resume=True, overwrite=False),
    ):
        pass


def test_a_run_is_replaced_only_when_asked_to(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    begin(run, depends=DEPENDS, units=("a",), about=ABOUT)
    with pytest.raises(LoraforgeError, match="holds a run already"), open_run(run, resume=False, overwrite=False):
        pass
    with open_run(run, resume=True, overwrite=False):
        assert read_json(run / "sequence.json")
    with open_run(run, resume=False, overwrite=True):
        assert not list(run.iterdir())


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    import os

    handle = hold(tmp_path)
    try:
        with pytest.raises(LoraforgeError, match="another process"), open_run(tmp_path, resume=True, overwrite=False):
            pass
    finally:
        os.close(handle)


def test_a_run_of_another_release_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sequence.json").write_text('{"format": 99, "depends": {}}')
    with pytest.raises(LoraforgeError, match="another release"):
        read_state(tmp_path)
