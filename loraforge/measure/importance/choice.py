"""Which heads are gated, and which of them together. Torch-free."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from loraforge.errors import UsageError
from loraforge.measure.heads.layout import HeadKey, HeadLayout

UNITS = ("q", "kv")


@dataclass(frozen=True, slots=True)
class Unit:
    """What one gate closes: a query head, or all query heads of a group that shares a key-value head.

    Attributes:
        key: The head; of a group its first query head.
        attention: Index in the layout's attentions.
        heads: Query heads gated together.
    """

    key: HeadKey
    attention: int
    heads: tuple[int, ...]

    def __str__(self) -> str:
        """As messages name it."""
        kind = "" if self.key.kind == "self" else f", {self.key.kind}-attention"
        return f"{self.key.stack} layer {self.key.layer}, head {self.key.head}{kind}"


def units_of(
    layout: HeadLayout,
    unit: str = "q",
    *,
    layers: Collection[int] | None = None,
    max_heads: int | None = None,
    seed: int = 0,
) -> list[Unit]:
    """The units of a layout, in its order.

    Args:
        layout: The model's heads.
        unit: "q": every query head; "kv": every group of query heads that shares a key-value head.
        layers: Numbers of layers, of every stack; None for all.
        max_heads: At most so many units, drawn with `seed`.
        seed: Of that draw.

    Raises:
        UsageError: No such unit, a layer that the model lacks, or no head left.
    """
    if unit not in UNITS:
        raise UsageError("unknown unit", where="--unit", got=unit, expected=" or ".join(UNITS))
    there = {attention.layer for attention in layout.attentions}
    missing = sorted(set(layers or ()) - there)
    if missing:
        expected = f"0 to {max(there)}" if there else "none: no attention was found"
        raise UsageError("the model has no such layer", where="--layers", got=missing[0], expected=expected)
    if max_heads is not None and max_heads < 1:
        raise UsageError("no head is left to measure", where="--max-heads", got=max_heads, expected="1 or more")
    found = []
    for index, attention in enumerate(layout.attentions):
        if layers is not None and attention.layer not in layers:
            continue
        size = attention.group if unit == "kv" else 1
        for first in range(0, attention.n_q, size):
            key = HeadKey(attention.stack, attention.kind, attention.layer, first)
            found.append(Unit(key, index, tuple(range(first, first + size))))
    if max_heads is not None and max_heads < len(found):
        drawn = sorted(random.Random(seed).sample(range(len(found)), max_heads))
        found = [found[at] for at in drawn]
    return found


def read_layers(text: str | None) -> list[int] | None:
    """Numbers of layers from text as `0-5,7`; None for none given.

    Raises:
        UsageError: It is no list of numbers and ranges.
    """
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or (dash and int(high) < int(low)):
            raise UsageError("layers are not understood", where="--layers", got=text, expected="as 0-5,7")
        found |= set(range(int(low), int(high if dash else low) + 1))
    return sorted(found)


def by_block(layout: HeadLayout, units: Iterable[Unit], order: Sequence[str]) -> list[tuple[str, list[Unit]]]:
    """The units by the layer they are in, layers in the order of a pass; those in no known layer come first."""
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(layout.attentions[unit.attention].block, []).append(unit)
    place = {name: at for at, name in enumerate(order)}
    return sorted(groups.items(), key=lambda item: place.get(item[0], -1))
