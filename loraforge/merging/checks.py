"""The inputs of a merge, checked before any work: number and kind of adapters, ranks, missing modules, the base."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraforge.adapters import Adapter, check_dora, open_adapter, with_common_names
from loraforge.errors import LoraforgeError, UsageError
from loraforge.merging.row import MethodRow


def open_all(adapters: Sequence[str | os.PathLike[str] | Adapter], ignore_unknown: bool = False) -> list[Adapter]:
    """Opens every adapter that is not open yet; modules of one flat name get the first adapter's spelling.

    Raises:
        LoraforgeError: One cannot be read.
    """
    opened = [a if isinstance(a, Adapter) else open_adapter(a, ignore_unknown=ignore_unknown) for a in adapters]
    return with_common_names(opened)


def check_inputs(row: MethodRow, adapters: Sequence[Any], weights: Sequence[float] | None) -> None:
    """Refuses a number of adapters, or weights, that the method does not take.

    Raises:
        UsageError: Weights for a method without.
        LoraforgeError: Too few or too many adapters.
    """
    if isinstance(adapters, str | os.PathLike) or not adapters:
        raise LoraforgeError("no list of adapters was given", got=repr(adapters), expected="one or more adapters")
    fewest, most = row.counts
    count = len(adapters)
    if count < fewest or (most is not None and count > most):
        wanted = f"{fewest} to {most}" if most is not None else f"{fewest} or more"
        raise LoraforgeError(
            f"method '{row.name}' does not take this number of adapters", got=count, expected=wanted,
            hint="karcher is the mean of any number of adapters on the sphere" if row.name == "slerp" else None,
        )  # fmt: skip
    if weights is not None and not row.weighted:
        raise UsageError(
            f"method '{row.name}' takes no weights",
            got=", ".join(f"{w:g}" for w in weights),
            hint=f"leave --weights out; `loraforge methods {row.name}` lists its parameters",
        )


def check_equal_ranks(row: MethodRow, params: Any, adapters: Sequence[Adapter], modules: Sequence[str]) -> None:
    """Refuses adapters of different ranks for methods that work on the factors entry by entry.

    Raises:
        LoraforgeError: Naming the modules.
    """
    if not row.equal_ranks or getattr(params, "align", False):
        return
    differing = {}
    for module in modules:
        ranks = [a.info(module).rank for a in adapters if module in a.modules_set]
        if len(set(ranks)) > 1:
            differing[module] = ranks
    if differing:
        module, ranks = next(iter(differing.items()))
        raise LoraforgeError(
            f"method '{row.name}' works on the factors entry by entry and needs equal ranks",
            where=f"{module}" + (f" and {len(differing) - 1} more modules" if len(differing) > 1 else ""),
            got=" and ".join(map(str, ranks)),
            expected="one rank",
            hint="use svd or weighted-average, or `loraforge resize ADAPTER --rank K --uniform-rank` first",
        )


def check_missing(adapters: Sequence[Adapter], modules: Sequence[str], on_missing: str) -> None:
    """Refuses modules that only some adapters have, if the user asked for that.

    Raises:
        LoraforgeError: Naming the modules and who lacks them.
    """
    if on_missing != "error":
        return
    gaps = [f"{m} (not in {', '.join(a.name for a in adapters if m not in a.modules_set)})" for m in modules]
    gaps = [gap for gap, m in zip(gaps, modules, strict=True) if any(m not in a.modules_set for a in adapters)]
    if gaps:
        raise LoraforgeError(
            "some modules are missing from some adapters",
            where="; ".join(gaps[:4]),
            got=f"{len(gaps)} such modules",
            hint="--on-missing zero takes a missing delta as 0",
        )


def draw_keys(paths: Sequence[Path]) -> list[str]:
    """One word an input for random draws: the shortest end of its path that no other input shares.

    It does not depend on the order of the inputs. The same path given twice gets -2 behind the later one: their content
    is the same, so their order does not matter either.
    """
    parts = [path.resolve().parts for path in paths]
    keys: list[str] = []
    for index, own in enumerate(parts):
        others = [other for i, other in enumerate(parts) if i != index and other != own]
        depth = next((d for d in range(1, len(own) + 1) if all(other[-d:] != own[-d:] for other in others)), len(own))
        key = "/".join(own[-depth:])
        earlier = parts[:index].count(own)
        keys.append(f"{key}-{earlier + 1}" if earlier else key)
    return keys


def are_checkpoints(adapters: Sequence[Any]) -> bool:
    """True where the inputs are full models and not adapters.

    Raises:
        LoraforgeError: Some are and some are not.
    """
    from loraforge.checkpoints import looks_like_checkpoint

    if isinstance(adapters, str | os.PathLike):
        return False
    found = [isinstance(a, str | os.PathLike) and looks_like_checkpoint(Path(a)) for a in adapters]
    if any(found) and not all(found):
        raise LoraforgeError(
            "Adapters and full models cannot be merged together",
            got=", ".join(f"{a}: {'model' if f else 'adapter'}" for a, f in zip(adapters, found, strict=True)),
            expected="inputs of one kind",
            hint="`loraforge merge ADAPTER --output-kind model --base B` makes a model of an adapter",
        )
    return any(found)


def refuse_for_models(given: Mapping[str, bool]) -> None:
    """Refuses options that have no meaning for full checkpoints.

    Args:
        given: Option -> whether it was given.

    Raises:
        UsageError: Naming them.
    """
    wrong = [name for name, is_given in given.items() if is_given]
    if wrong:
        raise UsageError("These options are for adapters only", got=", ".join(wrong), hint="leave them out")


def check_base(
    row: MethodRow, adapters: Sequence[Adapter], base: Any, output_kind: str, out: Any, *, dry_run: bool
) -> None:
    """Refuses a base model where nothing reads it, and its absence where something must.

    Raises:
        UsageError: A base for a merge that uses none.
        LoraforgeError: No base or no folder for a model.
    """
    check_dora(adapters, base)
    if output_kind == "model":
        if base is None:
            raise LoraforgeError("A model is the base plus the merged update", expected="--base MODEL_DIR")
        if out is None and not dry_run:
            raise LoraforgeError("A merged model is written while it is made", expected="an output folder (out)")
    elif base is not None and row.needs != "calibration" and not any(a.has_dora for a in adapters):
        raise UsageError(
            f"method '{row.name}' uses no base model",
            got="--base",
            hint="leave it out, add --output-kind model to write base + update, or choose iteris-plus",
        )


def silent(adapters: Sequence[Adapter]) -> list[str]:
    """A note for every adapter whose scale is 0 in all modules: it adds nothing."""
    return [
        f"{a.name}: alpha is 0, its update is zero" for a in adapters if all(a.info(m).scaling == 0 for m in a.modules)
    ]
