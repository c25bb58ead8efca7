"""What the modules of one format are called in another.

Kohya flattens names behind a prefix for the part of the pipeline (`lora_unet_`, `lora_te_`); diffusers puts the part in
front (`unet.`, `text_encoder.`); a PEFT folder belongs to one model and names no part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from loraforge.adapters.keys import join_alike, shorten
from loraforge.adapters.vocabulary import restored
from loraforge.errors import LoraforgeError, raise_problems

# Kohya prefix -> part. A file with two text encoders numbers them from 1.
_PREFIXES = {
    "lora_unet": "unet",
    "lora_transformer": "transformer",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
}
_PARTS = {part: prefix for prefix, part in _PREFIXES.items() if prefix != "lora_te1"}
_FLAT = re.compile(rf"({'|'.join(_PREFIXES)})_(.+)")
_DOTTED = re.compile(rf"({'|'.join(sorted(_PARTS, key=len, reverse=True))})\.(.+)")
# First words by which a model's part is known where nothing else names it.
_UNET_WORDS = {"down_blocks", "up_blocks", "mid_block", "conv_in", "conv_out", "time_embedding", "add_embedding"}
_DIT_WORDS = {"transformer_blocks", "single_transformer_blocks", "context_embedder", "x_embedder", "time_text_embed"}


class Place(NamedTuple):
    """A module's part of the pipeline, None where the name does not say, and its name there."""

    part: str | None
    name: str


def renamed(modules: Sequence[str], to: str, parted: Collection[str] = ()) -> dict[str, str]:
    """Names of modules in the format `to`.

    Args:
        modules: Names as the adapters have them; flat ones are known by their prefix.
        to: "peft", "kohya" or "diffusers".
        parted: Those that start with their part (`unet.`) if they have dots, as in diffusers files. Any other
            `transformer.h.0` is a module of a language model.

    Returns:
        Name -> name in `to`, in the same order.

    Raises:
        LoraforgeError: A name cannot be expressed there; several problems come together.
    """
    places = {name: _place(name, name in parted) for name in modules}
    spell: Callable[[Place], str] = {"peft": _peft, "kohya": _kohya(places), "diffusers": _diffusers}[to]
    if to == "peft":
        _check_one_part(places)
    found: dict[str, str] = {}
    problems: list[LoraforgeError] = []
    for name, place in places.items():
        try:
            found[name] = spell(place)
        except LoraforgeError as problem:
            problems.append(problem)
    raise_problems(join_alike(problems))
    _check_distinct(found, to)
    return found


def _place(name: str, parted: bool) -> Place:
    flat = _FLAT.fullmatch(name) if "." not in name else None
    if flat is not None:
        part = _PREFIXES[flat[1]]
        # A tool that flattened a name with its part in front wrote the part twice.
        return Place(part, flat[2].removeprefix(f"{part}_"))
    dotted = _DOTTED.fullmatch(name) if parted else None
    return Place(dotted[1], dotted[2]) if dotted is not None else Place(None, name)


def _peft(place: Place) -> str:
    # Only a name without dots behind a part was flattened; a plain module may well be called "fc_out".
    return restored(place.name) if place.part is not None else place.name


def _kohya(places: Mapping[str, Place]) -> Callable[[Place], str]:
    numbered = any(place.part == "text_encoder_2" for place in places.values())

    def spell(place: Place) -> str:
        part = place.part or ("text_encoder" if place.name.startswith("text_model.") else "unet")
        prefix = "lora_te1" if numbered and part == "text_encoder" else _PARTS[part]
        return f"{prefix}_{place.name.replace('.', '_')}"

    return spell


def _diffusers(place: Place) -> str:
    name = _peft(place)
    # Kohya calls the main model "unet" whatever it is, so there the words decide.
    part = _part_by_word(name.partition(".")[0]) if place.part in (None, "unet") else place.part
    if part is None:
        raise LoraforgeError(
            "A module belongs to no part of a diffusion pipeline",
            where=name,
            expected="modules of a UNet, a diffusion transformer or a text encoder",
            hint="write it as --to peft or --to kohya",
        )
    return f"{part}.{name}"


def _part_by_word(word: str) -> str | None:
    """The part that a first word belongs to."""
    if word in _UNET_WORDS:
        return "unet"
    if word in _DIT_WORDS:
        return "transformer"
    return "text_encoder" if word == "text_model" else None


def _check_one_part(places: Mapping[str, Place]) -> None:
    """Refuses modules of several parts: a PEFT folder is loaded into one model."""
    parts = sorted({place.part for place in places.values() if place.part is not None})
    if len(parts) > 1:
        raise LoraforgeError(
            "The modules belong to several models, and a PEFT adapter belongs to one",
            got=", ".join(parts),
            expected="modules of one part of the pipeline",
            hint="write it as --to kohya or --to diffusers (--format of a merge)",
        )


def _check_distinct(found: Mapping[str, str], to: str) -> None:
    seen: dict[str, list[str]] = {}
    for name, target in found.items():
        seen.setdefault(target, []).append(name)
    doubled = {target: names for target, names in seen.items() if len(names) > 1}
    if doubled:
        target, names = next(iter(doubled.items()))
        raise LoraforgeError(
            f"Two modules have one name in the format {to}",
            where=target,
            got=shorten(names),
            expected="names that differ in more than dots and underscores",
        )
