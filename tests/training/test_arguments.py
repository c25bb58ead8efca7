from __future__ import annotations

from pathlib import Path

import pytest

from loraforge.errors import InputProblems, LoraforgeError, UsageError
from loraforge.training.arguments import read_arguments, training_arguments


def test_defaults_of_the_program(tmp_path: Path) -> None:
    made = training_arguments({}, tmp_path, device="cpu", seed=7)
    assert (made.seed, made.use_cpu, made.remove_unused_columns, made.report_to) == (7, True, False, [])
    assert (made.logging_steps, made.dataloader_num_workers, made.disable_tqdm) == (10, 0, True)
    assert made.logging_nan_inf_filter is False
    assert not list(tmp_path.iterdir())


def test_values_override_defaults_and_texts_are_read(tmp_path: Path) -> None:
    values = {"learning_rate": "2e-4", "num_train_epochs": "3", "seed": 5, "bf16": "true", "max_grad_norm": 1}
    made = training_arguments(values, tmp_path, seed=7, defaults={"learning_rate": 1.0, "weight_decay": 0.5})
    assert (made.learning_rate, made.num_train_epochs, made.seed, made.bf16) == (2e-4, 3.0, 5, True)
    assert (made.weight_decay, made.max_grad_norm) == (0.5, 1)


def test_names_of_other_releases_are_known(tmp_path: Path) -> None:
    values = {"gradient_checkpointing": True, "warmup_ratio": 0.1, "evaluation_strategy": "epoch"}
    made = training_arguments(values, tmp_path)
    assert made.gradient_checkpointing is True
    assert made.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert made.get_warmup_steps(100) == 10
    assert str(made.eval_strategy.value) == "epoch"


def test_all_wrong_values_come_at_once() -> None:
    values = {"learning_rat": 1, "num_train_epochs": "x", "output_dir": "a", "per_device_train_batch_size": True}
    with pytest.raises(InputProblems) as raised:
        read_arguments(values)
    text = str(raised.value)
    assert "did you mean 'learning_rate'" in text
    assert "train: num_train_epochs" in text and "a number" in text
    assert "'output_dir' is set by the program" in text and "--out" in text
    assert "train: per_device_train_batch_size" in text and "a whole number" in text


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", "-1", "0 or more"),
        ("learning_rate", "nan", "finite"),
        ("max_steps", -5, "-1 for as many"),
        ("max_steps", 0, "1 or more"),
        ("num_train_epochs", 0, "above 0"),
        ("per_device_train_batch_size", 0, "1 or more"),
        ("gradient_accumulation_steps", -2, "1 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, value: object, expected: str) -> None:
    with pytest.raises(UsageError, match=f"(?s)out of range.*train: {name}.*{expected}"):
        read_arguments({name: value})


def test_all_steps_of_the_epochs() -> None:
    assert read_arguments({"max_steps": -1, "warmup_steps": 0.5})["max_steps"] == -1


@pytest.mark.parametrize("name", ["push_to_hub", "hub_token", "report_to", "auto_find_batch_size"])
def test_what_the_program_settles_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' is set by the program"):
        read_arguments({name: True})


def test_impossible_combinations_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(LoraforgeError, match="float16 does not train on a CPU"):
        training_arguments({"fp16": True}, tmp_path)
    with pytest.raises(LoraforgeError, match="cannot be used"):
        training_arguments({"lr_scheduler_type": "no_such"}, tmp_path)
    with pytest.raises(UsageError, match="exclude each other"):
        read_arguments({"warmup_ratio": 0.1, "warmup_steps": 3})
