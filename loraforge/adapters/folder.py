"""Which files make an adapter folder, and what to say of something that is none."""

from __future__ import annotations

from pathlib import Path

from loraforge.adapters.config import CONFIG_NAME
from loraforge.adapters.keys import foreign_format, shorten
from loraforge.errors import LoraforgeError
from loraforge.storage.files import open_tensors

WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")


def find_weights(folder: Path) -> Path:
    """The file of tensors in a PEFT folder, .safetensors before .bin.

    Raises:
        LoraforgeError: No such folder, a bare file, no configuration or no weights.
    """
    wanted = "a PEFT folder with adapter_config.json and adapter_model.safetensors"
    if folder.is_file():
        what = f"; it holds {kind}" if (kind := _kind_of(folder)) else ""
        raise LoraforgeError(
            f"A single file was given where an adapter folder is needed{what}",
            where=folder,
            expected=wanted,
            hint="name the folder; a file without a configuration has no scale",
        )
    if not folder.is_dir():
        raise LoraforgeError("There is no such adapter folder", where=folder, expected=wanted)
    found = next((folder / name for name in WEIGHT_NAMES if (folder / name).is_file()), None)
    if not (folder / CONFIG_NAME).is_file():
        kinds = [kind for other in sorted(folder.glob("*.safetensors"))[:4] if (kind := _kind_of(other))]
        raise LoraforgeError(
            "The folder has no adapter_config.json" + (f"; it holds {kinds[0]}" if kinds else ""),
            where=folder,
            got=shorten(sorted(entry.name for entry in folder.iterdir())) or "an empty folder",
            expected=wanted,
        )
    if found is None:
        raise LoraforgeError(
            "The folder has no weights",
            where=folder,
            got=shorten(sorted(entry.name for entry in folder.iterdir())),
            expected=" or ".join(WEIGHT_NAMES),
        )
    return found


def _kind_of(path: Path) -> str | None:
    """Unsupported format of a file of tensors in words, None where it is PEFT's or cannot be told."""
    if path.suffix != ".safetensors":
        return None
    try:
        return foreign_format(open_tensors(path).shapes)
    except LoraforgeError:
        return "no readable tensors"
