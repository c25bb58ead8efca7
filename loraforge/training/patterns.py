"""LoRA options out of a file of ranks or targets, and targets as they are typed. Torch-free."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError

ALL_LINEAR = "all-linear"
# PEFT's spellings, which a configuration or a file of another program may have.
ALIASES = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "init_lora_weights": "init",
}


def read_patterns(path: str | Path) -> dict[str, Any]:
    """LoRA options out of a JSON or YAML file.

    The file is a mapping of name patterns to ranks, a list of targets, or a mapping with any of r, alpha, targets,
    rank_pattern and alpha_pattern (PEFT's spellings too, so that an adapter_config.json is understood).

    Raises:
        LoraforgeError: It cannot be read or is none of these.
    """
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        got = str(error).split("\n")[0]
        raise LoraforgeError("the pattern file cannot be read", where=path, got=got, expected="JSON or YAML") from error
    if isinstance(found, list) and found and all(isinstance(name, str) for name in found):
        return {"targets": found}
    if isinstance(found, Mapping) and found:
        keys = ("r", "alpha", "targets", "rank_pattern", "alpha_pattern")
        named = {ALIASES.get(str(key), str(key)): value for key, value in found.items()}
        if any(key in named for key in keys):
            return {key: named[key] for key in keys if named.get(key) is not None}
        if all(is_whole(value) for value in found.values()):
            return {"rank_pattern": {str(key): value for key, value in found.items()}}
    raise LoraforgeError(
        "the pattern file says nothing about ranks or targets",
        where=path,
        got=type(found).__name__,
        expected="{pattern: rank}, a list of targets, or keys r, alpha, targets, rank_pattern, alpha_pattern",
    )


def split_targets(text: str) -> str | list[str]:
    """Targets of a command line: names with commas, or one regular expression (anything with its signs) as it is."""
    if text == ALL_LINEAR or re.search(r"[\\^$*+?()\[\]{}|]", text):
        return text
    return [part.strip() for part in text.split(",") if part.strip()]


def is_whole(value: object) -> bool:
    """Whether a value is a whole number (true and false are none)."""
    return isinstance(value, int) and not isinstance(value, bool)
