"""YAML as people write it: `1e-4` is a number, `no` is a word, and no key stands twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from loraforge.errors import LoraforgeError


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of numbers and truth values on a safe loader."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are all different."""
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(getattr(key, "value", key))
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{name}' stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads `no` as false (TrainingArguments and labels say "no") and `1e-4` as text.
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN)$"
    ),
    [*"-+0123456789."],
)


def read_yaml(path: Path, what: str = "file") -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: The file.
        what: What it is, for messages: "task file".

    Raises:
        LoraforgeError: Not there, no UTF-8, no YAML, a key twice, or no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise LoraforgeError(f"the {what} cannot be read", where=path, got=error.strerror) from error
    except UnicodeDecodeError as error:
        raise LoraforgeError(f"the {what} is not UTF-8 text", where=path, got=f"byte {error.start}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = path if mark is None else f"{path}, line {mark.line + 1}"
        raise LoraforgeError(
            f"the {what} is not valid YAML", where=where, got=getattr(error, "problem", None)
        ) from error
    if not isinstance(content, dict) or not content:
        raise LoraforgeError(f"the {what} is no mapping of keys to values", where=path, got=type(content).__name__)
    return {str(key): value for key, value in content.items()}


def read_value(text: str) -> Any:
    """A value as the file would have it: `1e-4` a number, `[a, b]` a list, `null` nothing.

    Raises:
        ValueError: Not readable.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(text) from error
