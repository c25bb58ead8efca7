"""Opens an adapter of any supported format: the keys decide which."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraforge.adapters.config import CONFIG_NAME, PeftSettings, parse_config, read_config
from loraforge.adapters.folder import WEIGHT_NAMES, find_weights
from loraforge.adapters.formats.keymap import KEY_MAP_NAME, read_key_map, read_mapped
from loraforge.adapters.formats.parts import Contents
from loraforge.adapters.formats.peft import read_peft
from loraforge.adapters.formats.single import read_single
from loraforge.adapters.keys import PREFIX, join_alike, shorten
from loraforge.adapters.reader import Adapter
from loraforge.errors import LoraforgeError, raise_problems
from loraforge.storage.files import FLOATING, STORED, open_tensors


def open_adapter(
    path: str | os.PathLike[str],
    *,
    ignore_unknown: bool = False,
    key_map: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> Adapter:
    """Opens an adapter; tensors are loaded later, module by module.

    The keys decide the format: PEFT's start with "base_model.model.", everything else is kohya's, LyCORIS's, diffusers'
    or one of their spellings (`formats.spellings`).

    Args:
        path: PEFT folder, folder with one file of tensors and no configuration, or a file (.safetensors, .bin, .pt).
        ignore_unknown: Pass over keys that belong to nothing, with a note, instead of refusing them.
        key_map: For files with private names: a key map (`formats.keymap`) or its file; by default `key_map.json`
            beside the file of tensors, if there is one.

    Raises:
        LoraforgeError: Something is missing, damaged, contradicting or unsupported; all problems are shown at once.
    """
    place = Path(path)
    weights, config_path = find_weights(place)
    if key_map is None and (weights.parent / KEY_MAP_NAME).is_file():
        key_map = weights.parent / KEY_MAP_NAME
    config: dict[str, Any] = {}
    settings = PeftSettings.unknown()
    if key_map is not None:
        file = open_tensors(weights)
        mapping = key_map if isinstance(key_map, Mapping) else read_key_map(Path(key_map))
        contents = read_mapped(file, mapping)
    elif config_path is not None and weights.name in WEIGHT_NAMES:
        config = read_config(weights.parent)
        settings = parse_config(config, weights.parent / CONFIG_NAME)
        file = open_tensors(weights)
        contents = read_peft(file, settings)
    else:
        file = open_tensors(weights, STORED)
        if any(key.startswith(PREFIX) for key in file.shapes):
            file = open_tensors(weights, FLOATING)
            config, settings, note = _settings_of_peft_file(place, weights, config_path)
            contents = read_peft(file, settings)
            contents.notes += note
        else:
            contents = read_single(file)
    _check(contents, weights, ignore_unknown)
    return Adapter(place, config, settings, file, contents)


def _settings_of_peft_file(
    place: Path, weights: Path, config_path: Path | None
) -> tuple[dict[str, Any], PeftSettings, list[str]]:
    """Configuration, settings and notes of a file with PEFT's keys that was given by itself.

    Raises:
        LoraforgeError: A folder without a configuration was given.
    """
    if config_path is not None:
        config = read_config(config_path.parent)
        return config, parse_config(config, config_path), []
    if place.is_dir():
        raise LoraforgeError(
            "The folder has no adapter_config.json",
            where=place,
            got=weights.name,
            expected="the configuration, which states alpha",
            hint=f"copy it again, or name the file ({weights}) to read it with alpha = r",
        )
    return {}, PeftSettings.unknown(), [f"there is no {CONFIG_NAME} beside {weights.name}: alpha = r is taken, scale 1"]


def _check(contents: Contents, weights: Path, ignore_unknown: bool) -> None:
    """Raises everything that is wrong with a file at once."""
    problems = list(contents.problems)
    if contents.unknown and ignore_unknown:
        contents.notes.append(f"unknown keys of {weights.name} were passed over: {shorten(contents.unknown)}")
    elif contents.unknown:
        problems.append(
            LoraforgeError(
                "The adapter has keys that are no part of a LoRA adapter",
                where=weights,
                got=shorten(contents.unknown),
                expected="factors, alphas, heads",
                hint="`--ignore-unknown` (API: ignore_unknown=True) leaves them out",
            )
        )
    raise_problems(join_alike(problems))
    if not contents.parts:
        found = shorten([*contents.heads, *contents.extras, *contents.unknown]) or "no keys"
        raise LoraforgeError("The adapter holds no LoRA factors", where=weights, got=found)
