"""What a recipe of `how: compare` says beside its tasks: seeds, both trainings, the measurement. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraforge.errors import LoraforgeError, UsageError
from loraforge.measure.settings import MeasureSettings

COMPARE = "compare"
SECTIONS = ("full", "lora_train", "measure")
KEYS = ("seeds", *SECTIONS)


@dataclass(frozen=True)
class Comparison:
    """Full fine-tuning against LoRA, head by head.

    Attributes:
        seeds: Each trains every task once by both methods.
        full: Training arguments of full fine-tuning, over those of both.
        lora_train: Training arguments of LoRA, over those of both.
        measure: Settings of `measure run`.
    """

    seeds: tuple[int, ...]
    full: Mapping[str, Any]
    lora_train: Mapping[str, Any]
    measure: Mapping[str, Any]


def read_comparison(
    recipe: Mapping[str, Any], section: Mapping[str, Any], where: str, problems: list[LoraforgeError]
) -> Comparison | None:
    """The comparison of a recipe; None where it is of another kind. Adds to `problems` what cannot be used."""
    if section.get("how") != COMPARE:
        idle = [key for key in KEYS if section.get(key) is not None]
        if idle:
            hint = f"how: {COMPARE}"
            problems.append(
                UsageError(f"'{', '.join(idle)}' of a pipeline needs 'how: {COMPARE}'", where=where, hint=hint)
            )
        return None
    idle = [key for key in ("merges", "eval") if section.get(key)] + [key for key in ("method",) if recipe.get(key)]
    if idle:
        what = f"a pipeline of 'how: {COMPARE}' neither merges nor evaluates"
        problems.append(UsageError(what, where=where, got=", ".join(idle), hint="take it out"))
    seeds = section.get("seeds") or [recipe.get("seed", 0)]
    whole = isinstance(seeds, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    if not whole or len(set(seeds)) < len(seeds) or any(seed < 0 for seed in seeds):
        expected = "a list of different whole numbers"
        problems.append(UsageError("'seeds' of a pipeline cannot be this", where=where, got=seeds, expected=expected))
        return None
    parts = {key: section.get(key) or {} for key in SECTIONS}
    if not all(isinstance(part, Mapping) for part in parts.values()):
        return None  # told with the other sections
    try:
        MeasureSettings.read(parts["measure"], f"{where}: measure")
    except LoraforgeError as problem:
        problems.append(problem)
    return Comparison(tuple(seeds), **{key: dict(part) for key, part in parts.items()})
