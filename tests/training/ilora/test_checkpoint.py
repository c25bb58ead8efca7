"""Checkpoints: a broken run goes on to the bytes of one that was not, and nothing is taken up that does not fit."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_callback import TrainerCallback

from loraforge.errors import LoraforgeError
from loraforge.storage.files import sha256_of
from loraforge.training.checkpoints import WHOLE, whole_checkpoints
from loraforge.training.ilora.adapters import add_stable, load_pair, save_pair
from loraforge.training.ilora.buffer import ReplayBuffer
from loraforge.training.ilora.checkpoint import BUFFER, STATE, read_state
from loraforge.training.ilora.config import ILoraConfig
from tests.training.ilora.models import bert, class_rows, config, llama, text_rows, trainer, weights

VALUES = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}


class Killed(RuntimeError):
    """Stands for the end of a process."""


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def run(folder, *, settings=None, kill=None, resume=False, build=llama, rows=text_rows, steps=6, **more):
    """A run of task 1; the buffer takes and evicts rows while it runs."""
    settings = settings or config(ilora_buffer_size=6, ema_alpha=0.1)
    tr = trainer(
        build(dropout=0.2), rows(10, 2, task=1), folder, settings, past=rows(5, 1), train=VALUES | {"max_steps": steps},
        kind="causal" if rows is text_rows else "classification",
        callbacks=[KillAt(kill)] if kill else [], **more,
    )  # fmt: skip
    try:
        tr.train(resume_from_checkpoint=str(whole_checkpoints(folder)[-1]) if resume else None)
    except Killed:
        return None
    return tr


def files_of(tr, folder):
    save_pair(tr.model, folder, tr.pairs)
    tr.save_buffer(folder / BUFFER)
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("build", "rows"), [(llama, text_rows), (bert, class_rows)])
def test_a_killed_run_goes_on_to_the_same_bytes(build, rows, tmp_path):
    whole = files_of(run(tmp_path / "a", build=build, rows=rows), tmp_path / "files-a")
    assert run(tmp_path / "b", kill=5, build=build, rows=rows) is None
    assert [path.name for path in whole_checkpoints(tmp_path / "b")] == ["checkpoint-4"]
    continued = files_of(run(tmp_path / "b", resume=True, build=build, rows=rows), tmp_path / "files-b")
    assert whole.keys() == continued.keys() and len(whole) == 5
    for name in whole:
        assert whole[name] == continued[name], name


def test_the_end_of_a_run_is_only_read_again(tmp_path):
    """Killed behind its last step, which is not the last of its epoch: no step more, no row offered twice."""
    whole = run(tmp_path / "a", steps=4)
    assert whole.state.epoch % 1 > 0
    wanted = files_of(whole, tmp_path / "files-a")
    again = run(tmp_path / "a", steps=4, resume=True)
    assert (again.state.global_step, again.state.epoch) == (4, whole.state.epoch)
    assert files_of(again, tmp_path / "files-b") == wanted


def test_what_a_checkpoint_holds(tmp_path):
    tr = run(tmp_path)
    folder = tmp_path / "checkpoint-6"
    assert {path.name for path in folder.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "ema", BUFFER, STATE, WHOLE, "optimizer.pt",
        "scheduler.pt", "trainer_state.json",
    }  # fmt: skip
    record = json.loads((folder / STATE).read_text())
    assert (record["step"], record["ema_step"], record["task_index"], record["role"]) == (6, 6, 1, "checkpoint")
    assert record["config"] == tr.ilora.as_dict()
    for name, path in (("default", folder), ("ema", folder / "ema")):
        assert record["adapters"][name] == sha256_of(path / "adapter_model.safetensors")
    plastic, stable = (load_file(path / "adapter_model.safetensors") for path in (folder, folder / "ema"))
    now = {adapter: list(weights(tr.model, adapter).values()) for adapter in ("default", "ema")}
    for saved, name in ((plastic, "default"), (stable, "ema")):
        key = lambda tensor: (tensor.shape, tensor.flatten().tolist())  # noqa: E731
        assert sorted(map(key, saved.values())) == sorted(map(key, now[name]))
    assert ReplayBuffer.load(folder / BUFFER).histogram() == tr.buffer.histogram()
    assert (folder / BUFFER).stat().st_mode & 0o077 == 0


@pytest.fixture
def broken(tmp_path):
    """The folder of a run that was killed behind its checkpoint 4."""
    run(tmp_path, kill=5)
    return tmp_path


def test_a_missing_stable_adapter_is_an_error(broken):
    shutil.rmtree(broken / "checkpoint-4" / "ema")
    with pytest.raises(LoraforgeError, match="lacks the adapter ema"):
        run(broken, resume=True)


def test_a_missing_or_damaged_part_is_an_error(broken):
    folder = broken / "checkpoint-4"
    weights_file = folder / "ema" / "adapter_model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(bytes(content))
    with pytest.raises(LoraforgeError, match="changed or damaged"):
        run(broken, resume=True)
    content[-1] ^= 1
    weights_file.write_bytes(bytes(content))
    (folder / BUFFER).unlink()
    with pytest.raises(LoraforgeError, match="replay buffer cannot be read"):
        run(broken, resume=True)
    (folder / STATE).unlink()
    with pytest.raises(LoraforgeError, match=f"there is no {STATE}"):
        run(broken, resume=True)
    (folder / STATE).write_text("{")
    with pytest.raises(LoraforgeError, match="cannot be read"):
        run(broken, resume=True)
    (folder / STATE).write_text("{}")
    with pytest.raises(LoraforgeError, match="no known version"):
        read_state(folder / STATE)


def test_other_parameters_or_another_task_are_an_error(broken):
    with pytest.raises(LoraforgeError, match="other parameters") as error:
        run(broken, resume=True, settings=config(ilora_buffer_size=6, ema_alpha=0.2, consistency_weight=0.5))
    assert error.value.got == "ema_alpha=0.1, consistency_weight=1.0"
    assert error.value.expected == "ema_alpha=0.2, consistency_weight=0.5"
    with pytest.raises(LoraforgeError, match="another task"):
        run(broken, resume=True, task_index=2)
    moved = config(ilora_buffer_size=6, ema_alpha=0.1, previous_task_model="elsewhere")
    assert run(broken, resume=True, settings=moved).state.global_step == 6


def test_a_checkpoint_without_its_mark_is_not_taken_up(broken):
    (broken / "checkpoint-4" / WHOLE).unlink()
    assert whole_checkpoints(broken) == []
    tr = trainer(llama(dropout=0.2), text_rows(4), broken, config(), train=VALUES)
    with pytest.raises(LoraforgeError, match="not whole"):
        tr.train(resume_from_checkpoint=str(broken / "checkpoint-4"))


def test_a_full_disk_while_a_checkpoint_is_written(tmp_path):
    """Files end at 8 KB: the optimiser's state does not fit."""
    tr = trainer(llama(), text_rows(10, 2, task=1), tmp_path, config(), past=text_rows(5, 1), train=VALUES)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    try:
        with pytest.raises(LoraforgeError, match="could not be written") as error:
            tr.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.where == str(tmp_path / "checkpoint-2") and "--resume" in error.value.hint
    assert whole_checkpoints(tmp_path) == []


def test_the_best_checkpoint_brings_back_both_adapters_and_the_buffer(tmp_path):
    values = VALUES | {
        "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "score", "greater_is_better": True,
    }  # fmt: skip
    scores = iter([1.0, 3.0, 2.0])
    tr = trainer(
        llama(), text_rows(10, 2, task=1), tmp_path, config(), past=text_rows(5, 1), train=values,
        eval_rows=text_rows(2, 9, task=1), score=lambda model: {"score": next(scores)}, keep=3,
    )  # fmt: skip
    tr.train()
    assert Path(tr.state.best_model_checkpoint).name == "checkpoint-4"
    again = llama(seed=8)
    add_stable(again)
    load_pair(again, tmp_path / "checkpoint-4", tmp_path / "checkpoint-4" / "ema")
    for adapter in ("default", "ema"):
        mine, theirs = weights(tr.model, adapter), weights(again, adapter)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (
        tr.buffer.state_dict()["generator"]
        == ReplayBuffer.load(tmp_path / "checkpoint-4" / BUFFER).state_dict()["generator"]
    )


def test_without_i_lora_a_checkpoint_is_the_plain_one(tmp_path):
    whole = run(tmp_path / "a", settings=ILoraConfig())
    assert not (tmp_path / "a" / "checkpoint-6" / STATE).exists()
    run(tmp_path / "b", settings=ILoraConfig(), kill=5)
    continued = run(tmp_path / "b", settings=ILoraConfig(), resume=True)
    mine, theirs = weights(whole.model), weights(continued.model)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
