"""`KEY=VALUE` settings over a sequence's file, which of its tasks are trained, and the sequence as JSON. Torch-free."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, UsageError, did_you_mean, raise_problems
from loraforge.storage.yaml_file import read_value
from loraforge.training.options import LoraOptions
from loraforge.training.sequence.checks import (
    EVAL_KEYS,
    KEYS,
    SECTIONS,
    WORDS,
    check_sequence,
    eval_problems,
    ilora_fields,
    section_problems,
    word_problems,
)
from loraforge.training.sequence.spec import SequenceSpec


def with_settings(spec: SequenceSpec, settings: Iterable[str] | Mapping[str, Any]) -> SequenceSpec:
    """The sequence with `KEY=VALUE` settings: `train.learning_rate=1e-4`, or a bare key that only one section knows.

    Raises:
        UsageError: No `=`, an unknown key (with the closest known one), a value of the wrong kind; all at once.
    """
    pairs = dict(settings) if isinstance(settings, Mapping) else _pairs(settings)
    sections: dict[str, Any] = {key: dict(getattr(spec, key)) for key in SECTIONS}
    words: dict[str, Any] = {}
    problems: list[LoraforgeError] = []
    for key, value in pairs.items():
        section, _, name = key.rpartition(".")
        section = section or _section_of(name)
        where = f"--set {key}"
        if section == "" and name in WORDS:
            problems += word_problems(value, WORDS[name], name, where)
            words[name] = value
        elif section == "" and name in ("base_model", "output_dir"):
            words[name] = value if name == "base_model" else Path(str(value)).resolve()
        elif section in SECTIONS:
            sections[section][name] = value
        else:
            known_words = (*SECTIONS, *WORDS, "base_model", "output_dir")
            hint = "tasks are set in the file" if key == "tasks" else did_you_mean(section or name, known_words)
            problems.append(UsageError(f"unknown setting '{key}'", where=where, hint=hint))
    problems += eval_problems(sections["eval"], "--set eval")
    raise_problems([*problems, *section_problems(sections, "--set")])
    changed = replace(spec, **sections, **words)
    check_sequence(changed)
    return changed


def _pairs(settings: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    problems: list[LoraforgeError] = []
    for text in settings:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            example = "KEY=VALUE, for example --set ema_alpha=0.02"
            problems.append(UsageError("--set takes a key and a value", got=text, expected=example))
            continue
        if key in found:
            problems.append(UsageError(f"--set {key} was given twice"))
        try:
            found[key] = read_value(value)
        except ValueError:
            problems.append(UsageError("a setting cannot be read", where=f"--set {key}", got=value))
    raise_problems(problems)
    return found


def _section_of(name: str) -> str:
    """The section that knows a bare key; training arguments are what no other section knows."""
    if name in KEYS:
        return ""
    if name in ilora_fields():
        return "ilora"
    if name in {item.name for item in fields(LoraOptions)}:
        return "lora"
    return "eval" if name in EVAL_KEYS else "train"


def select_units(spec: SequenceSpec, choice: str | Iterable[str] | None) -> tuple[int, ...]:
    """Positions of the tasks to train: all, `1-3`, `2`, `1,3`, ids; `current_task_id` where nothing is named.

    Raises:
        UsageError: No such task.
    """
    ids = spec.task_ids
    if spec.method == "joint":
        if choice is not None:
            raise UsageError("jointly, all tasks are trained at once", where="--tasks", hint="leave it out")
        return (0,)
    if choice is None:
        current = spec.ilora_config().current_task_id
        return tuple(range(len(ids))) if current is None else (ids.index(current),)
    parts = choice.split(",") if isinstance(choice, str) else [str(part) for part in choice]
    found: set[int] = set()
    for part in (part.strip() for part in parts):
        first, dash, last = part.partition("-")
        if part in ids:
            found.add(ids.index(part))
        elif part.isdecimal() and 1 <= int(part) <= len(ids):
            found.add(int(part) - 1)
        elif dash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= len(ids):
            found |= set(range(int(first) - 1, int(last)))
        else:
            expected = f"1-{len(ids)}, or ids: {', '.join(ids)}"
            raise UsageError("no such task in the sequence", where="--tasks", got=part, expected=expected)
    return tuple(sorted(found))


def resolved(spec: SequenceSpec) -> dict[str, Any]:
    """The sequence as a mapping that `parse_sequence` reads again, ready for JSON; paths are absolute.

    Raises:
        LoraforgeError: A task's rows are objects in memory that JSON cannot hold.
    """
    content: dict[str, Any] = {
        "base_model": spec.base_model,
        "output_dir": str(spec.output_dir),
        **{key: getattr(spec, key) for key in WORDS},
        **{key: dict(getattr(spec, key)) for key in SECTIONS},
        "tasks": [{key: value for key, value in asdict(task).items() if value is not None} for task in spec.tasks],
    }
    try:
        plain: dict[str, Any] = json.loads(json.dumps(content, default=os.fspath))
    except TypeError as error:
        expected = "paths, or rows of texts and numbers"
        raise LoraforgeError("the rows of a task cannot be recorded", got=str(error), expected=expected) from error
    return plain
