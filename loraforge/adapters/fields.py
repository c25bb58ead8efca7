"""Typed fields of a JSON object, with everything wrong collected."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError


class Fields:
    """Reads typed fields and collects what is wrong with them.

    Attributes:
        config: The parsed object.
        path: Its file, for messages.
        problems: Where problems go.
    """

    def __init__(self, config: dict[str, Any], path: Path, problems: list[LoraforgeError]) -> None:
        """Keeps the object; nothing is checked yet."""
        self.config, self.path, self.problems = config, path, problems

    def wrong(self, field: str, expected: str) -> None:
        """Notes that a field is not what was expected."""
        got = json.dumps(self.config[field])[:200] if field in self.config else "nothing"
        self.problems.append(
            LoraforgeError(
                "A field of the configuration is wrong", where=f"{self.path}: {field}", got=got, expected=expected
            )
        )

    def number(self, field: str, integer: bool = False) -> float:
        """A number; 1 where it is wrong."""
        value = self.config.get(field)
        if not _is_number(value, integer):
            self.wrong(field, "a positive whole number" if integer else "a finite number")
            return 1.0
        return float(value)  # type: ignore[arg-type]

    def pattern(self, field: str, integer: bool = False) -> tuple[tuple[str, float], ...]:
        """(name pattern, number) in the order of the file."""
        value = self.config.get(field) or {}
        if not isinstance(value, dict) or not all(_is_number(v, integer) for v in value.values()):
            self.wrong(field, "an object of name patterns and positive whole numbers" if integer else "name: number")
            return ()
        for key in value:
            try:
                re.compile(key)
            except re.error:
                self.wrong(field, f"valid regular expressions; {key!r} is none")
                return ()
        return tuple((key, float(v)) for key, v in value.items())

    def flag(self, field: str) -> bool:
        """True or false, false where unset."""
        value = self.config.get(field)
        if value not in (None, True, False):
            self.wrong(field, "true or false")
        return bool(value)

    def choice(self, field: str, allowed: tuple[str, ...]) -> str:
        """One of the allowed words, the first of them where unset."""
        value = self.config.get(field) or allowed[0]
        if value not in allowed:
            self.wrong(field, " or ".join(allowed))
        return str(value)

    def names(self, field: str) -> frozenset[str]:
        """A set of names, empty where unset."""
        value = self.config.get(field) or []
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            self.wrong(field, "a list of module names or null")
            return frozenset()
        return frozenset(value)

    def listed(self, field: str) -> tuple[str, ...]:
        """Names in the order of the file."""
        return tuple(self.config[field]) if self.names(field) else ()


def _is_number(value: object, integer: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) and value > 0 if integer else math.isfinite(value)
