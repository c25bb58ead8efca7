"""The model that a task needs: the base with the right head, and which of its weights the base's file lacks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraforge.calibrate.base import dtype_of, load_config, load_weights
from loraforge.calibrate.checks import text_config
from loraforge.errors import LoraforgeError
from loraforge.tasks.encode import pad_token_id_of

_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "text-to-text": "AutoModelForSeq2SeqLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "causal": "AutoModelForCausalLM",
    "choice": "AutoModelForCausalLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "images": "AutoModelForImageClassification",
}
_CAPTIONS = ("AutoModelForImageTextToText", "AutoModelForVision2Seq")
_HEADED = ("classification", "images")
_MADE_UP = re.compile(r"LABEL_\d+")


def load_model(
    base: str | Path | nn.Module,
    kind: str,
    *,
    head_labels: Sequence[str] = (),
    task_type: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    seed: int = 0,
    trainable: bool = False,
) -> tuple[nn.Module, Any, tuple[str, ...]]:
    """The base as a model of a kind of task, in evaluation mode.

    Args:
        base: Folder, id in the local cache, or a model in memory, which is used as it is.
        kind: Of the task.
        head_labels: Names of the rows of the classification head.
        task_type: PEFT's task type, where it says more than the kind.
        dtype: Of the weights.
        device: Where to put it; `meta` for its shapes alone, without reading the weights.
        seed: Of the weights that the base's file does not have.
        trainable: Whether its weights take gradients.

    Returns:
        The model, its configuration, and the modules of the head whose weights the base's file does not have or has
        for other classes: an adapter must carry them (`modules_to_save`).

    Raises:
        LoraforgeError: The base is not there, damaged, or no model of this kind.
    """
    if isinstance(base, nn.Module):
        return base.requires_grad_(trainable), getattr(base, "config", None), ()
    config = load_config(base)
    other = False
    options: dict[str, Any] = {}
    if kind in _HEADED:
        if len(head_labels) < 2:
            got, expected = ", ".join(head_labels) or "none", "two names or more"
            raise LoraforgeError("a classification head needs its classes", where=base, got=got, expected=expected)
        known = [name for _, name in sorted((config.id2label or {}).items(), key=lambda item: int(item[0]))]
        other = known != list(head_labels) and not all(_MADE_UP.fullmatch(name) for name in known)
        config.num_labels = len(head_labels)
        config.id2label = dict(enumerate(head_labels))
        config.label2id = {name: i for i, name in enumerate(head_labels)}
        # One label alone, or float labels, would make transformers turn to regression.
        config.problem_type = "single_label_classification"
        options["ignore_mismatched_sizes"] = True
    cls = _class_of(kind, config, task_type, base)
    if str(device) == "meta":
        with torch.device("meta"):
            model = cls.from_config(config, dtype=dtype_of(dtype))
        return model.eval().requires_grad_(trainable), config, tuple(_outside(model)) if kind in _HEADED else ()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, missing = load_weights(cls, base, config, dtype_of(dtype), **options)
    fresh = _fresh(model, missing, kind, base)
    if other:
        fresh = tuple(dict.fromkeys([*fresh, *_outside(model)]))
    # Heads that read the last token, and generation, must know the padding.
    if kind in ("causal", "choice") and getattr(model, "loss_type", "") is None:
        # transformers finds the loss by the class's name; GPT2LMHeadModel's says nothing, and it would say so.
        model.loss_type = "ForCausalLM"  # type: ignore[assignment]
    config = getattr(model, "config", config)
    if text_config(config, "pad_token_id") is None:
        config.pad_token_id = pad_token_id_of(None, config)
    return model.to(device).eval().requires_grad_(trainable), config, fresh


def _class_of(kind: str, config: Any, task_type: str | None, base: object) -> Any:
    """The class of transformers for a kind of task."""
    import transformers

    names: list[str] = [_CLASSES[task_type] if task_type in _CLASSES else _CLASSES[kind]]
    if kind == "choice" and getattr(config, "is_encoder_decoder", False):
        names = [_CLASSES["text-to-text"]]
    if kind in ("causal", "choice") and getattr(config, "vision_config", None) is not None:
        names = [*_CAPTIONS, *names]
    for name in names:
        cls = getattr(transformers, name, None)
        if cls is not None and type(config) in cls._model_mapping:
            return cls
    raise LoraforgeError(
        f"the base cannot do a task of kind '{kind}'",
        where=base,
        got=type(config).__name__,
        expected=f"a base that {names[-1]} of transformers can load",
    )


def _fresh(model: nn.Module, missing: set[str], kind: str, base: object) -> tuple[str, ...]:
    """The largest modules of which the base's file has no weight.

    Raises:
        LoraforgeError: They are more than a head: the file is of another model, or incomplete.
    """
    owned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    lacking = sorted(missing & owned)
    prefix = getattr(model, "base_model_prefix", "")
    body = [name for name in lacking if prefix and name.startswith(f"{prefix}.") and "pooler" not in name]
    wrong = body if kind in _HEADED else lacking
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise LoraforgeError(
            f"the base's file lacks weights that a task of kind '{kind}' needs",
            where=base,
            got=f"no {', '.join(wrong[:3])}{more}",
            expected=f"all weights of {type(model).__name__}",
            hint="use a base that was trained as such a model, or copy the base again",
        )
    found: list[str] = []
    for name in lacking:
        parts = name.split(".")
        tops = (".".join(parts[:end]) for end in range(1, len(parts)))
        found.append(next(top for top in tops if all(p in missing for p in owned if p.startswith(f"{top}."))))
    return tuple(dict.fromkeys(found))


def _outside(model: nn.Module) -> list[str]:
    """The modules with weights beside the base model: its head."""
    prefix = getattr(model, "base_model_prefix", "")
    return [name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())]
