"""A full model on disk: a transformers folder (whole or sharded) or one file of a state dict."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.storage.files import FLOATING, TensorFile, sha256_of
from loraforge.storage.names import natural_key

CONFIG = "config.json"
# In the order in which transformers looks for them; then what diffusers writes.
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
)  # fmt: skip
# What a model needs beside its weights: configuration, tokenizer, processor, generation, chat template, its own code.
_KEPT = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".bpe", ".spm"}
_NOT_KEPT = {"run.json", "trainer_state.json", "all_results.json", "adapter_config.json"}
# Names the shards of weights in any framework's format or variant: none of them is copied.
_INDEX = ".index.json"


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

    def read_finite(self, name: str, device: torch.device | None = None) -> Tensor:
        """A tensor as stored, on a device (default the CPU), where it is checked.

        Raises:
            LoraforgeError: It holds NaN or Inf.
        """
        tensor = self.read(name).to(device)
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

    def changed(self, recorded: Mapping[str, str]) -> list[str]:
        """Files of weights, by name, that are others than those a record has the hashes of."""
        return [name for name, digest in recorded.items() if self.sha256s.get(name, digest) != digest]

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
        return [entry for entry in sorted(self.folder.iterdir()) if entry.is_file() and _is_kept(entry.name)]


def _is_kept(name: str) -> bool:
    """Whether a copy of the model needs the file of this name beside its weights."""
    return Path(name).suffix in _KEPT and name not in _NOT_KEPT and not name.endswith(_INDEX) and name[0] != "."
