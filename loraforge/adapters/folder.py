"""Which files make an adapter, and what to say of something that is none."""

from __future__ import annotations

from pathlib import Path

from loraforge.adapters.config import CONFIG_NAME
from loraforge.adapters.keys import shorten
from loraforge.errors import LoraforgeError

WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_WANTED = "a PEFT folder with adapter_config.json and adapter_model.safetensors, or one .safetensors file"


def find_weights(path: Path) -> tuple[Path, Path | None]:
    """The file of tensors of an adapter and its configuration, None where there is none.

    Args:
        path: A PEFT folder (.safetensors before .bin), a folder with just one file of tensors, or such a file.

    Raises:
        LoraforgeError: No such path, no weights, or several files of which none is named as PEFT does.
    """
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise LoraforgeError(
                "The file is no file of tensors", where=path, got=path.suffix or "no suffix", expected=_WANTED
            )
        config = path.parent / CONFIG_NAME
        return path, config if config.is_file() else None
    if not path.is_dir():
        raise LoraforgeError("There is no such adapter folder or file", where=path, expected=_WANTED)
    config = path / CONFIG_NAME
    named = next((path / name for name in WEIGHT_NAMES if (path / name).is_file()), None)
    odd = next((path / name for name in WEIGHT_NAMES if (path / name).exists() and not (path / name).is_file()), None)
    if named is None and odd is not None:
        raise LoraforgeError("The weights are no regular file", where=odd, expected="a file of tensors")
    inside = shorten(sorted(entry.name for entry in path.iterdir())) or "an empty folder"
    if config.is_file():
        if named is None:
            raise LoraforgeError(
                "The folder has no weights", where=path, got=inside, expected=" or ".join(WEIGHT_NAMES)
            )
        return named, config
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    files = [file for file in files if file.suffix == ".safetensors"] or files
    if len(files) != 1:
        raise LoraforgeError(
            "The folder has no adapter_config.json" + (" and several files of tensors" if files else ""),
            where=path,
            got=inside,
            expected=_WANTED,
            hint="name the file itself" if files else None,
        )
    return files[0], None
