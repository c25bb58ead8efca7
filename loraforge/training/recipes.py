"""Settings that come with the program: those of the document that compares LoRA with full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loraforge.errors import UsageError, did_you_mean

# Evaluated and saved each epoch, the best by accuracy reloaded, inputs cut to 256 tokens.
_DOCUMENT = {
    "num_train_epochs": 20.0,
    "per_device_train_batch_size": 128,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
}


@dataclass(frozen=True)
class Recipe:
    """Settings that options override.

    Attributes:
        method: `lora` or `full`.
        train: Training arguments.
        lora: LoRA options.
        max_length: Tokens an input is cut to.
    """

    method: str
    train: Mapping[str, Any]
    lora: Mapping[str, Any] = field(default_factory=dict)
    max_length: int | None = None


RECIPES = {
    # `dense` is the document's word: it names the feed-forward layers and the pooler too, not the output projection
    # of the attention alone.
    "document-lora": Recipe(
        "lora",
        {**_DOCUMENT, "learning_rate": 2e-4},
        {"r": 8, "alpha": 16, "dropout": 0.1, "targets": ["query_proj", "key_proj", "value_proj", "dense"]},
        256,
    ),
    "document-full": Recipe("full", {**_DOCUMENT, "learning_rate": 1e-5}, max_length=256),
}


def find_recipe(name: str | None, method: str) -> Recipe:
    """The recipe of a name; an empty one for None.

    Raises:
        UsageError: An unknown name, or one of the other method.
    """
    if name is None:
        return Recipe(method, {})
    fitting = [known for known, recipe in RECIPES.items() if recipe.method == method]
    if name not in RECIPES:
        raise UsageError(f"unknown recipe '{name}'", hint=did_you_mean(name, fitting))
    if RECIPES[name].method != method:
        raise UsageError(f"recipe '{name}' is for train-{RECIPES[name].method}", expected=", ".join(fitting))
    return RECIPES[name]
