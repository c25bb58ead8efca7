"""Which modules of a base an adapter is put on: by the names of its targets, as PEFT matches them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from loraforge.errors import LoraforgeError, UsageError

if TYPE_CHECKING:
    from torch import nn

# Names that a message lists.
_SHOWN = 40


def all_linear(model: nn.Module, saved: Sequence[str]) -> list[str]:
    """Last parts of the names of all linear modules but the output's and those that are trained in full."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    output = getattr(model, "get_output_embeddings", lambda: None)()
    kinds = (nn.Linear, Conv1D)
    found = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module is not output and not lies_within(name, saved)
    }
    return sorted(found)


def matched_modules(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Modules that the targets name, as PEFT matches them."""
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise UsageError("targets is no regular expression", where="lora: targets", got=targets) from error
        return [name for name in names if pattern.fullmatch(name)]
    return [name for name in names if any(ends_with(name, target) for target in targets)]


def ends_with(name: str, part: str) -> bool:
    """Whether a module's name is this, or ends so after a dot."""
    return name == part or name.endswith(f".{part}")


def lies_within(name: str, modules: Sequence[str]) -> bool:
    """Whether a module is one of these (by the end of their names) or lies inside one."""
    parts = name.split(".")
    ancestors = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(ends_with(ancestor, module) for ancestor in ancestors for module in modules)


def target_problems(
    model: nn.Module, targets: str | Sequence[str], matched: Sequence[str], in_full: Sequence[str]
) -> Iterable[LoraforgeError]:
    """Targets that PEFT would pass over without a word; `in_full`: modules that are trained in full instead."""
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if isinstance(targets, str):
        lost = [] if matched else wanted
    else:
        lost = [target for target in wanted if not any(ends_with(name, target) for name in matched)]
    if lost:
        yield LoraforgeError(
            "targets that match no module of the base",
            where="lora: targets",
            got=", ".join(lost),
            expected=listed(model),
            hint="--targets takes last parts of names, a regular expression over whole names, or all-linear",
        )
    elif len(in_full) == len(matched):
        yield LoraforgeError(
            "every target is trained in full already", where="lora: targets", got=", ".join(wanted),
            expected=listed(model),
        )  # fmt: skip


def pattern_problems(key: str, patterns: Mapping[str, float], matched: Sequence[str]) -> list[LoraforgeError]:
    """A pattern that matches no target would be ignored by PEFT without a word."""
    found = []
    for pattern in patterns:
        try:
            hit = any(re.match(rf"(.*\.)?({pattern})$", name) for name in matched)
        except re.error:
            hit = False
        if not hit:
            shown = ", ".join(matched[:_SHOWN]) + (
                f" and {len(matched) - _SHOWN} more" if len(matched) > _SHOWN else ""
            )
            found.append(
                LoraforgeError(f"{key} matches none of the targets", where=f"lora: {key}", got=pattern, expected=shown)
            )
    return found


def listed(model: nn.Module) -> str:
    """Last parts of the names of linear-like modules, with how many there are of each."""
    counts = Counter(
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if name and getattr(module, "weight", None) is not None and getattr(module.weight, "ndim", 0) >= 2
    )
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common(_SHOWN))
