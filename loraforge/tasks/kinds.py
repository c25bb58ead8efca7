"""Which kind a task is, read off its rows and the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraforge.calibrate.base import load_config
from loraforge.calibrate.encode import model_kind
from loraforge.errors import LoraforgeError
from loraforge.tasks.fields import has_field, image_field
from loraforge.tasks.rows import read_rows
from loraforge.tasks.spec import SPLITS, TaskSpec

_TASK_TYPES = {
    "classification": "SEQ_CLS",
    "text-to-text": "SEQ_2_SEQ_LM",
    "causal": "CAUSAL_LM",
    "choice": "CAUSAL_LM",
    "images": None,
}


def task_type_of(kind: str, config: Any = None) -> str | None:
    """PEFT's task type of a kind of task, or None where PEFT has none.

    It has none for images, nor for captions: its causal models pass on inputs that a model of images and text, known by
    its configuration's vision part, does not take.
    """
    return None if getattr(config, "vision_config", None) is not None else _TASK_TYPES[kind]


def resolve_kind(
    spec: TaskSpec, *, base: object = None, config: Any = None, item: Mapping[str, Any] | None = None
) -> str:
    """The kind of a task: what it says itself, or what its rows and the base make of it.

    `choices` make a choice task; an image with a label `images`, with a text or target captions (`causal`); a target
    text-to-text where the base is an encoder-decoder, else causal; a label classification. Rows with both are
    classified by an encoder and answered by the others.

    Args:
        spec: The task.
        base: Folder or id of the base, to read its configuration; not needed with `config`.
        config: The base's configuration.
        item: One row, where the rows have been read already.

    Raises:
        LoraforgeError: The rows do not say; the base cannot do this kind.
    """
    if config is None and base is not None:
        config = getattr(base, "config", None) or load_config(base)  # type: ignore[arg-type]
    kind = spec.kind if spec.kind != "auto" else _read_off(spec, config, _first(spec) if item is None else item)
    _check_base(kind, config, spec)
    return kind


def _first(spec: TaskSpec) -> Mapping[str, Any]:
    """The first row of the first split that the task has."""
    rows = read_rows(spec, next((split for split in SPLITS if spec.source(split) is not None), "train"))
    return rows.items[0]


def _read_off(spec: TaskSpec, config: Any, item: Mapping[str, Any]) -> str:
    answers = "text-to-text" if getattr(config, "is_encoder_decoder", False) else "causal"
    if spec.choices is not None or (has_field(item, "choices") and has_field(item, spec.answer or "answer")):
        return "choice"
    target = spec.target is not None or has_field(item, "target")
    label = spec.label is not None or spec.labels is not None or has_field(item, "label")
    if image_field(item) is not None:
        return "causal" if target or not label else "images"
    if spec.target is not None and spec.label is None:
        return answers
    if label and target:
        encoder = config is None or model_kind(config) == "encoder"
        return "classification" if encoder or spec.label is not None else answers
    if label or target:
        return "classification" if label else answers
    if spec.loss_on == "all":
        return "causal"
    raise LoraforgeError(
        "the rows of the task do not say what is to be learnt",
        where=f"task '{spec.id}'",
        got=f"fields {', '.join(map(str, item))}",
        expected="a field 'label' (classes) or 'target' (an answer), or the task's 'label', 'target' or 'choices'",
        hint="a .csv or .tsv file without a header needs 'columns'; 'loss_on: all' trains on plain text",
    )


def _check_base(kind: str, config: Any, spec: TaskSpec) -> None:
    both = bool(getattr(config, "is_encoder_decoder", False))
    if both and spec.loss_on == "all" and kind in ("text-to-text", "choice"):
        raise LoraforgeError(
            "'loss_on: all' is for causal models: an encoder-decoder reads its prompt and learns the answer",
            where=f"task '{spec.id}'",
            got=type(config).__name__,
            expected="loss_on: target",
        )
    if config is None or kind not in ("text-to-text", "causal") or both == (kind == "text-to-text"):
        return
    raise LoraforgeError(
        f"the base cannot do a task of kind '{kind}'",
        where=f"task '{spec.id}'",
        got=f"{type(config).__name__}, {'an encoder-decoder' if both else 'no encoder-decoder'}",
        expected=f"kind: {'text-to-text' if both else 'causal'}",
        hint="leave 'kind' out and it is read off the rows and the base",
    )
