"""What a task takes from a row: texts, answers, choices and images, by field or template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from loraforge.calibrate.rows import fields_of, render
from loraforge.errors import LoraforgeError
from loraforge.tasks.spec import TaskSpec

IMAGE_FIELDS = ("image", "file_name", "img")
_ABSENT = object()
_SHOWN = 80


def has_field(item: Mapping[str, Any], name: str) -> bool:
    """Whether a row has a field, also by a dotted path into its objects."""
    return _find(item, name) is not _ABSENT


def take(item: Mapping[str, Any], name: str, where: str, key: str) -> Any:
    """A field of a row; `a.b` looks into the object `a`.

    Args:
        item: The row.
        name: Field, or dotted path.
        where: The row, for messages.
        key: The task's key that names the field.

    Raises:
        LoraforgeError: There is none.
    """
    value = _find(item, name)
    if value is _ABSENT or value is None:
        absent = value is _ABSENT
        seen = ", ".join(map(str, item)) or "none"
        naming = f"name the field in the task, as '{key}: FIELD' (--{key.replace('_', '-')} FIELD); {_hint(key)}"
        raise LoraforgeError(
            f"the row has no field '{name}'" if absent else f"the field '{name}' of the row holds nothing",
            where=where,
            got=f"fields {_short(seen)}" if absent else repr(value),
            expected=f"'{name}', by the task's '{key}'",
            hint=naming if absent else "fill it in, or leave the row out",
        )
    return value


def text_of(item: Mapping[str, Any], source: str, where: str, key: str, *, empty: bool = False) -> str:
    """The text that a field or a template of a row gives.

    Args:
        item: The row.
        source: Field, or a template with fields in braces.
        where: The row, for messages.
        key: The task's key that names it.
        empty: Whether it may be empty.

    Raises:
        LoraforgeError: A field is missing or no text; the text is empty.
    """
    if is_template(source):
        values = {name: _scalar(take(item, name, where, key), name, where) for name in fields_of(source)}
        text = render(source, values)
    else:
        text = _scalar(take(item, source, where, key), source, where)
    if not empty and not text.strip():
        raise LoraforgeError(
            "the text is empty", where=f"{where}, {source}", got=repr(text), expected="at least one word"
        )
    return text


def is_template(source: str) -> bool:
    """Whether a task's entry is a template: it has braces, or is no field's name because of a space."""
    return "{" in source or " " in source


def extend(item: Mapping[str, Any], extract: Mapping[str, Mapping[str, Any]] | None, where: str) -> Mapping[str, Any]:
    """The row with the fields that the task takes out of others.

    Raises:
        LoraforgeError: A pattern does not match.
    """
    if not extract:
        return item
    found = dict(item)
    for name, rule in extract.items():
        text = _scalar(take(found, str(rule["field"]), where, f"extract.{name}"), rule["field"], where)
        matches = [match.group(match.re.groups and 1) for match in re.finditer(rule["pattern"], text, re.DOTALL)]
        if not matches:
            raise LoraforgeError(
                f"the pattern of extract.{name} matches nothing",
                where=f"{where}, {rule['field']}",
                got=repr(text[:_SHOWN]),
                expected=rule["pattern"],
            )
        found[name] = matches if rule.get("all") else matches[0]
    return found


def image_field(item: Mapping[str, Any]) -> str | None:
    """The field of a row that holds its image, or None."""
    return next((name for name in IMAGE_FIELDS if item.get(name) is not None), None)


def target_of(item: Mapping[str, Any], spec: TaskSpec, where: str) -> str:
    """The answer text of a row, after the task's target_map.

    Raises:
        LoraforgeError: Missing, empty, or not in target_map.
    """
    text = text_of(item, spec.target or "target", where, "target")
    if spec.target_map is None:
        return text
    names = {label_name(key): str(name) for key, name in spec.target_map.items()}
    value = text if is_template(spec.target or "") else label_name(_find(item, spec.target or "target"))
    if value not in names:
        expected = ", ".join(names)
        raise LoraforgeError("the target is not in target_map", where=where, got=repr(value), expected=expected)
    return names[value]


def label_name(value: Any) -> str:
    """The name of a class as files write it: 1, 1.0 and "1" are one class, as are true and "true"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def choices_of(item: Mapping[str, Any], spec: TaskSpec, where: str) -> list[str]:
    """The texts of a row's choices.

    Raises:
        LoraforgeError: Missing, no list, empty, fewer than two.
    """
    if isinstance(spec.choices, str) or spec.choices is None:
        name = spec.choices or "choices"
        found = take(item, name, where, "choices")
        if isinstance(found, str) or not isinstance(found, Sequence):
            raise LoraforgeError(
                "the choices of a row are no list",
                where=f"{where}, {name}",
                got=type(found).__name__,
                expected="a list",
            )
        texts = [_scalar(entry, name, where) for entry in found]
    else:
        texts = [text_of(item, source, where, "choices") for source in spec.choices]
    if len(texts) < 2 or not all(text.strip() for text in texts):
        got = _short(repr(texts))
        raise LoraforgeError("a row needs two choices or more, none of them empty", where=where, got=got)
    return texts


def answer_of(item: Mapping[str, Any], choices: Sequence[str], spec: TaskSpec, where: str) -> int:
    """The index of the right choice, from 0.

    Raises:
        LoraforgeError: It is none of the choices.
    """
    value = take(item, spec.answer or "answer", where, "answer")
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    index, first = -1, spec.first_choice
    if isinstance(value, int) and not isinstance(value, bool):
        index = value - (first or 0)
    elif isinstance(value, str):
        text = value.strip()
        number = re.fullmatch(r"[^\d]*(\d+)", text)
        if number is not None:
            index = int(number[1]) - (1 if first is None else first)
        elif len(text) == 1 and text.upper().isascii() and text.isalpha():
            index = ord(text.upper()) - ord("A")
    if not 0 <= index < len(choices):
        raise LoraforgeError(
            "the answer is none of the choices",
            where=f"{where}, {spec.answer or 'answer'}",
            got=repr(value),
            expected=f"the index, number, letter or text of one of {len(choices)} choices",
            hint="'first_choice: 0' or 'first_choice: 1' says what the file calls the first one",
        )
    return index


def _find(item: Mapping[str, Any], name: str) -> Any:
    if name in item:
        return item[name]
    value: Any = item
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _scalar(value: Any, name: object, where: str) -> str:
    if isinstance(value, str | int | float):
        return label_name(value) if isinstance(value, bool | float) else str(value)
    raise LoraforgeError(
        "a field of the row is not text", where=f"{where}, {name}", got=type(value).__name__, expected="a string"
    )


def _hint(key: str) -> str:
    if key == "choices":
        return "a fixed word is written with a space before it, as ' yes'"
    if key in ("label", "answer"):
        return "a .csv or .tsv file without a header needs 'columns'"
    return f"a template such as '{key}: \"{{first}} {{second}}\"' joins several fields"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
