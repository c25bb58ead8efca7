"""Writes a model folder: sharded safetensors whose sizes are known beforehand, filled tensor by tensor in any order."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from loraforge.checkpoints.checkpoint import CONFIG, Checkpoint
from loraforge.errors import LoraforgeError
from loraforge.storage.header import DTYPES
from loraforge.storage.names import natural_key

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 4 * 10**9
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What was written.

    Attributes:
        files: Names of the files of weights.
        bytes: Their size together.
        parameters: Number of entries of all tensors.
    """

    files: tuple[str, ...]
    bytes: int
    parameters: int


class ModelWriter:
    """The weights of one model in a folder; use as a context manager.

    Which tensor lies where is settled by the layout alone, so the files do not depend on the order of writing, and
    nothing but the tensor at hand is in memory.
    """

    def __init__(self, folder: Path, layout: Layout, shard_bytes: int = SHARD_BYTES) -> None:
        """Plans the shards and makes their files with whole headers.

        Args:
            folder: Where to write; made if it is not there.
            layout: Shape and dtype by name.
            shard_bytes: Largest size of the tensors of one file; a larger tensor gets a file of its own.

        Raises:
            LoraforgeError: A dtype that safetensors files do not hold, or a shard size below one byte.
        """
        if shard_bytes < 1:
            raise LoraforgeError("The shard size is not positive", got=shard_bytes, expected="bytes, 1 or more")
        for name, (_, dtype) in layout.items():
            if dtype not in _NAMES:
                raise LoraforgeError("A safetensors file cannot hold this dtype", where=name, got=dtype)
        self._layout, self._left = dict(layout), set(layout)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        groups = _plan(self._layout, shard_bytes)
        total = len(groups)
        names = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
        self.files = tuple(names if total > 1 else ["model.safetensors"])
        self._places: dict[str, tuple[int, int]] = {}
        self._handles: list[BinaryIO] = []
        with ExitStack() as opened:
            for number, group in enumerate(groups):
                self._handles.append(opened.enter_context((folder / self.files[number]).open("wb")))
                self._begin(number, group)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the files; what is unfinished belongs to a folder that is thrown away."""
        self._opened.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts a tensor in its place, cast to the layout's dtype.

        Raises:
            LoraforgeError: The layout has another shape for it.
        """
        shape, dtype = self._layout[name]
        if tuple(tensor.shape) != shape:
            raise LoraforgeError("A tensor to write has another shape than planned", where=name, got=tensor.shape)
        number, offset = self._places[name]
        handle = self._handles[number]
        handle.seek(offset)
        flat = tensor.detach().to(device="cpu", dtype=dtype).contiguous().reshape(-1)
        if flat.numel():
            handle.write(flat.view(torch.uint8).numpy().data)
        self._left.discard(name)

    def finish(self) -> ModelReport:
        """Writes the index of several shards and says what was written.

        Raises:
            LoraforgeError: A tensor of the layout was not written.
        """
        if self._left:
            raise LoraforgeError("Not every tensor was written", where=self.folder, got=sorted(self._left)[:5])
        for handle in self._handles:
            handle.flush()
        parameters = sum(math.prod(shape) for shape, _ in self._layout.values())
        if len(self.files) > 1:
            total = sum(_size(*entry) for entry in self._layout.values())
            table = {name: self.files[self._places[name][0]] for name in self._layout}
            index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": table}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        size = sum((self.folder / file).stat().st_size for file in self.files)
        return ModelReport(self.files, size, parameters)

    def _begin(self, number: int, group: list[str]) -> None:
        """Gives a shard's file its header and full length."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        starts, end = {}, 0
        # Wide dtypes first: a tensor then starts at a multiple of its own item size, which mapped readers need.
        for name in sorted(group, key=lambda n: -self._layout[n][1].itemsize):
            shape, dtype = self._layout[name]
            starts[name], begin, end = end, end, end + _size(shape, dtype)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        handle = self._handles[number]
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + end)
        for name, start in starts.items():
            self._places[name] = number, 8 + len(text) + start


def copy_config(base: Checkpoint, folder: Path, changes: Mapping[str, Any]) -> None:
    """Copies what a model needs beside its weights, with some keys of config.json changed.

    Args:
        base: Where to copy from; a single file has nothing to copy.
        folder: The model's new folder.
        changes: Keys of config.json to set.
    """
    for file in base.config_files:
        if file.name == CONFIG and changes:
            text = json.dumps(base.config | dict(changes), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            (folder / CONFIG).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(file, folder / file.name)


def dtype_change(base: Checkpoint, dtype: torch.dtype | None) -> dict[str, str]:
    """The change of config.json that another dtype of the weights asks for; empty where it says nothing of it."""
    key = next((key for key in ("dtype", "torch_dtype") if key in base.config), None)
    return {key: str(dtype).removeprefix("torch.")} if key is not None and dtype is not None else {}


def _plan(layout: Layout, shard_bytes: int) -> list[list[str]]:
    """Names in natural order, cut greedily into shards."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name in sorted(layout, key=natural_key):
        size = _size(*layout[name])
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
