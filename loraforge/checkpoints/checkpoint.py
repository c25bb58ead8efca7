"""A full model on disk: a transformers folder (whole or sharded) or one file of a state dict."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraforge.checkpoints.shards import SUFFIXES, open_shard
from loraforge.errors import LoraforgeError, raise_problems
from loraforge.storage.files import FLOATING, TensorFile, sha256_of

CONFIG = "config.json"
# In the order in which transformers looks for them; then what diffusers writes.
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
)  # fmt: skip
# What a model needs beside its weights: configuration, tokenizer, processor, generation, chat template, its own code.
_KEPT = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".bpe", ".spm"}
_NOT_KEPT = {*WEIGHTS, "run.json", "trainer_state.json", "all_results.json", "adapter_config.json"}
_ADAPTER_KEYS = ("lora_", "hada_", "lokr_", ".ia3_")


class Checkpoint:
    """A full model on disk; names and shapes are held, no tensor.

    Attributes:
        path: The folder or file.
        name: Its last component without suffix.
        folder: The folder, None for a single file.
        files: Files of weights.
        names: Tensor names, naturally sorted.
        config: config.json as it is; empty where there is none.
    """

    def __init__(
        self, path: Path, shards: Sequence[TensorFile], where: Mapping[str, TensorFile], config: dict[str, Any]
    ) -> None:
        """Keeps the table of names; `open_checkpoint` is the way to make one."""
        self.path, self.config = path, config
        self.folder = path if path.is_dir() else None
        resolved = path.resolve()
        self.name = resolved.name if self.folder is not None else resolved.stem
        self.files = tuple(shard.path for shard in shards)
        self.names = tuple(sorted(where, key=natural_key))
        self._where = dict(where)

    def __repr__(self) -> str:
        """Name and size."""
        return f"Checkpoint({self.name!r}, tensors={len(self.names)})"

    def __contains__(self, name: str) -> bool:
        """Whether it has a tensor of that name."""
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._where[name].shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor as stored, from the header."""
        return self._where[name].dtypes[name]

    def is_float(self, name: str) -> bool:
        """Whether arithmetic on a tensor means something (packed integers are codes, not numbers)."""
        return self.dtype(name) in FLOATING

    def numel(self, name: str) -> int:
        """Number of entries of a tensor."""
        return math.prod(self.shape(name))

    def read(self, name: str) -> Tensor:
        """A tensor as stored, from the disk each time.

        Raises:
            LoraforgeError: The file cannot be read any more.
        """
        return self._where[name].read((name,))[0]

    def read_finite(self, name: str) -> Tensor:
        """A tensor as stored.

        Raises:
            LoraforgeError: It holds NaN or Inf.
        """
        tensor = self.read(name)
        if not bool(torch.isfinite(tensor).all()):
            raise LoraforgeError(
                "A tensor holds NaN or Inf",
                where=f"{self._where[name].path}: {name}",
                got=f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} entries",
                expected="finite numbers",
                hint="the training run broke down; take an earlier checkpoint of this model",
            )
        return tensor

    @property
    def bytes(self) -> int:
        """Size of the files of weights."""
        return sum(file.stat().st_size for file in self.files)

    @cached_property
    def sha256s(self) -> dict[str, str]:
        """SHA-256 of each file of weights, by file name."""
        return {file.name: sha256_of(file) for file in self.files}

    @property
    def sha256(self) -> str:
        """SHA-256 of the file of weights; of the list of hashes (as sha256sum prints it) where there are several."""
        if len(self.sha256s) == 1:
            return next(iter(self.sha256s.values()))
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.sha256s.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def config_files(self) -> list[Path]:
        """Files of the folder that a copy of the model needs beside its weights."""
        if self.folder is None:
            return []
        return [
            entry
            for entry in sorted(self.folder.iterdir())
            if entry.is_file() and entry.suffix in _KEPT and entry.name not in _NOT_KEPT and entry.name[0] != "."
        ]


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
        shard = open_shard(_known_suffix(place))
        return Checkpoint(place, [shard], dict.fromkeys(shard.shapes, shard), {})
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


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sorts layer 2 before layer 10."""
    return tuple((0, int(p)) if p.isdigit() else (1, p) for p in re.split(r"(\d+)", name) if p)


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
