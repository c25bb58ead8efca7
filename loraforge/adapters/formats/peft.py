"""PEFT files: LoRA on linear, Conv1D, convolution and embedding modules, adapted parameters, DoRA, LoHa and LoKr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraforge.adapters.config import PeftSettings
from loraforge.adapters.formats.experts import expert_parts, parameter_stacks
from loraforge.adapters.formats.lycoris import LOHA_SLOTS, LOKR_SLOTS, lycoris_part
from loraforge.adapters.formats.parts import Contents, Part, Slots, checked_use, lora_part
from loraforge.adapters.formats.spellings import foreign_format, split_key
from loraforge.adapters.keys import PREFIX, head_module, is_extra, is_safe_name, shorten
from loraforge.errors import LoraforgeError
from loraforge.storage.files import TensorFile

_LYCORIS = frozenset(LOHA_SLOTS + LOKR_SLOTS)


def read_peft(file: TensorFile, settings: PeftSettings) -> Contents:
    """Sorts the keys of a PEFT file into modules, heads and extras.

    Args:
        file: The file of tensors.
        settings: The adapter's configuration; `PeftSettings.unknown()` where none came with the file.

    Returns:
        What is well-formed, with everything wrong in `problems` and keys of no meaning in `unknown`.
    """
    contents = Contents("peft")
    groups = _sort(file, settings, contents)
    stacks = parameter_stacks(groups, settings.target_parameters, file, contents.problems)
    for stem, slots in groups.items():
        try:
            if stem in stacks:
                contents.parts.update(expert_parts(stem, stacks[stem], slots, file, settings))
            else:
                contents.parts[stem] = checked_use(stem, slots, _part(stem, slots, file, settings))
        except LoraforgeError as problem:
            contents.problems.append(problem)
    if settings.dora:
        lacking = [name for name, part in contents.parts.items() if part.magnitude is None]
        contents.problems += missing_magnitudes(lacking, file)
    return contents


def _sort(file: TensorFile, settings: PeftSettings, contents: Contents) -> dict[str, Slots]:
    """Module name in the file -> its slots; heads, extras and refusals go to `contents`."""
    groups: dict[str, Slots] = {}
    refused: dict[str, list[str]] = {}
    # Some tools save without the prefix; then no key at all has it.
    bare = not any(key.startswith(PREFIX) for key in file.shapes)
    for key in sorted(file.shapes):
        name = key.removeprefix(PREFIX)
        spelled = split_key(name, peft_only=True) if bare or name != key else None
        if not is_safe_name(name):
            refused.setdefault("has names that are not dotted module names", []).append(key)
        elif spelled is not None and spelled.slot not in _slots_of(settings):
            kind = "LyCORIS" if spelled.slot in _LYCORIS else "LoRA"
            refused.setdefault(f"holds {kind} factors, though its peft_type is {settings.kind}", []).append(key)
        elif spelled is not None:
            groups.setdefault(spelled.stem, {})[spelled.slot] = key
        elif (foreign := foreign_format([key], in_peft=True)) is not None:
            refused.setdefault(f"holds {foreign}, which are not supported", []).append(key)
        elif name == key and not bare:
            refused.setdefault(f"has keys that do not start with '{PREFIX}'", []).append(key)
        elif head_module(name, settings) is not None:
            contents.heads[name] = key
        elif is_extra(name, settings):
            contents.extras[name] = key
        else:
            contents.unknown.append(key)
    if bare and groups:
        contents.notes.append(f"the keys do not start with '{PREFIX}'; they are read as if they did")
    contents.problems += [
        LoraforgeError(f"The adapter {what}", where=file.path, got=shorten(names), expected="PEFT LoRA keys")
        for what, names in refused.items()
    ]
    return groups


def _slots_of(settings: PeftSettings) -> frozenset[str]:
    """Slots that the adapter's peft_type has."""
    if settings.kind == "LOHA":
        return frozenset(LOHA_SLOTS)
    if settings.kind == "LOKR":
        return frozenset(LOKR_SLOTS)
    lora = frozenset({"A", "B", "embedding_A", "embedding_B", "bias", "magnitude"})
    return lora if settings.r else lora | _LYCORIS


def _part(stem: str, slots: Mapping[str, str], file: TensorFile, settings: PeftSettings) -> Part:
    """One module, its rank checked against the configuration.

    Raises:
        LoraforgeError: Shapes or rank do not fit.
    """

    def scaling(rank: int | None) -> float:
        return settings.scaling_of(stem, settings.rank_of(stem) if rank is None else rank)

    if _LYCORIS & slots.keys():
        if len(file.shapes[slots["lokr_w2"]] if "lokr_w2" in slots else ()) == 3:
            raise LoraforgeError(
                f"LoKr on the Conv1d '{stem}' is not supported where its second factor is full",
                where=f"{file.path}: {slots['lokr_w2']}",
                got=list(file.shapes[slots["lokr_w2"]]),
                hint="PEFT pairs the axes of such factors otherwise: their update is no Kronecker product of matrices",
            )
        return lycoris_part(stem, slots, file, scaling)
    part = lora_part(stem, slots, file, scaling, settings.fan_in_fan_out)
    wanted = settings.rank_of(stem)
    if wanted and part.info.rank != wanted:
        raise rank_error(f"{file.path}: {part.keys[0]}", part.info.rank, wanted)
    return part


def rank_error(where: str, found: int, wanted: int) -> LoraforgeError:
    """The error for factors whose rank is not the configuration's."""
    return LoraforgeError(
        "The rank of the factors contradicts adapter_config.json",
        where=where,
        got=f"rank {found}",
        expected=f"rank {wanted} (r, rank_pattern)",
        hint="the weights and the configuration come from different runs; pair them again",
    )


def missing_magnitudes(names: Sequence[str], file: TensorFile) -> list[LoraforgeError]:
    """One problem where modules lack the magnitude that the configuration promises.

    Args:
        names: Modules without a magnitude under a configuration with use_dora.
        file: The file, for messages.
    """
    if not names:
        return []
    return [
        LoraforgeError(
            "The adapter uses DoRA, but modules have no magnitude",
            where=file.path,
            got=shorten(f"{name}.lora_magnitude_vector" for name in names),
            expected="a magnitude for each module",
            hint="the file is incomplete; save or copy the adapter again",
        )
    ]
