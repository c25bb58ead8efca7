"""Which of a model's linear maps have input statistics: Linear, Conv1D, and the projections of MultiheadAttention.

Names are those of the model: a module's dotted name, and for the packed query-key-value projection of
`nn.MultiheadAttention`, which is a parameter and no module, the parameter's (`attn.in_proj_weight`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from loraforge.calibrate.modules import resolve_modules
from loraforge.calibrate.trace import call_input
from loraforge.errors import LoraforgeError, UsageError, did_you_mean, raise_problems

_PATTERN = re.compile(r"[*+?()\[\]{}|^$\\]")
_READS_INDICES = "an embedding, which reads indices"


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One linear map.

    Attributes:
        module: The module whose calls are watched.
        part: "input": what the module is fed with is the map's input. "packed": so it is, where an attention gets one
            tensor as query, key and value. "heads": the input is the output of the attention heads, inside `module`.
    """

    module: nn.Module
    part: Literal["input", "packed", "heads"] = "input"


def find_targets(model: nn.Module) -> tuple[dict[str, Target], dict[str, str]]:
    """Every linear map of a model, and why other matrices have no statistic.

    Returns:
        Targets by name in the model's order; name -> reason for embeddings, convolutions, experts in one tensor and
        other weights that are multiplied by something else than rows of features.

    Raises:
        LoraforgeError: The model is wrapped by an adapter.
    """
    from transformers.pytorch_utils import Conv1D

    found: dict[str, Target] = {}
    refused: dict[str, str] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            hint = "give the plain base model, without PEFT"
            raise LoraforgeError("the model is wrapped by an adapter already", where=name, hint=hint)
        if isinstance(module, nn.MultiheadAttention):
            if module.in_proj_weight is not None:
                found[f"{name}.in_proj_weight"] = Target(module, "packed")
            else:
                refused |= {f"{name}.{p}_proj_weight": "keys or values of another width" for p in "qkv"}
            found[f"{name}.out_proj"] = Target(module, "heads")
            inside.add(id(module.out_proj))
        elif isinstance(module, nn.Linear | Conv1D):
            if id(module) not in inside:
                found[name] = Target(module)
        else:
            refused |= {name_of(name, key): reason for key, reason in _other_matrices(module)}
    return found, refused


def choose_targets(model: nn.Module, wanted: str | Sequence[str] | None) -> tuple[dict[str, Target], dict[str, str]]:
    """The linear maps that the user named; all of them where nothing was named.

    Args:
        model: The base model.
        wanted: A regular expression (it has one of `* + ? ( ) [ ] { } | ^ $`) that whole names must match, or names and
            last parts of names ("q_proj" takes every module of that name), in a list or with commas between them.

    Returns:
        Targets by name, and the reasons for matrices without a statistic (of those that were named: none).

    Raises:
        UsageError: Something that matches no module, or no regular expression.
        LoraforgeError: Named modules that have no input statistic.
    """
    found, refused = find_targets(model)
    if wanted is None:
        if not found:
            raise LoraforgeError("the model has no linear module", got=type(model).__name__)
        # Nobody expects a statistic of an embedding.
        return found, {name: reason for name, reason in refused.items() if reason != _READS_INDICES}
    chosen: set[str] = set()
    problems: list[LoraforgeError] = []
    every = {**dict.fromkeys(found), **refused}
    for entry in [wanted] if isinstance(wanted, str) else wanted:
        hits = _matches(entry, every)
        chosen |= hits & found.keys()
        problems += [LoraforgeError("no input statistic of this module", where=n, got=refused[n])
                     for n in sorted(hits & refused.keys())]  # fmt: skip
    raise_problems(problems)
    return {name: target for name, target in found.items() if name in chosen}, {}


def adapter_targets(
    model: nn.Module, names: Iterable[str], shapes: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, Target]:
    """The linear maps that an adapter changes, under the model's own names.

    Raises:
        LoraforgeError: Modules that the model lacks, or that are no linear maps.
    """
    found, _ = find_targets(model)
    own = {id(module): name for name, module in model.named_modules()}
    targets: dict[str, Target] = {}
    for module in resolve_modules(model, names, shapes).values():
        name = own[id(module)]
        targets[name] = found.get(name, Target(module))
    return targets


def reach(
    model: nn.Module, targets: Mapping[str, Target], inputs: Mapping[str, Any], options: Mapping[str, object]
) -> dict[str, str]:
    """Runs one sample and says which targets have no input: name -> reason."""
    ran: set[str] = set()
    crossed: set[str] = set()

    def watch(name: str, target: Target) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ran.add(name)
            if target.part == "packed" and not is_self_attention(args, kwargs):
                crossed.add(name)

        return target.module.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(name, target) for name, target in targets.items()]
    try:
        with torch.no_grad():
            model(**{key: value[:1] for key, value in inputs.items()}, **options)
    finally:
        for handle in handles:
            handle.remove()
    reasons = {name: "the model's forward never runs it on this data" for name in targets if name not in ran}
    return reasons | {name: "query, key and value differ, so it has no single input" for name in crossed}


def is_self_attention(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a MultiheadAttention is called with one tensor as query, key and value."""
    query = call_input(tuple(args), kwargs)
    key, value = (args[i] if len(args) > i else kwargs[name] for i, name in ((1, "key"), (2, "value")))
    return key is query and value is query


def name_of(module: str, parameter: str) -> str:
    """What a matrix without a statistic is called: its module where it is the weight, else the parameter."""
    return module if parameter == "weight" and module else f"{module}.{parameter}".lstrip(".")


def _other_matrices(module: nn.Module) -> list[tuple[str, str]]:
    """(parameter, reason) of a module's own matrices; class tokens and tables of positions, (1, ...), are none."""
    indices = isinstance(module, nn.Embedding | nn.EmbeddingBag)
    return [
        (key, _READS_INDICES if indices else f"{type(module).__name__}, {p.ndim} dimensions")
        for key, p in module.named_parameters(recurse=False)
        if p.ndim > 1 and p.shape[0] > 1
    ]


def _matches(entry: str, names: Iterable[str]) -> set[str]:
    """The names that one entry of the user's means."""
    known = list(names)
    if _PATTERN.search(entry):
        try:
            pattern = re.compile(entry)
        except re.error as error:
            raise UsageError("a target is no regular expression", got=entry, expected=str(error)) from error
        hits = {name for name in known if pattern.fullmatch(name)}
        if not hits:
            raise UsageError("a target matches no module", got=entry, expected=f"part of: {', '.join(known[:5])}, ...")
        return hits
    hits = set()
    for part in (piece.strip() for piece in entry.split(",")):
        own = {name for name in known if name == part or name.endswith(f".{part}")}
        if not own:
            leaves = dict.fromkeys(name.rpartition(".")[2] for name in known)
            raise UsageError("a target names no module", got=part, hint=did_you_mean(part, leaves))
        hits |= own
    return hits
