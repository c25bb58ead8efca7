"""From a command's options to what is measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraforge.cli._tasks import read_tasks
from loraforge.errors import UsageError
from loraforge.tasks.card import read_task_card
from loraforge.tasks.spec import TaskSpec, parse_task

_COUNT = re.compile(r"(\d+)(?::(-?\d+))?")
_FIELDS = ("text_keys", "label_key", "target_key", "train")


def subject_arguments(params: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `open_subject` from a command's parameters (those of `_options.SUBJECT`).

    Raises:
        UsageError: No model, no data, or options that contradict each other.
        LoraforgeError: A task file that cannot be read.
    """
    if params["model"] is None:
        raise UsageError("--model is missing", expected="--model MODEL")
    labels = params["labels"]
    return {
        "model": params["model"],
        "adapter": params["adapter"],
        "task": read_spec(params),
        "split": params["split"],
        **read_subset_option(params["subset"]),
        "dtype": params["dtype"],
        "device": params["device"] or "auto",
        "seed": params["seed"],
        "labels": None if labels is None else [name.strip() for name in labels.split(",")],
        "batch_size": params["batch_size"],
        "order": params["order"] or "length",
    }


def read_spec(params: Mapping[str, Any]) -> TaskSpec:
    """The task of --task, or of --data and the options beside it; without labels where the objective is lm.

    Raises:
        UsageError: Neither or both; options that a task file answers itself.
        LoraforgeError: The file is no task.
    """
    task, data = params["task"], params["data"]
    if (task is None) == (data is None):
        raise UsageError("one of --task and --data says what is measured on", expected="--task FILE.yaml, --data FILE")
    if task is not None:
        given = [f"--{key.replace('_', '-')}" for key in _FIELDS if params[key] is not None]
        if given:
            raise UsageError("a task's own file says what these options would", where=task, got=", ".join(given))
        (spec,) = read_tasks([task] if Path(task).suffix in (".yaml", ".yml") else [f"task={task}"], None, split="test")
    else:
        first, _, second = (params["text_keys"] or "").partition(",")
        fields = {"text": first.strip() or None, "text_pair": second.strip() or None, "label": params["label_key"],
                  "target": params["target_key"], "train": params["train"]}  # fmt: skip
        name = _trained_for(params) or re.sub(r"[^A-Za-z0-9_.-]", "-", Path(data).stem) or "data"
        spec = parse_task({"id": name, params["split"]: data, **fields}, f"--data {data}")
    if params["labels"] is not None and spec.labels is None:
        spec = replace(spec, labels=[name.strip() for name in params["labels"].split(",")])
    if params["max_length"] is not None:
        spec = replace(spec, max_length=params["max_length"])
    if params["objective"] == "lm" and spec.kind == "auto":
        spec = replace(spec, kind="causal", loss_on="all")
    return spec


def _trained_for(params: Mapping[str, Any]) -> str | None:
    """The task of the adapter's or model's task.json, whose text fields and length then hold for --data too."""
    place = params["adapter"] or params["model"]
    card = None if place is None else read_task_card(Path(place))
    return None if card is None else str(card["id"])


def read_subset_option(value: str | None) -> dict[str, Any]:
    """`subset` and `subset_seed` of `open_subject` from N, N:SEED or a file."""
    found = _COUNT.fullmatch(value or "")
    if found is None:
        return {"subset": value}
    count, seed = found.groups()
    if int(count) < 1:
        raise UsageError("--subset takes a number above 0", got=value)
    return {"subset": int(count)} | ({} if seed is None else {"subset_seed": int(seed)})
