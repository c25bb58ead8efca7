"""The training arguments of a run: names of transformers.TrainingArguments, checked by type, with our defaults."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraforge.errors import LoraforgeError, UsageError, raise_problems

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

# Names that transformers changed between its releases: whichever the installed one has is used.
_SPELLINGS = (
    ("gradient_checkpointing", "activation_checkpointing"),
    ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ("evaluation_strategy", "eval_strategy"),
)
# Arguments that the program sets itself, and what to use instead.
_OURS = {
    "output_dir": "--out names the folder",
    "use_cpu": "--device cpu",
    "no_cuda": "--device cpu",
    "report_to": "--tensorboard; train_log.jsonl is always written",
    "logging_dir": "--tensorboard",
    "resume_from_checkpoint": "--resume",
    "remove_unused_columns": "rows are made ready by the task",
    "label_names": "labels are those of the task",
    "push_to_hub": "nothing is sent anywhere; upload the folder yourself",
    "local_rank": "the launcher sets it",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "do_train": "this command trains",
    "do_eval": "the task's eval rows",
    "do_predict": "the task's test rows",
    "auto_find_batch_size": "a run that changes its own batch size cannot be repeated; use --batch-size",
    "ignore_data_skip": "a resumed run sees each row as often as one that was never broken",
    "save_only_model": "checkpoints serve --resume, which needs the optimiser; --snapshots keeps adapters alone",
    "restore_callback_states_from_checkpoint": "--resume restores what it needs",
}
# Smallest values; what is below would fail late or train something else.
_LEAST: dict[str, float] = {
    **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps", "warmup_ratio", "max_grad_norm"), 0),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def training_arguments(
    values: Mapping[str, Any],
    out: Path,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    defaults: Mapping[str, Any] | None = None,
    where: object = "train",
) -> TrainingArguments:
    """Training arguments for a folder of checkpoints.

    Args:
        values: What the user set, by the names of transformers.TrainingArguments; texts are read by the type of each.
        out: Folder of the checkpoints.
        device: `cpu`, or a GPU.
        seed: Seed where `values` name none.
        defaults: What the caller would rather have than transformers' defaults; `values` override it.
        where: What to call the values in messages.

    Raises:
        UsageError: An unknown name (with the closest known one), one that the program sets itself, or a value of
            another type; all at once.
        LoraforgeError: Values that contradict each other or that this machine cannot do.
    """
    from transformers import TrainingArguments

    on_cpu = str(device).startswith("cpu")
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16" and on_cpu:
        raise LoraforgeError("float16 does not train on a CPU", where=where, hint="use bf16, or a GPU")
    given = read_arguments(values, where=where)
    if given.get("fp16") and on_cpu:
        raise LoraforgeError("float16 does not train on a CPU", where=where, got="fp16", hint="use bf16, or a GPU")
    ours: dict[str, Any] = {
        "seed": seed,
        "logging_steps": 10,
        "logging_first_step": True,
        "save_strategy": "no",
        **read_arguments(defaults or {}, where="defaults"),
        **given,
        "output_dir": str(out),
        "use_cpu": on_cpu,
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        # A loss that is not finite would be replaced in the log by the mean of the others.
        "logging_nan_inf_filter": False,
        # One file a tensor dictionary; releases without the argument always write safetensors.
        "save_safetensors": True,
    }
    if any(ours.get(name) for name in ("gradient_checkpointing", "activation_checkpointing")):
        # The reentrant form loses gradients where the inputs need none, as with a frozen base.
        kind = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _types())
        ours.setdefault(f"{kind}_kwargs", {"use_reentrant": False})
    if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        ours.setdefault("ddp_backend", "gloo")
    known = _types()
    try:
        made = TrainingArguments(**{key: value for key, value in ours.items() if key in known})
    except (ValueError, TypeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise LoraforgeError("the training arguments cannot be used", where=where, got=reason) from error
    if made.world_size == 1:
        # One process, one GPU: several visible ones would be taken together, with another batch size.
        made._n_gpu = min(1, made.n_gpu)
    return made


def read_arguments(values: Mapping[str, Any], *, where: object = "train") -> dict[str, Any]:
    """The values by the names and types of the installed transformers; nothing is added.

    Raises:
        UsageError: As `training_arguments`.
    """
    known = _types()
    problems: list[LoraforgeError] = []
    read: dict[str, Any] = {}
    for given, value in values.items():
        name = _installed_name(str(given), known)
        value = _moved(given, value, values)
        if name in _OURS or name.startswith("hub_"):
            hint = _OURS.get(name, _OURS["push_to_hub"])
            problems.append(UsageError(f"'{given}' is set by the program", where=where, hint=hint))
        elif name not in known:
            hint = _closest(str(given), {*known} - {*_OURS})
            problems.append(UsageError(f"unknown training argument '{given}'", where=where, hint=hint))
        else:
            try:
                read[name] = _typed(value, known[name])
            except ValueError:
                expected = _type_name(known[name])
                problems.append(
                    UsageError("a training argument has a value of another type", where=f"{where}: {given}",
                               got=repr(value), expected=expected)
                )  # fmt: skip
    problems += [problem for name, value in read.items() if (problem := _range_problem(name, value, where))]
    raise_problems(problems)
    return read


def _range_problem(name: str, value: Any, where: object) -> LoraforgeError | None:
    """What is wrong with a number, if anything."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    expected = None
    if not math.isfinite(value) or value < _LEAST.get(name, -math.inf):
        expected = f"a finite number, {_LEAST[name]:g} or more" if name in _LEAST else "a finite number"
    elif name == "max_steps" and value < 1 and value != -1:
        expected = "1 or more, or -1 for as many as the epochs have"
    elif name == "num_train_epochs" and value <= 0:
        expected = "above 0"
    if expected is None:
        return None
    return UsageError("a training argument is out of range", where=f"{where}: {name}", got=value, expected=expected)


def _installed_name(name: str, known: Mapping[str, Any]) -> str:
    """The installed release's spelling of a name."""
    for pair in _SPELLINGS:
        if name in pair:
            # Where both are known the old one is deprecated.
            return next((spelling for spelling in reversed(pair) if spelling in known), name)
    if name == "warmup_ratio" and name not in known:
        return "warmup_steps"
    if name == "group_by_length" and name not in known:
        return "train_sampling_strategy"
    return name


def _moved(name: object, value: Any, values: Mapping[str, Any]) -> Any:
    """Values of names whose meaning moved into another argument."""
    if name == "group_by_length" and "group_by_length" not in _types():
        return "group_by_length" if _typed(value, bool) else "random"
    if name == "warmup_ratio" and "warmup_ratio" not in _types() and "warmup_steps" in values:
        raise UsageError("warmup_ratio and warmup_steps exclude each other", expected="one of the two")
    return value


def _closest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(repr(word) for word in close)}? " if close else ""
    return f"{meant}names are those of transformers.TrainingArguments"


def _types() -> dict[str, Any]:
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments) if field.init}


def _typed(value: Any, hint: Any) -> Any:
    """A value as a type wants it; texts are read, numbers of another kind are not guessed at.

    Raises:
        ValueError: It is of another type.
    """
    members = set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else {hint}
    plain = {typing.get_origin(member) or member for member in members}
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and type(None) in plain):
        if type(None) in plain:
            return None
        raise ValueError("none")
    if isinstance(value, str):
        return _read_text(value, plain)
    if isinstance(value, bool):
        fits = bool in plain
    elif isinstance(value, int):
        fits = bool(plain & {int, float})
    elif isinstance(value, float):
        if plain & {int} and float not in plain and value.is_integer():
            return int(value)
        fits = float in plain
    elif isinstance(value, Mapping):
        return dict(value) if dict in plain else _refused(value)
    else:
        fits = not plain & {bool, int, float}
    return value if fits else _refused(value)


def _read_text(text: str, plain: set[Any]) -> Any:
    lowered = text.strip().lower()
    if bool in plain and lowered in _TRUE + _FALSE:
        return lowered in _TRUE
    if int in plain and float(lowered).is_integer():
        return int(float(lowered))
    if float in plain:
        return float(lowered)
    if dict in plain and lowered.startswith("{"):
        return json.loads(text)
    if str in plain or any(isinstance(member, type) and issubclass(member, Enum) for member in plain):
        return text
    if list in plain:
        return [part.strip() for part in text.split(",")]
    return _refused(text)


def _refused(value: object) -> Any:
    raise ValueError(repr(value))


def _type_name(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(hint, str(hint).replace("typing.", ""))
