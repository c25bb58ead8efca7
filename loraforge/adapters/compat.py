"""Do adapters belong together: one base, one task type, one shape a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from loraforge.adapters.heads import unique_names
from loraforge.adapters.keys import natural_key
from loraforge.adapters.reader import Adapter, join_alike
from loraforge.errors import LoraforgeError, raise_problems


def check_compatible(adapters: Sequence[Adapter], force: bool = False) -> list[str]:
    """Refuses adapters that cannot be merged.

    Args:
        adapters: In the user's order.
        force: Accept different bases and task types. Different shapes are never accepted.

    Returns:
        Warnings: what `force` let through.

    Raises:
        LoraforgeError: Bases, task types or shapes differ; several problems are shown together as InputProblems.
    """
    if not adapters:
        raise LoraforgeError("No adapter was given", expected="at least one adapter folder")
    soft = _differing(adapters, "The adapters name different base models", lambda a: a.base)
    soft += _differing(adapters, "The adapters were trained for different task types", lambda a: a.task_type)
    problems = [] if force else list(soft)
    names = unique_names(adapters)
    for module in all_modules(adapters):
        shapes = {
            name: (adapter.info(module).m, adapter.info(module).n)
            for name, adapter in zip(names, adapters, strict=True)
            if module in adapter.modules_set
        }
        if len(set(shapes.values())) > 1:
            problems.append(
                LoraforgeError(
                    f"Module '{module}' has different shapes",
                    where=module,
                    got=", ".join(f"{name}: {m} x {n}" for name, (m, n) in shapes.items()),
                    expected="one shape; the adapters belong to different models",
                )
            )
    raise_problems(join_alike(problems))
    return [f"{problem.what} ({problem.got})" for problem in soft]


def all_modules(adapters: Sequence[Adapter]) -> list[str]:
    """Modules of any adapter, naturally sorted."""
    return sorted({module for adapter in adapters for module in adapter.modules}, key=natural_key)


def output_dtype(adapters: Sequence[Adapter], asked: str = "auto") -> torch.dtype:
    """Dtype of written factors: the asked one, or with "auto" the one all inputs share, float32 where they differ.

    Raises:
        LoraforgeError: An unknown name.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if asked == "auto":
        stored = {a.info(module).dtype for a in adapters for module in a.modules}
        return stored.pop() if len(stored) == 1 and stored <= set(known.values()) else torch.float32
    if asked not in known:
        raise LoraforgeError("Unknown dtype", where="dtype", got=asked, expected="auto, " + ", ".join(known))
    return known[asked]


def _differing(adapters: Sequence[Adapter], what: str, value: Callable[[Adapter], str | None]) -> list[LoraforgeError]:
    """One problem where the known values differ; an adapter that does not say fits any."""
    values = {name: value(adapter) for name, adapter in zip(unique_names(adapters), adapters, strict=True)}
    if len({v for v in values.values() if v is not None}) < 2:
        return []
    return [
        LoraforgeError(
            what,
            got=", ".join(f"{name}: {v}" for name, v in values.items()),
            expected="the same everywhere",
            hint="merge with --force if they are two names of one thing",
        )
    ]
