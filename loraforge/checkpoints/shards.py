"""One file of a model's tensors, of any dtype: names and shapes at once, each tensor when it is asked for."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.storage.files import STORED, SafetensorsFile, TensorFile, damaged
from loraforge.storage.header import check_names, check_regular, dtype_error

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# Under these keys training scripts nest the tensors beside epoch, optimiser and the like.
_NESTED = ("state_dict", "model_state_dict", "model")
_WRAPPER = "module."  # DistributedDataParallel's
# Bytes read from a mapped file until it is mapped anew: the pages that were read count as this process's memory, and
# every mapping costs the time of all names.
REMAP_BYTES = 2**28
# What torch's loader raises on bytes that no torch.save wrote.
_UNREADABLE = (
    RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, ImportError,
    AssertionError, MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


class PickleShard:
    """A .bin, .pt or .pth file: a dictionary of tensors, or one nested under "state_dict" or "model".

    Read by the weights-only loader (no code runs) and mapped, so a tensor comes from the disk when it is used. A file
    in the format from before torch 1.6 cannot be mapped and is held whole.
    """

    def __init__(self, path: Path) -> None:
        """Reads names and shapes.

        Raises:
            LoraforgeError: It is damaged, holds anything but tensors, or wants to run code.
        """
        check_regular(path)
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self._mapped = zipfile.is_zipfile(path)
        self._tensors = tensors = self._load()
        self._read = 0
        check_names(path, tensors)
        for name, tensor in tensors.items():
            if tensor.dtype not in STORED:
                raise dtype_error(path, name, str(tensor.dtype), STORED)
            plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
            if not plain or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
                raise damaged(path, f"{name} claims more than the file holds")
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes: Mapping[str, torch.dtype] = {name: tensor.dtype for name, tensor in tensors.items()}

    def read(self, keys: tuple[str, ...]) -> list[Tensor]:
        """The tensors of `keys`, as stored."""
        # Copies: a view would keep the whole file mapped.
        found = [self._tensors[key].clone() for key in keys]
        self._read += sum(tensor.nbytes for tensor in found)
        if self._mapped and self._read >= REMAP_BYTES:
            self._tensors, self._read = {}, 0  # let go of the old pages first
            self._tensors = self._load()
        return found

    def _load(self) -> dict[str, Tensor]:
        path = self.path
        try:
            if self._mapped:
                _check_archive(path)
            with warnings.catch_warnings():
                # What it cannot read it refuses; that it read another protocol well is no news.
                warnings.filterwarnings("ignore", message="Detected pickle protocol")
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=self._mapped)
        except pickle.UnpicklingError as error:
            raise LoraforgeError(
                f"The {path.suffix} file is damaged or holds objects other than tensors, which could run code",
                where=path,
                expected="a dictionary of tensors",
                hint="ask for the model as .safetensors",
            ) from error
        except _UNREADABLE as error:
            raise damaged(path, error) from error
        found = _unwrap(content)
        if not found or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
            raise LoraforgeError(
                "The file is not a dictionary of tensors",
                where=path,
                got=type(content).__name__ + _first_foreign(found),
                expected="a state dict, as torch.save(model.state_dict(), ...) writes it",
            )
        wrapper = _WRAPPER if all(name.startswith(_WRAPPER) for name in found) else ""
        return {name.removeprefix(wrapper): tensor.detach() for name, tensor in found.items()}


def open_shard(path: Path) -> TensorFile:
    """Opens a file of tensors by its suffix."""
    return SafetensorsFile(path, STORED) if path.suffix == ".safetensors" else PickleShard(path)


def _check_archive(path: Path) -> None:
    """Refuses archives that unpack to more than they are: torch.save compresses nothing."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise damaged(path, "compressed entries")


def _unwrap(content: Any) -> dict[Any, Any]:
    """The dictionary of tensors in what a .bin or .pt file holds; empty if there is none."""
    if not isinstance(content, dict):
        return {}
    for key in _NESTED:
        inner = content.get(key)
        if isinstance(inner, dict) and inner:
            return dict(inner)
    return dict(content)


def _first_foreign(found: Mapping[Any, Any]) -> str:
    """The first entry that is no tensor, for the message."""
    return next((f" with {k!r}: {type(v).__name__}" for k, v in found.items() if not isinstance(v, Tensor)), "")
