from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from loraforge.errors import LoraforgeError
from loraforge.training.ilora.config import ILoraConfig
from loraforge.training.sequence.layout import find_previous, read_json, task_folder, write_json


def adapter(folder: Path, role: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")
    if role:
        (folder / "ilora_state.json").write_text(f'{{"role": "{role}"}}')
    return folder


def config(**values: object) -> ILoraConfig:
    return ILoraConfig(use_ilora=True, **values)  # type: ignore[arg-type]


def test_a_first_task_has_nothing_before_it(tmp_path: Path) -> None:
    assert find_previous(config(), tmp_path, None) is None


def test_the_order_of_places(tmp_path: Path) -> None:
    named = adapter(tmp_path / "named")
    in_task = adapter(task_folder(tmp_path / "other", "a") / "ema")
    beside = adapter(tmp_path / "other" / "ema")
    root = adapter(tmp_path / "other", role="ema")
    settings = {"previous_task_model": str(tmp_path / "other"), "prev_task_id": "a"}
    for wanted, values in (
        (named, {**settings, "ema_adapter_path": str(named)}),
        (in_task, settings),
        (beside, {**settings, "prev_task_id": "b"}),
    ):
        found = find_previous(config(**values), tmp_path / "run", None)
        assert found is not None and found.ema == wanted and found.tried[-1] == str(wanted)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (beside / name).unlink()
    found = find_previous(config(previous_task_model=str(root)), tmp_path / "run", None)
    assert found is not None and found.ema == root


def test_a_folder_that_is_not_said_to_be_an_ema_adapter_is_none(tmp_path: Path) -> None:
    adapter(tmp_path / "other", role="default")
    with pytest.raises(LoraforgeError) as caught:
        find_previous(config(previous_task_model=str(tmp_path / "other")), tmp_path, None)
    told = str(caught.value)
    assert "ema adapter of the task before is nowhere" in told
    assert str(tmp_path / "other" / "ema") in told and "role=ema" in told and "ema_adapter_path" in told


def test_the_plastic_adapter_is_never_taken_instead_unless_asked_for(tmp_path: Path) -> None:
    plastic = adapter(task_folder(tmp_path, "a") / "default")
    with pytest.raises(LoraforgeError, match="nowhere"):
        find_previous(config(), tmp_path, "a")
    found = find_previous(config(handover="default_to_both"), tmp_path, "a")
    assert found is not None and found.default == plastic


def test_the_plastic_adapter_and_the_buffer_lie_beside_the_stable_one(tmp_path: Path) -> None:
    folder = task_folder(tmp_path, "a")
    adapter(folder / "ema")
    with pytest.raises(LoraforgeError, match="default adapter of the task before"):
        find_previous(config(handover="restore_both"), tmp_path, "a")
    adapter(folder / "default")
    (folder / "buffer.safetensors").touch()
    found = find_previous(config(handover="restore_both"), tmp_path, "a")
    assert found is not None and found.default == folder / "default" and found.buffer == folder / "buffer.safetensors"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sequence.json"
    write_json(path, {"a": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["sequence.json"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "sequence.json"
    for text, message in (("{", "cannot be read"), ("[]", "not what it should be")):
        path.write_text(text)
        with pytest.raises(LoraforgeError, match=message) as caught:
            read_json(path)
        assert str(path) in str(caught.value)
    assert read_json(tmp_path / "none.json") == {}
