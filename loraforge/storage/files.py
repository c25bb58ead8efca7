"""Files of tensors, opened lazily: safetensors by header, .bin through the weights-only loader."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from io import RawIOBase
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.storage.header import (
    FLOATING,
    STORED,
    ascii_line,
    check_names,
    check_regular,
    damaged,
    dtype_error,
    read_header,
)

__all__ = ["FLOATING", "STORED", "BinFile", "SafetensorsFile", "TensorFile", "damaged", "open_tensors", "sha256_of"]

# What torch's loader raises on bytes that no torch.save wrote.
_UNREADABLE = (
    RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, ImportError,
    AssertionError, MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


class TensorFile(Protocol):
    """A file of named tensors whose shapes are known without loading it."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by key."""
        ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Dtype by key."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """Free text that the file carries; empty where its format has none."""
        ...

    def read(self, keys: tuple[str, ...]) -> list[Tensor]:
        """The tensors of `keys`, as stored."""
        ...


class SafetensorsFile:
    """A .safetensors file. The header is read once, the file is opened anew for each read."""

    def __init__(self, path: Path, allowed: Iterable[torch.dtype] = FLOATING) -> None:
        """Reads and checks the header.

        Raises:
            LoraforgeError: The file is damaged, lies about its data, or holds tensors of other dtypes.
        """
        header = read_header(path, allowed)
        self.path = path
        self.shapes: Mapping[str, tuple[int, ...]] = header.shapes
        self.dtypes: Mapping[str, torch.dtype] = header.dtypes
        self.metadata: Mapping[str, str] = header.metadata
        self._places = header.places
        self._seen = self._state(path.stat())

    def read(self, keys: tuple[str, ...]) -> list[Tensor]:
        """The tensors of `keys`, in memory of their own.

        The library would read the whole header again each time, and count mapped pages as this process's memory.
        """
        try:
            with self.path.open("rb", buffering=0) as handle:
                if self._state(os.fstat(handle.fileno())) != self._seen:
                    raise damaged(self.path, "another file than when it was opened: it changed meanwhile")
                return [self._tensor(handle, key) for key in keys]
        except OSError as error:
            raise damaged(self.path, error) from error

    @staticmethod
    def _state(found: os.stat_result) -> tuple[int, int]:
        """What changes when a file is written anew."""
        return found.st_size, found.st_mtime_ns

    def _tensor(self, handle: RawIOBase, key: str) -> Tensor:
        start, size = self._places[key]
        if size == 0:
            return torch.empty(self.shapes[key], dtype=self.dtypes[key])
        data = bytearray(size)
        handle.seek(start)
        view, done = memoryview(data), 0
        while done < size:  # one system call gives at most 2 GiB
            count = handle.readinto(view[done:])
            if not count:
                raise damaged(self.path, f"{key}: {done} of {size} bytes; the file changed while it was read")
            done += count
        return torch.frombuffer(data, dtype=self.dtypes[key]).view(self.shapes[key])


class BinFile:
    """A .bin file: a pickle without a header. Its names are loaded (no code runs), its tensors are mapped."""

    def __init__(self, path: Path, allowed: Iterable[torch.dtype] = FLOATING) -> None:
        """Loads the names and maps the tensors.

        Raises:
            LoraforgeError: It is damaged, holds anything but tensors, wants to run code, or claims more than it holds.
        """
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self.tensors = {key: value.detach() for key, value in _load(path).items()}
        check_names(path, self.tensors)
        kinds = frozenset(allowed)
        for key, value in self.tensors.items():
            if value.dtype not in kinds:
                raise dtype_error(path, key, str(value.dtype), kinds)
            _check_held(path, key, value)
        self.shapes: Mapping[str, tuple[int, ...]] = {key: tuple(value.shape) for key, value in self.tensors.items()}
        self.dtypes: Mapping[str, torch.dtype] = {key: value.dtype for key, value in self.tensors.items()}

    def read(self, keys: tuple[str, ...]) -> list[Tensor]:
        """The tensors of `keys`."""
        return [self.tensors[key] for key in keys]


def open_tensors(path: Path, allowed: Iterable[torch.dtype] = FLOATING) -> TensorFile:
    """Opens a .safetensors file, or by any other suffix a .bin (.pt) file.

    Args:
        path: The file.
        allowed: Dtypes that the caller can use: FLOATING, or STORED where integers and flags may occur too.

    Raises:
        LoraforgeError: No regular file, damaged, hostile, or a tensor of another dtype.
    """
    return SafetensorsFile(path, allowed) if path.suffix == ".safetensors" else BinFile(path, allowed)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _load(path: Path) -> dict[str, Tensor]:
    """The dictionary of tensors in a pickle, by the loader that builds nothing but tensors."""
    size = check_regular(path)
    try:
        archive = zipfile.is_zipfile(path)
        if archive:
            _check_archive(path, size)
        with warnings.catch_warnings():
            # What it cannot read it refuses; that it read another protocol well is no news.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            # Only the archive format of torch >= 1.6 can be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise LoraforgeError(
            "The .bin file is damaged or holds objects other than tensors, which could run code",
            where=path,
            got=_refused_object(str(error)),
            expected="a dictionary of tensors",
            hint="ask for the adapter as .safetensors",
        ) from error
    except _UNREADABLE as error:
        raise damaged(path, error) from error
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise LoraforgeError("The .bin file is not a dictionary of tensors", where=path, got=type(content).__name__)
    return content


def _check_archive(path: Path, size: int) -> None:
    """Refuses archives that unpack to more than they are: torch.save compresses nothing."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None or sum(entry.file_size for entry in entries) > size:
        raise LoraforgeError(
            "The .bin file unpacks to more than it holds",
            where=path,
            got=f"{size} bytes that unpack to {sum(entry.file_size for entry in entries)}",
            expected="an archive of stored entries, as torch.save writes it",
            hint="do not trust this file",
        )


def _check_held(path: Path, key: str, tensor: Tensor) -> None:
    """Refuses tensors without plain numbers, and views that repeat a few stored numbers many times."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise LoraforgeError(
            "A tensor in the .bin file claims more than the file holds",
            where=f"{path}: {key}",
            got=f"shape {list(tensor.shape)}, {tensor.layout} on {tensor.device}",
            expected="a plain tensor with all of its numbers",
            hint="save it again with contiguous tensors, or ask for it as .safetensors",
        )


def _refused_object(message: str) -> str:
    """What the weights-only loader met; its own words go, because they advise to switch the protection off."""
    found = re.search(r"GLOBAL (\S+)", message)
    return f"the object {ascii_line(found[1])}" if found else "no pickle of tensors"
