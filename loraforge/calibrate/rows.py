"""Rows of text from JSON files, Python lists and `hf://` data sets: text, target, label and image of each."""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraforge.calibrate.checks import report_problems
from loraforge.errors import LoraforgeError

DOWNLOAD_ENV = "LORAFORGE_ALLOW_DOWNLOAD"
_HF_ADDRESS = re.compile(r"hf://(?P<name>[^#:]+)(#(?P<config>[^:]+))?(:(?P<split>.+))?")
IMAGE_FIELDS = ("image", "file_name")


def local_only() -> bool:
    """Whether nothing may be fetched: always, unless the environment says otherwise (LORAFORGE_ALLOW_DOWNLOAD=1)."""
    return os.environ.get(DOWNLOAD_ENV) != "1"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source: what to call it in messages, and its parts."""

    where: str
    text: str | None
    target: str | None
    label: Any
    image: str | None


@dataclass(frozen=True)
class RowFormat:
    """Which fields of a row make its text, target and label.

    Attributes:
        template: Text with fields in braces, as "Question: {goal}"; None takes the field `text`.
        target: Field, or a template; None takes the field `target` where a row has it.
        target_map: What the values of `target` stand for, as {0: "no", 1: "yes"}.
        label_field: Field of the class, for balancing; None takes `label`, else the target.
    """

    template: str | None = None
    target: str | None = None
    target_map: Mapping[Any, str] | None = None
    label_field: str | None = None

    def __post_init__(self) -> None:
        if self.template is not None and not fields_of(self.template):
            raise LoraforgeError(
                "the template names no field, so every row would give the same text",
                where="template",
                got=repr(self.template),
                expected="fields in braces, as '{text}'",
            )


def fields_of(template: str) -> list[str]:
    """The fields that a template names.

    Raises:
        LoraforgeError: Unbalanced braces, or anything in braces but a field's name.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise LoraforgeError(
            "the template is not well formed", where="template", got=repr(template), hint=str(error)
        ) from error
    names = [name for _, name, _, _ in parts if name is not None]
    bad = [p for p in parts if p[1] is not None and (not re.fullmatch(r"[\w-]+", p[1]) or p[2] or p[3])]
    if bad:
        raise LoraforgeError(
            "a template may name fields only",
            where="template",
            got=repr(template),
            expected="{field}; a literal brace is written twice",
        )
    return names


def render(template: str, values: Mapping[str, Any]) -> str:
    """The template with the values of its fields put in."""
    return "".join(
        literal + ("" if name is None else str(values[name]))
        for literal, name, _, _ in string.Formatter().parse(template)
    )


def parse_rows(objects: Iterable[tuple[str, Any]], fmt: RowFormat, where: object) -> list[Row]:
    """Rows from objects, each with what to call it.

    Raises:
        LoraforgeError: No row, a row of the wrong type, a missing field, empty text, targets in some rows only; the
            first problems are shown at once.
    """
    problems: list[LoraforgeError] = []
    rows: list[Row] = []
    for name, item in objects:
        try:
            rows.append(_parse_row(name, item, fmt, f"{where}, {name}"))
        except LoraforgeError as problem:
            problems.append(problem)
    report_problems(problems)
    if not rows:
        raise LoraforgeError("the calibration file is empty", where=where, got="no rows", expected="one object a row")
    for part in ("text", "target", "image"):
        absent = [row.where for row in rows if getattr(row, part) is None]
        if 0 < len(absent) < len(rows):
            raise LoraforgeError(
                f"only some rows have a {part}",
                where=f"{where}, {absent[0]}",
                got=f"{len(absent)} of {len(rows)} without",
            )
    return rows


def read_text(path: Path) -> str:
    """The text of a data file, without a byte order mark.

    Raises:
        LoraforgeError: Unreadable, not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise LoraforgeError("the data file cannot be read", where=path, got=error.strerror) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise LoraforgeError(
            "the data file is not UTF-8 text",
            where=f"{path}, line {line}",
            got=f"byte 0x{error.object[error.start]:02x}",
            expected="UTF-8",
            hint="convert the file to UTF-8",
        ) from error


def read_json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, object) pairs of a .jsonl file (a line each) or a .json file (one list).

    Raises:
        LoraforgeError: Unreadable, not UTF-8, not JSON, not a list.
    """
    content = read_text(path)
    if path.suffix.lower() == ".jsonl":
        # Not splitlines(): JSON strings may hold other line separators than \n.
        lines = ((f"line {i}", line) for i, line in enumerate(content.split("\n"), 1) if line.strip())
        yield from ((name, _parse_json(line, f"{path}, {name}")) for name, line in lines)
        return
    if not content.strip():
        return
    items = _parse_json(content, str(path))
    if not isinstance(items, list):
        raise LoraforgeError(
            "a .json data file holds one list of objects",
            where=path,
            got=type(items).__name__,
            expected='[{"text": "..."}, ...]',
            hint="for one object a line name the file .jsonl",
        )
    yield from ((f"row {i}", item) for i, item in enumerate(items, 1))


def read_hub_rows(address: str) -> Iterator[tuple[str, Any]]:
    """(name, object) pairs of `hf://NAME[#CONFIG][:SPLIT]`, through the `datasets` library.

    Its cache alone is read unless the environment allows downloads (LORAFORGE_ALLOW_DOWNLOAD=1).

    Raises:
        LoraforgeError: Not such an address, the library is not installed, the data set is not there.
    """
    match = _HF_ADDRESS.fullmatch(address)
    if match is None:
        raise LoraforgeError("not the address of a data set", where=address, expected="hf://NAME[#CONFIG][:SPLIT]")
    try:
        import datasets
    except ImportError as error:
        raise LoraforgeError(
            "hf:// sources need the library 'datasets', which is not installed",
            where=address,
            hint="pip install 'loraforge[data]'",
        ) from error
    offline = local_only()
    try:
        rows = datasets.load_dataset(
            match["name"],
            match["config"],
            split=match["split"] or "train",
            download_config=datasets.DownloadConfig(local_files_only=offline),
        )
    except (OSError, ValueError) as error:  # datasets' own errors derive from these two
        raise LoraforgeError(
            "the data set cannot be loaded",
            where=address,
            got=str(error).strip().split("\n")[0],
            hint=f"set {DOWNLOAD_ENV}=1 to fetch it, or give a .jsonl file" if offline else "give a .jsonl file",
        ) from error
    yield from ((f"row {i}", dict(row)) for i, row in enumerate(rows, 1))


def _parse_json(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        place = where if error.lineno == 1 else f"{where}, line {error.lineno}"
        raise LoraforgeError(
            "the row is not valid JSON", where=place, got=f"{error.msg} at column {error.colno}"
        ) from error


def _parse_row(name: str, item: Any, fmt: RowFormat, where: str) -> Row:
    if isinstance(item, str) and fmt.template is None:
        item = {"text": item}
    if not isinstance(item, Mapping):
        raise LoraforgeError(
            "a row must be an object", where=where, got=type(item).__name__, expected='{"text": "..."}'
        )
    image = next((item[f] for f in IMAGE_FIELDS if isinstance(item.get(f), str)), None)
    text = None
    if fmt.template is not None:
        text = _fill(fmt.template, item, where)
    elif "text" in item or image is None:
        text = _field(item, "text", where)
        if not isinstance(text, str):
            raise LoraforgeError(
                "the text is not text", where=f"{where}, text", got=type(text).__name__, expected="a string"
            )
    if text is not None and not text.strip():
        raise LoraforgeError("the text is empty", where=where, got=repr(text), expected="at least one word")
    target = _target(item, fmt, where)
    label = _field(item, fmt.label_field, where) if fmt.label_field else item.get("label", target)
    return Row(name, text, target, label, image)


def _target(item: Mapping[str, Any], fmt: RowFormat, where: str) -> str | None:
    if fmt.target is None and item.get("target") is None:
        return None
    if fmt.target is not None and "{" in fmt.target:
        value: Any = _fill(fmt.target, item, where)
    else:
        value = _field(item, fmt.target or "target", where)
    if fmt.target_map is not None:
        names = {str(key): str(name) for key, name in fmt.target_map.items()}
        if str(value) not in names:
            raise LoraforgeError(
                "the target is not in target_map", where=where, got=repr(value), expected=", ".join(names)
            )
        value = names[str(value)]
    if not isinstance(value, str) or not value.strip():
        raise LoraforgeError(
            "the target is not text, or empty",
            where=where,
            got=repr(value),
            expected="a string",
            hint="classes are named 'label'; target_map turns them into words",
        )
    return value


def _field(item: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in item:
        seen = ", ".join(map(str, item)) or "none"
        raise LoraforgeError(
            f"the row has no field '{name}'",
            where=where,
            got=f"fields {seen}",
            expected=name,
            hint=f"--template '{{{next(iter(item), 'field')}}}' makes the text from the fields there are",
        )
    return item[name]


def _fill(template: str, item: Mapping[str, Any], where: str) -> str:
    values = {name: _field(item, name, where) for name in fields_of(template)}
    for name, value in values.items():
        if not isinstance(value, str | int | float):
            raise LoraforgeError(
                "a field of the template is not text",
                where=f"{where}, {name}",
                got=type(value).__name__,
                expected="a string",
            )
    return render(template, values)
