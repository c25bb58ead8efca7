"""When a run evaluates, saves and stops, made of what the user set and what the task has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraforge.errors import LoraforgeError, UsageError, raise_problems
from loraforge.training.arguments import read_arguments

# Kinds whose metric is cheap enough to be taken at every evaluation; the others generate text.
SCORED_KINDS = ("classification", "images", "choice")
_LOWER_IS_BETTER = ("loss", "perplexity")


@dataclass(frozen=True)
class Plan:
    """How a run goes.

    Attributes:
        arguments: For `training_arguments`.
        best: Metric of the eval rows whose best checkpoint is reloaded at the end, or None for the last weights.
        greater_is_better: Its direction.
        patience: Evaluations without a new best after which the run ends, or None.
        scored: Whether metrics are taken at every evaluation, beside the loss.
        keep: Checkpoints that stay beside the best, until the run is done.
    """

    arguments: dict[str, Any]
    best: str | None
    greater_is_better: bool
    patience: int | None
    scored: bool
    keep: int


def make_plan(
    values: Mapping[str, Any], kind: str, main_metric: str, *, evaluates: bool, early_stopping: int | None
) -> Plan:
    """Settles what depends on the task.

    Args:
        values: Training arguments as the user set them.
        kind: Of the task.
        main_metric: Of the task.
        evaluates: Whether the task has eval rows.
        early_stopping: Evaluations without a new best, or None.

    Raises:
        UsageError: As `read_arguments`; settings that contradict each other.
        LoraforgeError: Evaluation is asked for and there are no eval rows, or weights that are dealt out to several
            processes would have to be scored.
    """
    given = read_arguments(values)
    sharded = is_sharded(given)
    best = bool(given.get("load_best_model_at_end", early_stopping is not None))
    eval_strategy = str(given.get("eval_strategy", "epoch" if evaluates else "no"))
    save_strategy = str(given.get("save_strategy", eval_strategy if best else "epoch"))
    metric = str(
        given.get("metric_for_best_model") or (main_metric if kind in SCORED_KINDS and not sharded else "loss")
    )
    metric = metric.removeprefix("eval_")
    problems: list[LoraforgeError] = []
    if early_stopping is not None and early_stopping < 1:
        problems.append(UsageError("--early-stopping", got=early_stopping, expected="evaluations, above 0"))
    if not evaluates and (best or eval_strategy != "no"):
        what = "early stopping" if early_stopping else "the best model" if best else f"eval_strategy={eval_strategy}"
        problems.append(LoraforgeError(f"{what} needs eval rows, and the task has none", hint="--eval FILE"))
    elif best and eval_strategy == "no":
        problems.append(UsageError("the best model needs evaluations", where="eval_strategy", got="no"))
    if save_strategy == "best":
        hint = "load_best_model_at_end=true keeps and reloads the best"
        problems.append(UsageError("save_strategy=best keeps nothing to resume from", where="save_strategy", hint=hint))
    if sharded and metric != "loss":
        problems.append(
            LoraforgeError("metrics cannot be taken while weights are dealt out (FSDP, DeepSpeed)",
                           where="metric_for_best_model", got=metric, expected="loss")
        )  # fmt: skip
    raise_problems(problems)
    arguments = {**given, "eval_strategy": eval_strategy, "save_strategy": save_strategy}
    if save_strategy == "steps" and "save_steps" not in given and "eval_steps" in given:
        arguments["save_steps"] = given["eval_steps"]
    keep = int(arguments.pop("save_total_limit", None) or 1)
    greater = bool(given.get("greater_is_better", metric not in _LOWER_IS_BETTER))
    if best:
        arguments |= {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": greater}
    scored = evaluates and not sharded and (kind in SCORED_KINDS or (best and metric != "loss"))
    return Plan(arguments, metric if best else None, greater, early_stopping, scored, keep)


def is_sharded(given: Mapping[str, Any]) -> bool:
    """Whether an engine deals the weights out to the processes: by these arguments or by the launcher's."""
    launched = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    return launched or bool(given.get("fsdp")) or bool(given.get("deepspeed"))
