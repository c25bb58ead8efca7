"""Do adapters belong together: one base, one task type, one shape and kind a module, one order of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from loraforge.adapters.heads import unique_names
from loraforge.adapters.keys import join_alike
from loraforge.adapters.reader import Adapter, ModuleInfo
from loraforge.errors import LoraforgeError, raise_problems
from loraforge.storage.names import natural_key


def check_compatible(adapters: Sequence[Adapter], force: bool = False) -> list[str]:
    """Refuses adapters that cannot be merged.

    Args:
        adapters: In the user's order.
        force: Accept different bases and task types. Different shapes, kinds of module, kernels and orders of
            target_parameters are never accepted.

    Returns:
        Warnings: what `force` let through.

    Raises:
        LoraforgeError: Something differs; several problems are shown together as InputProblems.
    """
    if not adapters:
        raise LoraforgeError("No adapter was given", expected="at least one adapter folder")
    soft = _differing(adapters, "The adapters name different base models", lambda a: a.base)
    soft += _differing(adapters, "The adapters were trained for different task types", lambda a: a.task_type)
    soft += _differing(
        adapters, "The adapters name different base versions", lambda a: a.metadata.get("ss_base_model_version")
    )
    problems = [] if force else list(soft)
    names = unique_names(adapters)
    for module in all_modules(adapters):
        infos = {
            name: adapter.info(module)
            for name, adapter in zip(names, adapters, strict=True)
            if module in adapter.modules_set
        }
        problems += _module_problems(module, infos)
    problems += _expert_problems(adapters, names)
    raise_problems(join_alike(problems))
    return [f"{problem.what} ({problem.got})" for problem in soft]


def check_dora(adapters: Sequence[Adapter], base: object) -> None:
    """Refuses DoRA adapters where no base model is given.

    The magnitude of DoRA is relative to the norm of base + update, so only with the base is there an update to merge.

    Args:
        adapters: In the user's order.
        base: The base model or its path, None where none was given.

    Raises:
        LoraforgeError: Naming each adapter, a key and the option.
    """
    if base is not None:
        return
    problems = []
    for name, adapter in zip(unique_names(adapters), adapters, strict=True):
        held = [module for module in adapter.modules if adapter.info(module).has_magnitude]
        if held:
            problems.append(
                LoraforgeError(
                    f"Adapter {name} is a DoRA adapter, whose update depends on the base model",
                    where=f"{adapter.weights_path}: {adapter.keys_of(held[0])[-1]}",
                    got=f"magnitudes in {len(held)} of {len(adapter.modules)} modules",
                    expected="the base model beside it",
                    hint="name it with `--base MODEL_DIR` (API: base): the update is computed from it, cut to a rank, "
                    "and the error reported",
                )
            )
    raise_problems(problems)


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


def _module_problems(module: str, infos: Mapping[str, ModuleInfo]) -> list[LoraforgeError]:
    """One problem where the adapters disagree on what a module is."""
    for what, value in (
        ("shapes", lambda info: f"{info.m} x {info.n}"),
        ("kinds", lambda info: info.kind),
        ("kernels", lambda info: "x".join(map(str, info.kernel))),
    ):
        values = {name: value(info) for name, info in infos.items()}
        if len(set(values.values())) > 1:
            return [
                LoraforgeError(
                    f"Module '{module}' has different {what}",
                    where=module,
                    got=", ".join(f"{name}: {v}" for name, v in values.items()),
                    expected=f"one {what[:-1]}; the adapters belong to different models",
                )
            ]
    return []


def _expert_problems(adapters: Sequence[Adapter], names: Sequence[str]) -> list[LoraforgeError]:
    """Problems of adapted parameters: another order of target_parameters, or another number of experts."""
    orders: dict[str, tuple[str, ...]] = {}
    experts: dict[str, dict[str, int]] = {}
    for name, adapter in zip(names, adapters, strict=True):
        for module in adapter.modules:
            parameter = adapter.info(module).parameter
            if parameter is not None:
                orders[name] = adapter.settings.target_parameters
                counts = experts.setdefault(parameter, {})
                counts[name] = counts.get(name, 0) + 1
    problems = []
    if len(set(orders.values())) > 1:
        problems.append(
            LoraforgeError(
                "The adapters list target_parameters in different orders",
                got="; ".join(f"{name}: {', '.join(order)}" for name, order in orders.items()),
                expected="one order: it alone says which parameter a stack of experts belongs to",
                hint="train the adapters with the same list of target_parameters",
            )
        )
    problems += [
        LoraforgeError(
            f"Parameter '{parameter}' has different numbers of experts",
            where=parameter,
            got=", ".join(f"{name}: {count}" for name, count in counts.items()),
            expected="one number; the adapters belong to different models",
        )
        for parameter, counts in experts.items()
        if len(set(counts.values())) > 1
    ]
    return problems


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
