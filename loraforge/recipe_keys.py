"""The keys of a recipe and how the value of each is read. Torch-free.

A reader takes what YAML gave and returns the value, or raises ValueError with what was expected.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

NUMBER = re.compile(r"[-+]?(\d+(_\d+)*\.?\d*|\.\d+)([eE][-+]?\d+)?")


def number(value: Any) -> float | int:
    """A finite number; PyYAML gives `1e-5` (no dot) as text, which is read here."""
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = float(value) if re.search(r"[.eE]", value) else int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def whole(value: Any) -> int:
    """A whole number."""
    try:
        found = number(value)
    except ValueError:
        raise ValueError("a whole number") from None
    if int(found) != found:
        raise ValueError("a whole number")
    return int(found)


def flag(value: Any) -> bool:
    """True, false, 1 or 0."""
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise ValueError("true or false")


def truthy(value: Any) -> bool:
    """`select_long` is a number in the document; only whether it is 0 matters there."""
    return bool(value) if isinstance(value, bool) else whole(value) != 0


def text(value: Any) -> str:
    """Text that is not empty."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value:
        raise ValueError("text")
    return value


def or_auto(value: Any) -> float | int | str:
    """A number, or the word auto."""
    try:
        return "auto" if value == "auto" else number(value)
    except ValueError:
        raise ValueError("a finite number or auto") from None


def numbers(value: Any) -> list[float | int]:
    """A list of numbers, one or more."""
    if not isinstance(value, list) or not value:
        raise ValueError("a list of numbers")
    return [number(v) for v in value]


def texts(value: Any) -> list[str]:
    """A list of texts, one or more."""
    if not isinstance(value, list) or not value:
        raise ValueError("a list of texts")
    try:
        return [text(v) for v in value]
    except ValueError:
        raise ValueError("a list of texts") from None


def sources(value: Any) -> Any:
    """One source an adapter, by name or in order; a source is a path or a mapping with `source` and its fields."""
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if not entries or not all(
        isinstance(s, str | os.PathLike) or (isinstance(s, dict) and "source" in s) for s in entries
    ):
        raise ValueError("NAME: FILE pairs or a list of files; a file may be {source: FILE, template: ...}")
    return value


def mapping(value: Any) -> dict[str, Any]:
    """A mapping by text, one key or more; its values stand as written."""
    if not isinstance(value, Mapping) or not value:
        raise ValueError("a mapping of keys to values")
    return {str(key): entry for key, entry in value.items()}


def free(value: Any) -> Any:
    """A value of `params`: texts that are numbers become numbers, at any depth."""
    if isinstance(value, Mapping):
        return {str(k): free(v) for k, v in value.items()}
    if isinstance(value, list):
        return [free(v) for v in value]
    return number(value) if isinstance(value, str) and NUMBER.fullmatch(value.strip()) else value


Reader = Callable[[Any], Any]

# Everything but the parameters of a method.
OPTIONS: dict[str, Reader] = {
    **dict.fromkeys(("name", "description", "paper", "method", "out", "base", "dtype", "device", "format"), text),
    **dict.fromkeys(("output_kind", "on_missing", "heads_from", "template", "report"), text),
    **dict.fromkeys(("adapters", "tasks", "notes"), texts),
    **dict.fromkeys(("weights", "adapter_alpha"), numbers),
    **dict.fromkeys(("rank", "min_rank", "max_rank", "seed", "samples", "max_length"), whole),
    **dict.fromkeys(("batch_tokens", "adapter_rank", "eval_batch_size"), whole),
    **dict.fromkeys(("uniform_rank", "overwrite", "force", "resume", "ignore_unknown"), flag),
    **dict.fromkeys(("energy", "nuclear", "ratio", "fro_error"), number),
    "budget": whole,
    "post": text,
    "calibration": sources,
    "stats": sources,
    "params": lambda value: value,
    "pipeline": mapping,
}
# Parameters of the calibrated methods, which may also stand at the top level.
PARAMS: dict[str, Reader] = {
    **dict.fromkeys(("max_iter", "samples_num", "max_length", "max_new_tokens", "inner_num", "outer_num"), whole),
    **dict.fromkeys(("mats_history_size", "with_pretrain_matrix", "folds"), whole),
    **dict.fromkeys(("alpha_1", "alpha_2", "reg_ceof"), or_auto),
    **dict.fromkeys(("camr_alpha", "camr_beta", "dcs_sigma", "dcs_min_ess", "mats_regularization"), number),
    **dict.fromkeys(("convergence_threshold", "offdiag"), number),
    **dict.fromkeys(("use_mats", "use_camr", "use_dcs", "if_balance", "if_divide", "shuffle", "verify"), flag),
    "dcs_mad_consistent": flag,
    "select_long": truthy,
    **dict.fromkeys(("init", "mats_reg_mode", "mats_scope", "camr_direction", "camr_normalize", "camr_scale"), text),
    **dict.fromkeys(("camr_cross", "dcs_kernel", "lambda_weight", "cross_norm", "collect", "truncate_metric"), text),
    **dict.fromkeys(("target", "base_dtype"), text),
}
