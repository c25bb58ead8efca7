"""What becomes of tensors that are not low-rank: heads (modules_to_save) and extras (biases, token rows, base weights).

They are whole weights, not updates, so they are never summed. Equal ones pass through; differing heads are kept
apart, one folder an adapter; differing extras are refused, because a merged adapter without them would silently be
another model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraforge.adapters.keys import head_module, shorten
from loraforge.adapters.reader import Adapter
from loraforge.errors import LoraforgeError, did_you_mean
from loraforge.storage.names import TASK_CARD
from loraforge.storage.stream import save_tensors

# What names the adapter whose heads are taken: the option.
CHOICE = "--from"


@dataclass(frozen=True, slots=True, eq=False)
class HeadsPlan:
    """Where heads and extras go.

    Attributes:
        merged: name without prefix -> tensor, written into the merged adapter in its own dtype.
        modules_to_save: Modules of the merged heads, for the configuration.
        config: Further fields of the merged configuration (bias, trainable_token_indices).
        aside: adapter name -> its heads, written under heads/<adapter>/.
        cards: adapter name -> its task.json, written beside them: with it a head knows its classes.
        notes: What was decided, in sentences for the report.
    """

    merged: Mapping[str, Tensor] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    aside: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    cards: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def index_of(self, name: str) -> str:
        """The heads.json of one kept-apart adapter: its keys with shape and dtype."""
        keys = {
            key: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for key, tensor in self.aside[name].items()
        }
        return json.dumps({"adapter": name, "file": "heads.safetensors", "keys": keys}, indent=2) + "\n"


def write_aside(folder: Path, heads: HeadsPlan, aside: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
    """Writes heads that differ between the adapters, each under its adapter's name.

    Args:
        folder: Of the merged adapter or model.
        heads: The plan.
        aside: The tensors where they are not the plan's own: under other names.
    """
    for name, tensors in (heads.aside if aside is None else aside).items():
        place = folder / "heads" / name
        place.mkdir(parents=True)
        save_tensors(place / "heads.safetensors", tensors)
        (place / "heads.json").write_text(heads.index_of(name), encoding="utf-8")
        if name in heads.cards:
            (place / TASK_CARD).write_bytes(heads.cards[name])


def resolve_heads(adapters: Sequence[Adapter], heads_from: str | None = None) -> HeadsPlan:
    """Decides for every head and extra of the adapters.

    Args:
        adapters: In the user's order.
        heads_from: Name (or path) of the adapter whose heads and extras the merged adapter gets.

    Raises:
        LoraforgeError: `heads_from` names no adapter or one without heads; extras differ and none was named.
    """
    if heads_from is not None:
        return _from_one(adapters, _find(adapters, heads_from))
    plan = _Decisions()
    names = unique_names(adapters)
    for module, holders in _head_modules(adapters).items():
        if _all_equal(holders, module):
            plan.take(holders[0], _keys_of(holders[0], module), module)
            continue
        for adapter in holders:
            aside = plan.aside.setdefault(names[adapters.index(adapter)], {})
            aside.update((key, adapter.load_head(key)) for key in _keys_of(adapter, module))
            plan.take_card(names[adapters.index(adapter)], adapter)
    if plan.aside:
        plan.notes.append(
            f"heads differ between {', '.join(plan.aside)}: each is kept under heads/<adapter>/ and the merged adapter "
            "has none of them, nor a task type that would make PEFT look for one; `--from NAME` (API: heads_from) puts "
            "one of them in"
        )
    _take_extras(adapters, plan)
    return plan.freeze()


class _Decisions:
    """The plan while it is made."""

    def __init__(self) -> None:
        self.merged: dict[str, Tensor] = {}
        self.modules: list[str] = []
        self.config: dict[str, Any] = {}
        self.aside: dict[str, dict[str, Tensor]] = {}
        self.cards: dict[str, bytes] = {}
        self.notes: list[str] = []

    def take(self, adapter: Adapter, keys: Sequence[str], module: str | None = None) -> None:
        self.merged.update((key, adapter.load_head(key)) for key in keys)
        if module is not None:
            self.modules.append(module)

    def take_card(self, name: str, adapter: Adapter) -> None:
        if (card := adapter.path / TASK_CARD).is_file():
            self.cards[name] = card.read_bytes()

    def take_extras_config(self, adapter: Adapter) -> None:
        for name in ("bias", "trainable_token_indices"):
            if adapter.config.get(name) not in (None, "none"):
                self.config[name] = adapter.config[name]

    def freeze(self) -> HeadsPlan:
        modules, notes = tuple(sorted(self.modules)), tuple(self.notes)
        return HeadsPlan(self.merged, modules, self.config, self.aside, self.cards, notes)


def unique_names(adapters: Sequence[Adapter]) -> list[str]:
    """Folder names, with -2, -3 ... behind the later of equal ones."""
    names: list[str] = []
    for adapter in adapters:
        name, number = adapter.name, 2
        while name in names:
            name, number = f"{adapter.name}-{number}", number + 1
        names.append(name)
    return names


def _find(adapters: Sequence[Adapter], wanted: str) -> Adapter:
    found = [a for a in adapters if wanted in (a.name, str(a.path))]
    if not found:
        raise LoraforgeError(
            "`--from NAME` (API: heads_from) names no adapter of this merge",
            where=CHOICE,
            got=wanted,
            hint=did_you_mean(wanted, [a.name for a in adapters]),
        )
    if len(found) > 1:
        raise LoraforgeError(
            "`--from NAME` (API: heads_from) fits several adapters",
            where=CHOICE,
            got=wanted,
            expected=", ".join(str(a.path) for a in found),
            hint="give the path instead of the name",
        )
    return found[0]


def _from_one(adapters: Sequence[Adapter], chosen: Adapter) -> HeadsPlan:
    plan = _Decisions()
    for module in _head_modules([chosen]):
        plan.take(chosen, _keys_of(chosen, module), module)
    plan.take(chosen, chosen.extras)
    plan.take_extras_config(chosen)
    if not plan.merged:
        others = [a.name for a in adapters if a.heads or a.extras]
        raise LoraforgeError(
            "`--from NAME` (API: heads_from) names an adapter that has no heads",
            where=CHOICE,
            got=chosen.name,
            expected=f"one of {', '.join(others)}" if others else "no --from: no adapter has heads",
        )
    left = [a.name for a in adapters if a is not chosen and (a.heads or a.extras)]
    plan.notes.append(f"heads are those of {chosen.name}" + (f"; left out: {', '.join(left)}" if left else ""))
    return plan.freeze()


def _head_modules(adapters: Sequence[Adapter]) -> dict[str, list[Adapter]]:
    """Head module -> adapters that have it, in order."""
    found: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        for key in adapter.heads:
            holders = found.setdefault(head_module(key, adapter.settings) or key, [])
            if adapter not in holders:
                holders.append(adapter)
    return found


def _keys_of(adapter: Adapter, module: str) -> list[str]:
    return [key for key in adapter.heads if key.startswith(f"{module}.")]


def _all_equal(holders: Sequence[Adapter], module: str) -> bool:
    """True where all holders have the same keys of a head with the same bits."""
    keys = _keys_of(holders[0], module)
    return all(
        _keys_of(other, module) == keys and all(_same(holders[0], other, key) for key in keys) for other in holders[1:]
    )


def _same(one: Adapter, other: Adapter, key: str) -> bool:
    a, b = one.load_head(key), other.load_head(key)
    return a.dtype == b.dtype and torch.equal(a, b)


def _take_extras(adapters: Sequence[Adapter], plan: _Decisions) -> None:
    """Takes extras that are equal wherever they occur.

    Raises:
        LoraforgeError: They differ.
    """
    holders = [a for a in adapters if a.extras]
    differing = sorted(
        {key for a in holders for b in holders for key in a.extras if key in b.extras and not _same(a, b, key)}
    )
    settings = {json.dumps(a.config.get("trainable_token_indices")) for a in holders}
    if differing or len(settings) > 1:
        raise LoraforgeError(
            "The adapters carry different whole weights beside their LoRA factors; whole weights cannot be summed",
            where=", ".join(a.name for a in holders),
            got=shorten(differing) or "trainable_token_indices differ",
            expected="equal ones, or one adapter to take them from",
            hint=f"`--from {holders[0].name}` (API: heads_from) takes them (and the heads) from that adapter",
        )
    for adapter in holders:
        plan.take(adapter, [key for key in adapter.extras if key not in plan.merged])
        plan.take_extras_config(adapter)
