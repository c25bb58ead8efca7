"""Which module of a file is which projection of a layout, where names differ by a prefix or otherwise. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from loraforge.adapters.names import flat, is_flat_name
from loraforge.measure.heads.families import locate
from loraforge.measure.heads.layout import HeadLayout


def layout_modules(layout: HeadLayout) -> list[str]:
    """Modules of a layout's projections, each once, in its order; that of an adapter alone may lack some."""
    places = (attention.part(part) for attention in layout.attentions for part in ("q", "k", "v", "o"))
    return list(dict.fromkeys(place.module for place in places if place is not None and place.module))


def match_projections(layout: HeadLayout, present: Collection[str]) -> dict[str, str]:
    """The present modules that are projections of a layout.

    By name, up to a prefix (`match_names`); where no name fits, by place: transformers reads files whose modules have
    older names than its own (`encoder.layer.0.attention.attention.query` is ViT's `layers.0.attention.q_proj`), so that
    an adapter and its base need not agree.

    Returns:
        Layout's module -> present module, of those that are there.
    """
    modules = layout_modules(layout)
    found = match_names(modules, present)
    if found:
        return found
    ours = {place[:4]: module for module in modules if (place := locate(module, layout.family))}
    theirs = {place[:4]: name for name in present if (place := locate(name, layout.family))}
    found = {module: theirs[place] for place, module in ours.items() if place in theirs}
    # Two families may share some places by chance (an output projection): one side must be there as a whole.
    return found if found and len(found) in (len(modules), len(theirs)) else {}


def match_names(wanted: Iterable[str], present: Collection[str]) -> dict[str, str]:
    """Which of the present modules is which of the wanted ones, where one side may carry a prefix.

    A classifier's `bert.encoder.layer.0...` is the bare encoder's `encoder.layer.0...`. One prefix holds for all names,
    the one that matches most; flattened names (`lora_te1_...`) are compared with dots and underscores alike.

    Returns:
        Wanted name -> present name, of those that are there.
    """
    flattened = any(is_flat_name(name) for name in present)
    separator = "_" if flattened else "."
    ours = {flat(name) if flattened else name: name for name in wanted}
    theirs = {flat(name) if flattened else name: name for name in present}
    votes: Counter[tuple[str, str]] = Counter()
    for name in theirs:
        votes.update((prefix, "") for prefix, rest in _cuts(name, separator) if rest in ours)
    for name in ours:
        votes.update(("", prefix) for prefix, rest in _cuts(name, separator) if prefix and rest in theirs)
    if not votes:
        return {}
    # The shortest of equally good prefixes: names that are equal as they stand come first.
    add, strip = min(votes, key=lambda way: (-votes[way], len(way[0]) + len(way[1]), way))
    pairs = {name: add + name.removeprefix(strip) for name in ours if name.startswith(strip)}
    return {ours[name]: theirs[other] for name, other in pairs.items() if other in theirs}


def _cuts(name: str, separator: str) -> Iterator[tuple[str, str]]:
    """(prefix, rest) of a name at every separator; the empty prefix first."""
    yield "", name
    at = name.find(separator)
    while at >= 0:
        yield name[: at + 1], name[at + 1 :]
        at = name.find(separator, at + 1)
