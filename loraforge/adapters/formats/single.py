"""Single files of kohya, LyCORIS, diffusers and their kin, in every spelling, with alphas and magnitudes beside it.

The scale is alpha / r, with alpha from the key `X.alpha`. A missing alpha, or 0, means alpha = r, as the trainers do.
Newer diffusers files state it in their metadata instead (lora_adapter_metadata, a PEFT configuration a component).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial

from loraforge.adapters.config import PeftSettings, parse_config
from loraforge.adapters.formats.lycoris import LOHA_SLOTS, LOKR_SLOTS, lycoris_part
from loraforge.adapters.formats.parts import Contents, Slots, checked_use, lora_part
from loraforge.adapters.formats.peft import missing_magnitudes
from loraforge.adapters.formats.spellings import foreign_format, is_peft_spelling, split_key
from loraforge.adapters.keys import PREFIX, is_safe_name, shorten
from loraforge.adapters.names import has_component, is_flat_name, plain_module
from loraforge.errors import LoraforgeError
from loraforge.storage.files import FLOATING, TensorFile

CONFIGURATION = "lora_adapter_metadata"
_LYCORIS = frozenset(LOHA_SLOTS + LOKR_SLOTS)
_LORA = frozenset({"A", "B", "mid", "embedding_A", "embedding_B"})


def read_single(file: TensorFile) -> Contents:
    """Sorts the keys of a file that brings no adapter_config.json.

    Args:
        file: The file of tensors, of any dtype: an alpha may be stored as a whole number.

    Returns:
        What is well-formed, with everything wrong in `problems` and keys of no meaning in `unknown`.
    """
    contents = Contents("peft")
    groups = _sort(file, contents)
    alphas = _alphas(groups, file, contents)
    components = component_settings(file)
    assumed = 0
    for stem, slots in groups.items():
        alpha, settings = alphas.get(stem), settings_of(stem, components)
        if not slots.keys() & (_LORA | _LYCORIS):
            contents.unknown += [*slots.values()]
            continue
        assumed += not alpha and settings is None
        try:
            scaling = partial(_scale, alpha, stem, settings)
            if _LYCORIS & slots.keys():
                part = lycoris_part(stem, slots, file, scaling)
            else:
                part = lora_part(stem, slots, file, scaling, fan_in_fan_out=False)
            contents.parts[stem] = checked_use(stem, slots, part)
        except LoraforgeError as problem:
            contents.problems.append(problem)
    promised = {stem for stem in contents.parts if (stated := settings_of(stem, components)) and stated.dora}
    lacking = [stem for stem in contents.parts if stem in promised and contents.parts[stem].magnitude is None]
    contents.problems += missing_magnitudes(lacking, file)
    contents.format = format_of(groups, file)
    if assumed:
        contents.notes.append(
            f"{assumed} of {len(contents.parts)} modules state no alpha (or 0): alpha = r is taken, which is scale 1"
        )
    return contents


def format_of(groups: Mapping[str, Slots], file: TensorFile) -> str:
    """The family that the names belong to: "kohya", "diffusers" or "peft"."""
    if any(is_flat_name(stem) for stem in groups):
        return "kohya"
    if any(has_component(stem) for stem in groups):
        return "diffusers"
    return "peft" if is_peft_spelling(file.shapes) else "kohya"


def component_settings(file: TensorFile) -> dict[str, PeftSettings]:
    """Component of the pipeline ("unet", "" for none) -> the configuration that the file's metadata states.

    Raises:
        LoraforgeError: The metadata is no JSON object, or states an unsupported feature.
    """
    text = file.metadata.get(CONFIGURATION)
    if text is None:
        return {}
    where = file.path / CONFIGURATION
    try:
        stated = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraforgeError("The configuration in the file's metadata is not JSON", where=where, got=error) from error
    if not isinstance(stated, dict):
        raise LoraforgeError("The configuration in the file's metadata is no JSON object", where=where)
    configs: dict[str, dict[str, object]] = {}
    for name, value in stated.items():
        component, _, field = name.rpartition(".")
        configs.setdefault(component, {})[field] = value
    return {
        component: parse_config({**config, "peft_type": "LORA"}, where)
        for component, config in configs.items()
        if "lora_alpha" in config
    }


def settings_of(stem: str, components: Mapping[str, PeftSettings]) -> PeftSettings | None:
    """The configuration of the component that a module belongs to."""
    return next((s for c, s in components.items() if not c or stem.startswith(f"{c}.")), None)


def _scale(alpha: float | None, stem: str, settings: PeftSettings | None, rank: int | None) -> float:
    """alpha / r by the module's own alpha, else by the stated configuration, else 1."""
    if rank is None:
        return 1.0
    if alpha:
        return alpha / rank
    return 1.0 if settings is None else settings.scaling_of(stem, rank)


def _sort(file: TensorFile, contents: Contents) -> dict[str, Slots]:
    """Module -> its slots; refusals go to `contents.problems`, keys of no meaning to `contents.unknown`."""
    groups: dict[str, Slots] = {}
    refused: dict[str, list[str]] = {}
    for key in sorted(file.shapes):
        name = key.removeprefix(PREFIX)
        spelled = split_key(name)
        if not is_safe_name(name):
            refused.setdefault("has names that are not plain module names", []).append(key)
        elif spelled is None and (foreign := foreign_format([key])) is not None:
            refused.setdefault(f"holds {foreign}, which are not supported", []).append(key)
        elif spelled is None:
            contents.unknown.append(key)
        elif spelled.slot != "alpha" and file.dtypes[key] not in FLOATING:
            refused.setdefault(f"holds factors of an unsupported dtype ({file.dtypes[key]})", []).append(key)
        else:
            slots = groups.setdefault(plain_module(spelled.stem), {})
            if slots.setdefault(spelled.slot, key) != key:
                refused.setdefault("holds one tensor under two names", []).extend((slots[spelled.slot], key))
    contents.problems += [
        LoraforgeError(
            f"The adapter {what}", where=file.path, got=shorten(names), expected="LoRA, LoHa or LoKr factors"
        )
        for what, names in refused.items()
    ]
    return groups


def _alphas(groups: Mapping[str, Slots], file: TensorFile, contents: Contents) -> dict[str, float]:
    """Module -> its alpha, a scalar or a tensor of one entry; anything else is a problem."""
    keys = {stem: slots.pop("alpha") for stem, slots in groups.items() if "alpha" in slots and len(slots) > 1}
    values = file.read(tuple(keys.values()))
    found: dict[str, float] = {}
    for (stem, key), value in zip(keys.items(), values, strict=True):
        alpha = float(value.flatten()[0]) if value.numel() == 1 else math.nan
        if math.isfinite(alpha):
            found[stem] = alpha
            continue
        contents.problems.append(
            LoraforgeError(
                f"The alpha of module '{stem}' is no finite number",
                where=f"{file.path}: {key}",
                got=f"{alpha:g}" if value.numel() == 1 else list(value.shape),
                expected="a scalar or one entry",
            )
        )
    return found
