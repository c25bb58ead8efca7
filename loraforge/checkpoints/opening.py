"""Opens a full model: finds its files of weights, checks them against their index, tells models from adapters."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from loraforge.checkpoints.checkpoint import CONFIG, WEIGHTS, Checkpoint
from loraforge.checkpoints.shards import SUFFIXES, open_shard
from loraforge.errors import LoraforgeError, raise_problems
from loraforge.storage.files import TensorFile
from loraforge.storage.names import natural_key

# Parts of the names of adapter factors; diffusers writes "to_q.lora.up.weight".
_ADAPTER_KEYS = ("lora_", ".lora.", "_lora.", "hada_", "lokr_", ".ia3_")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a full model; tensors are read later, one by one.

    Args:
        path: A transformers folder (config.json and model.safetensors, its shards, or pytorch_model.bin), or one file
            of a state dict (.safetensors, .bin, .pt, .pth), or the id of a model in the Hugging Face cache.

    Raises:
        LoraforgeError: Something is missing, damaged or contradicting; all problems are shown at once.
    """
    place = Path(path)
    if not place.exists():
        place = _cached(path)
    if place.is_file():
        weights, config = _known_suffix(place), {}
    else:
        weights = _find_weights(place)
        config = _read_json(place / CONFIG) if (place / CONFIG).is_file() else {}
    if weights.name.endswith(".index.json"):
        shards, where = _open_index(weights)
    else:
        shards = [open_shard(weights)]
        where = dict.fromkeys(shards[0].shapes, shards[0])
    if not where:
        raise LoraforgeError("The model holds no tensors", where=weights)
    return Checkpoint(place, shards, where, config)


def looks_like_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a full model rather than an adapter; opens nothing more than a header.

    True for a folder with a model's weights and no adapter_config.json, and for a single file whose names are not those
    of adapter factors.
    """
    place = Path(path)
    if place.is_dir():
        return not (place / "adapter_config.json").is_file() and any((place / name).is_file() for name in WEIGHTS)
    if not place.is_file() or place.suffix not in SUFFIXES:
        return False
    try:
        names = open_shard(place).shapes
    except LoraforgeError:
        return False
    return bool(names) and not any(mark in name for name in names for mark in _ADAPTER_KEYS)


def _cached(name: str | os.PathLike[str]) -> Path:
    """The folder of a model id in the Hugging Face cache; nothing is fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(os.fspath(name), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError) as error:
        raise LoraforgeError(
            "There is no such model",
            where=name,
            expected="a model folder, a file of weights, or an id in the Hugging Face cache",
            hint=f"check the path; or fetch it once: hf download {name}",
        ) from error


def _known_suffix(path: Path) -> Path:
    if path.suffix not in SUFFIXES:
        raise LoraforgeError(
            "The file is no model", where=path, got=path.suffix or "no suffix", expected=", ".join(SUFFIXES)
        )
    return path


def _find_weights(folder: Path) -> Path:
    if not folder.is_dir():
        raise LoraforgeError("There is no such model", where=folder, expected="a model folder or a file of weights")
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        adapter = (folder / "adapter_config.json").is_file()
        raise LoraforgeError(
            "The folder is an adapter, not a full model" if adapter else "The folder has no weights of a model",
            where=folder,
            got=", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "an empty folder",
            expected=" or ".join(WEIGHTS),
        )
    return found


def _open_index(index: Path) -> tuple[list[TensorFile], dict[str, TensorFile]]:
    """The shards that an index names, checked against it."""
    table = _read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise LoraforgeError("The index names no shards", where=index, expected='a "weight_map" of names to files')
    problems: list[LoraforgeError] = []
    opened: dict[str, TensorFile] = {}
    for file in sorted(set(table.values())):
        if Path(file).name != file or file in {".", ".."}:
            problems.append(LoraforgeError("The index names a file outside its folder", where=index, got=file))
        elif not (index.parent / file).is_file():
            count = sum(value == file for value in table.values())
            problems.append(
                LoraforgeError(
                    "A shard of the model is missing",
                    where=index.parent / file,
                    expected=f"the file that {index.name} names for {count} tensors",
                    hint="download or copy it again",
                )
            )
        else:
            opened[file] = open_shard(_known_suffix(index.parent / file))
    absent = [name for name, file in table.items() if file in opened and name not in opened[file].shapes]
    if absent:
        problems.append(
            LoraforgeError(
                "The index names tensors that its shards do not hold",
                where=index,
                got=", ".join(f"{name} ({table[name]})" for name in sorted(absent, key=natural_key)[:5]),
                expected=f"all {len(table)} tensors, {len(absent)} are absent",
                hint="download or copy index and shards again",
            )
        )
    raise_problems(problems)
    return list(opened.values()), {name: opened[file] for name, file in table.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoraforgeError("The file is no JSON", where=path, got=str(error)[:200]) from error
    if not isinstance(content, dict):
        raise LoraforgeError("The file is no JSON object", where=path, got=type(content).__name__)
    return content
