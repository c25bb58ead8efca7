"""What a task is: its files, the fields of its rows, its labels and its metric. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, UsageError, did_you_mean, raise_problems

KINDS = ("auto", "classification", "images", "causal", "text-to-text", "choice")
SPLITS = ("train", "eval", "test")
LOSSES = ("target", "all")
_ID = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One task, as a recipe or a sequence names it.

    Attributes:
        id: Name of the task: letters, digits, `_`, `.`, `-`.
        train: Source of the training rows: file, folder of images, `hf://NAME[#CONFIG][:SPLIT]`, rows in memory, or
            {texts: FILE, labels: FILE}, two files of equally many lines.
        eval: Source of the development rows.
        test: Source of the test rows.
        kind: One of KINDS; `auto` reads it off the rows and the base.
        text: Field or template (`"{goal} ..."`) of the input text; default the field `text`.
        text_pair: Field or template of a second text (pair classification).
        target: Field or template of the answer text (causal, text-to-text); default `target`.
        target_map: What the values of `target` stand for.
        label: Field of the class; default `label`.
        labels: Names of the classes in the order of the head, or {value in the file: name}; default: those of `train`.
        choices: Fields or templates of the choices, or the one field that holds the list (choice tasks).
        answer: Field of the right choice: its index, its text, its letter, or text that ends in its number.
        first_choice: What the file calls the first choice, 0 or 1; default: whole numbers count from 0, numbers in text
            ("2", "answer2") from 1.
        extract: Further fields taken out of others: {name: {field: FIELD, pattern: REGEX, all: false}}; a field is the
            first group of the first match, with `all` the list of all matches.
        columns: Names of the columns of a .csv or .tsv file without a header.
        metric: Metric, or several; the first is the main one. Default: the kind's.
        max_length: Tokens an input is cut to.
        max_target_length: Tokens a target is cut to.
        max_new_tokens: Tokens that are generated for generation metrics.
        loss_on: `target`: the loss is taken on the answer alone; `all`: on the prompt too.
        rows: Largest number of training rows (the first of a shuffle by the seed), or None for all.
        overrides: Training arguments of this task alone.
    """

    id: str
    train: Any = None
    eval: Any = None
    test: Any = None
    kind: str = "auto"
    text: str | None = None
    text_pair: str | None = None
    target: str | None = None
    target_map: Mapping[Any, str] | None = None
    label: str | None = None
    labels: Sequence[str] | Mapping[Any, str] | None = None
    choices: str | Sequence[str] | None = None
    answer: str | None = None
    first_choice: int | None = None
    extract: Mapping[str, Mapping[str, Any]] | None = None
    columns: Sequence[str] | None = None
    metric: str | Sequence[str] | None = None
    max_length: int | None = None
    max_target_length: int | None = None
    max_new_tokens: int | None = None
    loss_on: str = "target"
    rows: int | None = None
    overrides: Mapping[str, Any] | None = None

    def source(self, split: str) -> Any:
        """Where the rows of a split are; None where the task has none."""
        return {"train": self.train, "eval": self.eval, "test": self.test}[split]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics asked for, the main one first; empty for the kind's default."""
        if self.metric is None:
            return ()
        return (self.metric,) if isinstance(self.metric, str) else tuple(self.metric)


KEYS = tuple(field.name for field in fields(TaskSpec))


def parse_task(entry: Mapping[str, Any], where: object, folder: Path | None = None) -> TaskSpec:
    """A task out of a recipe's mapping; relative paths count from `folder`.

    Raises:
        UsageError: An unknown key (with the closest known one).
        LoraforgeError: A value of the wrong kind; all problems at once.
    """
    if not isinstance(entry, Mapping):
        raise LoraforgeError("a task must be an object", where=where, got=type(entry).__name__, expected="{id: ...}")
    problems: list[LoraforgeError] = [
        UsageError(f"unknown key '{key}' of a task", where=where, hint=did_you_mean(str(key), KEYS))
        for key in entry
        if key not in KEYS
    ]
    name = entry.get("id")
    if not isinstance(name, str | int) or not _ID.fullmatch(str(name)):
        got, expected = repr(name), "letters, digits, '_', '.' and '-'"
        problems.append(LoraforgeError("the task has no usable id", where=where, got=got, expected=expected))
    for key, known in (("kind", KINDS), ("loss_on", LOSSES)):
        if entry.get(key) is not None and entry[key] not in known:
            hint = did_you_mean(str(entry[key]), known)
            problems.append(LoraforgeError(f"unknown {key} of a task", where=where, got=repr(entry[key]), hint=hint))
    for key, (fits, expected) in _SHAPES.items():
        if entry.get(key) is not None and not fits(entry[key]):
            what, got = f"'{key}' of a task cannot be this", repr(entry[key])
            problems.append(LoraforgeError(what, where=where, got=got, expected=expected))
    raise_problems(problems)
    values = {key: value for key, value in entry.items() if value is not None} | {"id": str(name)}
    for split in SPLITS:
        if split in values and folder is not None:
            values[split] = _from_folder(values[split], folder)
    return TaskSpec(**values)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_names(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, str) or (_is_names(value) and all(isinstance(entry, str) for entry in value))


def _is_extract(value: Any) -> bool:
    """Whether every rule names a field and a pattern that is a regular expression."""
    rules: list[Any] = list(value.values()) if isinstance(value, Mapping) else [None]
    if not all(isinstance(rule, Mapping) and {"field", "pattern"} <= set(rule) <= _EXTRACT_KEYS for rule in rules):
        return False
    try:
        return all(re.compile(str(rule["pattern"])).groups < 2 for rule in rules)
    except re.error:
        return False


_EXTRACT_KEYS = {"field", "pattern", "all"}
_COUNT = (_is_count, "a whole number above 0")
_FIELD = (lambda value: isinstance(value, str) and value != "", "a field's name or a template")
_MAPPING = (lambda value: isinstance(value, Mapping), "an object {key: value}")
_SHAPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("max_length", "max_target_length", "max_new_tokens", "rows"), _COUNT),
    **dict.fromkeys(("text", "text_pair", "target", "label", "answer"), _FIELD),
    "target_map": _MAPPING,
    "overrides": _MAPPING,
    "labels": (lambda value: isinstance(value, Mapping) or _is_names(value), "a list of names, or {value: name}"),
    "choices": (_is_texts, "a field's name, or a list of fields and templates"),
    "metric": (_is_texts, "a metric's name, or a list of them"),
    "columns": (_is_names, "a list of names"),
    "first_choice": (lambda value: value in (0, 1) and not isinstance(value, bool), "0 or 1"),
    "extract": (_is_extract, "{name: {field: FIELD, pattern: REGEX with one group at most, all: true or false}}"),
}


def _from_folder(source: Any, folder: Path) -> Any:
    """A relative path counted from the folder of the recipe; anything else as it is."""
    if isinstance(source, Mapping):
        return {key: _from_folder(value, folder) for key, value in source.items()}
    if not isinstance(source, str | Path) or str(source).startswith("hf://") or Path(source).is_absolute():
        return source
    return str(folder / source)
