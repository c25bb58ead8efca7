"""Files of tensors, opened lazily: safetensors by header, .bin through the weights-only loader."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraforge.errors import LoraforgeError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


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

    def read(self, keys: tuple[str, ...]) -> list[Tensor]:
        """The tensors of `keys`, as stored."""
        ...


class SafetensorsFile:
    """A .safetensors file. The header is read once, the file is opened anew for each read."""

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
            LoraforgeError: The file is damaged, or holds tensors of other dtypes than floating point.
        """
        self.path = path
        self.shapes: Mapping[str, tuple[int, ...]]
        self.dtypes: Mapping[str, torch.dtype]
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        try:
            with safe_open(path, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118 - the handle is no mapping
                    piece = handle.get_slice(key)
                    name = piece.get_dtype()
                    if name not in _DTYPES:
                        raise dtype_error(path, key, name)
                    shapes[key], dtypes[key] = tuple(piece.get_shape()), _DTYPES[name]
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from error
        self.shapes, self.dtypes = shapes, dtypes

    def read(self, keys: tuple[str, ...]) -> list[Tensor]:
        """The tensors of `keys`, mapped from the file."""
        try:
            with safe_open(self.path, framework="pt") as handle:
                return [handle.get_tensor(key) for key in keys]
        except (SafetensorError, OSError) as error:
            raise damaged(self.path, error) from error


class BinFile:
    """A .bin file: a pickle without a header, so it is loaded whole (weights only, no code runs)."""

    def __init__(self, path: Path) -> None:
        """Loads the file.

        Raises:
            LoraforgeError: It is damaged, holds anything but tensors, or wants to run code.
        """
        self.path = path
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise LoraforgeError(
                "The .bin file is damaged or holds objects other than tensors, which could run code",
                where=path,
                got=_refused_object(str(error)),
                expected="a dictionary of tensors",
                hint="ask for the adapter as .safetensors",
            ) from error
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            raise damaged(path, error) from error
        if not isinstance(content, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
        ):
            raise LoraforgeError("The .bin file is not a dictionary of tensors", where=path, got=type(content).__name__)
        self.tensors: dict[str, Tensor] = {key: value.detach() for key, value in content.items()}
        for key, value in self.tensors.items():
            if value.dtype not in _DTYPES.values():
                raise dtype_error(path, key, str(value.dtype))
        self.shapes = {key: tuple(value.shape) for key, value in self.tensors.items()}
        self.dtypes = {key: value.dtype for key, value in self.tensors.items()}

    def read(self, keys: tuple[str, ...]) -> list[Tensor]:
        """The tensors of `keys`."""
        return [self.tensors[key] for key in keys]


def open_tensors(path: Path) -> TensorFile:
    """Opens a .safetensors or .bin file by its suffix."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else BinFile(path)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _refused_object(message: str) -> str:
    """What the weights-only loader met; its own words go, because they advise to switch the protection off."""
    found = re.search(r"GLOBAL (\S+)", message)
    return f"the object {found[1]}" if found else "no pickle of tensors"


def damaged(path: Path, error: Exception) -> LoraforgeError:
    """The error for a file that cannot be read as tensors."""
    size = f"{path.stat().st_size} bytes" if path.exists() else "no file"
    return LoraforgeError(
        "The file of weights is damaged or incomplete",
        where=path,
        got=f"{str(error).strip()[:200]} ({size})",
        expected="a whole .safetensors or .bin file",
        hint="download or copy it again (a git-lfs pointer of about 130 bytes is not the file itself)",
    )


def dtype_error(path: Path, key: str, dtype: str) -> LoraforgeError:
    """The error for a tensor that is not floating point."""
    return LoraforgeError(
        "A tensor has an unsupported dtype",
        where=f"{path}: {key}",
        got=dtype,
        expected="float32, bfloat16, float16 or float64",
    )
