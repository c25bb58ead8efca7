"""Which tensor of a fine-tuned model is which of its base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from loraforge.checkpoints.checkpoint import Checkpoint
from loraforge.errors import LoraforgeError

# With a smaller share of the base's tensors found, the base is another model.
ENOUGH = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """The tensors of one model against its base.

    Attributes:
        names: The model's name of each base tensor that it has in the same shape.
        missing: Base tensors that it lacks.
        own: The model's tensors that the base lacks or has in another shape (its head).
        notes: Sentences for the report.
    """

    names: dict[str, str]
    missing: tuple[str, ...]
    own: tuple[str, ...]
    notes: tuple[str, ...]


def align(base: Checkpoint, model: Checkpoint) -> Alignment:
    """Finds the base's tensors in a model by name and shape.

    Where most names differ by one leading prefix only ("vit.encoder..." of a classifier against "encoder..." of the
    bare model), that prefix is put aside.

    Raises:
        LoraforgeError: Most tensors of the base are not in the model, or a tensor of its repeated layers has another
            shape there.
    """
    best = _names(base, model, "", "")
    way = ("", "")
    if len(best) < ENOUGH * len(base.names):
        for strip, add in _prefixes(base, model):
            found = _names(base, model, strip, add)
            if len(found) > len(best):
                best, way = found, (strip, add)
    if len(best) < ENOUGH * len(base.names):
        example = next((n for n in base.names if n not in best), "")
        raise LoraforgeError(
            "The model does not belong to this base: most of the base's tensors are not in it",
            where=model.path,
            got=f"{len(best)} of {len(base.names)} tensors of {base.path}; without {example} {base.shape(example)}",
            expected="a fine-tuned copy of the base: the same names and shapes",
            hint="give the model that it was fine-tuned from as --base",
        )
    _check_layers(base, model, best, *way)
    notes = []
    if way != ("", ""):
        notes.append(f"{model.name}: its names carry '{way[1]}'" if way[1] else f"{model.name}: lacks '{way[0]}'")
    taken = set(best.values())
    missing = tuple(name for name in base.names if name not in best)
    own = tuple(name for name in model.names if name not in taken)
    return Alignment(best, missing, own, tuple(notes))


def _check_layers(base: Checkpoint, model: Checkpoint, found: dict[str, str], strip: str, add: str) -> None:
    """Refuses tensors of another shape that repeat with the layers: a head may differ, layers are the model itself.

    Raises:
        LoraforgeError: Naming one with both shapes.
    """
    repeated: dict[str, list[tuple[str, str]]] = {}
    for name in base.names:
        other = add + name[len(strip) :] if name.startswith(strip) else name
        if name not in found and other in model:
            pattern = ".".join("#" if part.isdecimal() else part for part in name.split("."))
            repeated.setdefault(pattern, []).append((name, other))
    wrong = [pair for group in repeated.values() if len(group) > 1 for pair in group]
    if wrong:
        name, other = wrong[0]
        raise LoraforgeError(
            f"The model does not belong to this base: {len(wrong)} tensors of its layers have another shape",
            where=f"{model.path}: {other}",
            got=f"{list(model.shape(other))}, in the base {list(base.shape(name))}",
            expected="a fine-tuned copy of the base",
            hint="give the model that it was fine-tuned from as --base",
        )


def _names(base: Checkpoint, model: Checkpoint, strip: str, add: str) -> dict[str, str]:
    """Base name -> model name for tensors of equal shape, a prefix of the base's names replaced."""
    found = {}
    for name in base.names:
        other = add + name[len(strip) :] if name.startswith(strip) else name
        if other in model and model.shape(other) == base.shape(name):
            found[name] = other
    return found


def _prefixes(base: Checkpoint, model: Checkpoint) -> Iterator[tuple[str, str]]:
    """(prefix to strip, prefix to add) worth a try: the most frequent leading components of both sides."""
    for depth in (1, 2):
        for names, added in ((model.names, True), (base.names, False)):
            heads = Counter(".".join(n.split(".")[:depth]) + "." for n in names if n.count(".") > depth)
            for head, _ in heads.most_common(3):
                yield ("", head) if added else (head, "")
