"""`--set KEY=VALUE` and its sugar flags, read by the types of a method's parameters (a torch-free dataclass)."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Union

from loraforge.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from loraforge.merging.methods import MethodRow

TRUE, FALSE, NONE = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("none", "null")


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One parameter of a method.

    Attributes:
        name: Key of `--set`.
        hint: Resolved type.
        default: The method's default value.
        help: One sentence.
        choices: Allowed values, or an empty tuple.
    """

    name: str
    hint: Any
    default: Any
    help: str
    choices: tuple[Any, ...]

    @property
    def type_name(self) -> str:
        """The type as a user reads it."""
        return type_name(self.hint)

    def summary(self) -> dict[str, Any]:
        """The parameter as JSON."""
        known = {"name": self.name, "type": self.type_name, "default": self.default, "help": self.help}
        return known | ({"choices": list(self.choices)} if self.choices else {})


def settings_of(row: MethodRow) -> tuple[Setting, ...]:
    """The parameters of a method with its defaults, in the order of its dataclass."""
    params = row.params_class()
    hints = typing.get_type_hints(params)
    defaults = row.make_params()
    return tuple(
        Setting(
            name=field.name,
            hint=hints[field.name],
            default=getattr(defaults, field.name),
            help=str(field.metadata.get("help", "")),
            choices=tuple(field.metadata.get("choices") or ()),
        )
        for field in dataclasses.fields(params)
    )


def type_name(hint: Any) -> str:
    """A type as a user reads it: `float | auto`, `true|false`, `whole number`."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(type_name(member) for member in typing.get_args(hint)))
    if origin is Literal:
        return " | ".join(str(value) for value in typing.get_args(hint))
    if origin is not None:
        return "list of " + " | ".join(type_name(m) for m in typing.get_args(hint) if m is not Ellipsis)
    names: dict[Any, str] = {bool: "true|false", int: "int", float: "float", str: "text", type(None): "none"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def parse_value(text: str, hint: Any) -> Any:
    """Reads a value by its type; of a union the first member that fits, texts last.

    Raises:
        ValueError: The text is no such value.
    """
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _parse_union(text, typing.get_args(hint))
    if origin is Literal:
        for value in typing.get_args(hint):
            if text == str(value) or (isinstance(value, bool) and text.lower() == str(value).lower()):
                return value
        raise ValueError(text)
    if origin in (tuple, list, Sequence):
        member = next((m for m in typing.get_args(hint) if m is not Ellipsis), str)
        values = [parse_value(part.strip(), member) for part in text.strip("[]()").split(",") if part.strip()]
        return values if origin is list else tuple(values)
    return _parse_plain(text, hint)


def _parse_union(text: str, members: Iterable[Any]) -> Any:
    # Texts fit everything and booleans take 0 and 1, so both come after the numbers.
    order = {type(None): 0, int: 1, float: 2, bool: 3, str: 9}
    for member in sorted(members, key=lambda m: order.get(m, 4)):
        try:
            return parse_value(text, member)
        except ValueError:
            continue
    raise ValueError(text)


def _parse_plain(text: str, hint: Any) -> Any:
    lowered = text.strip().lower()
    if hint is type(None) and lowered in NONE:
        return None
    if hint is bool and lowered in TRUE + FALSE:
        return lowered in TRUE
    if hint is int:
        number = float(lowered)
        if not number.is_integer():
            raise ValueError(text)
        return int(lowered) if lowered.lstrip("+-").isdigit() else int(number)
    if hint is float:
        return float(lowered)
    if hint is str:
        return text
    raise ValueError(text)


def parse_settings(row: MethodRow, assignments: Sequence[str], flags: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """The method parameters that the command line names.

    Args:
        row: The method.
        assignments: `KEY=VALUE` texts of `--set`.
        flags: Sugar flags that were given: key -> (flag as typed, value).

    Returns:
        Key to typed value.

    Raises:
        UsageError: No `=`, an unknown key, a value of another type, or two values for one key.
    """
    known = {setting.name: setting for setting in settings_of(row)}
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UsageError(
                "--set takes a key and a value", got=assignment, expected="KEY=VALUE, for example --set max_iter=10"
            )
        setting = _find(row.name, known, key, f"--set {key}")
        if key in values:
            raise UsageError(f"--set {key} was given twice", got=f"{values[key]} and {text}")
        values[key] = _typed(setting, text)
    for key, (flag, value) in flags.items():
        _find(row.name, known, key, flag)
        if key in values:
            raise UsageError(f"{flag} and --set {key} name the same parameter", expected="one of the two")
        values[key] = value
    return values


def _find(method: str, known: Mapping[str, Setting], key: str, where: str) -> Setting:
    if key not in known:
        hint = did_you_mean(key, known) if known else f"'{method}' has no parameters; leave {where} out"
        raise UsageError(f"unknown parameter '{key}' of method '{method}'", where=where, hint=hint)
    return known[key]


def _typed(setting: Setting, text: str) -> Any:
    expected = " | ".join(str(choice) for choice in setting.choices) or setting.type_name
    try:
        return parse_value(text, setting.hint)
    except (ValueError, OverflowError) as error:
        what, where = "a parameter has a value of another type", f"--set {setting.name}"
        raise UsageError(what, where=where, got=text, expected=expected) from error
